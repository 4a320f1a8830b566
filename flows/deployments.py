"""The deployments of prefect.yaml at a Prefect server, for workers of a process pool that import the installed kdrl.

prefect.yaml names each flow by its file, as `prefect deploy` wants it in a checkout. Here the same flow is named by its
module, which a worker finds wherever kdrl is installed. As with `prefect deploy`, flows run in the folder from which
they were deployed.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate
from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessWorker

from kdrl_core.errors import RunError

MADE, THERE = "made", "already there"
_POOL_TYPE = ProcessWorker.type
_CHDIR = "prefect.deployments.steps.set_working_directory"


def ensure_pool(client: SyncPrefectClient, name: str) -> str:
    """Make a process pool of this name if there is no pool. Returns MADE or THERE. Raises RunError if the pool there
    is of another type."""
    try:
        found = client.read_work_pool(name)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=name, type=_POOL_TYPE, base_job_template=template))
        return MADE
    if found.type != _POOL_TYPE:
        raise RunError(
            f"work pool {name} is of type {found.type}, and kdrl deploy serves pools of type {_POOL_TYPE}; name "
            "another with --pool, or put this one into the prefect.yaml of a checkout and call there: "
            "prefect --no-prompt deploy --all"
        )
    return THERE


def load_flow(entrypoint: str) -> Flow[..., Any]:
    """The flow of an entrypoint of prefect.yaml, like `flows/sweep.py:sweep`."""
    module, _, name = module_path(entrypoint).rpartition(".")
    found: Flow[..., Any] = getattr(import_module(module), name)
    return found


def module_path(entrypoint: str) -> str:
    """`flows/sweep.py:sweep` as `flows.sweep.sweep`."""
    file, _, name = entrypoint.partition(":")
    return f"{file.removesuffix('.py').replace('/', '.')}.{name}"


def wanted(declared: dict[str, Any], flow: Flow[..., Any], folder: Path) -> dict[str, Any]:
    """What the server is to hold of a deployment, by the names of its API.

    Args:
        declared: the deployment as prefect.yaml has it.
        folder: where its flow runs work.
    """
    return {
        "entrypoint": module_path(declared["entrypoint"]),
        "description": declared["description"],
        "tags": declared["tags"],
        "parameters": declared.get("parameters", {}),
        "parameter_openapi_schema": flow.parameters.model_dump(mode="json", exclude_unset=True),
        "enforce_parameter_schema": True,
        "work_pool_name": declared["work_pool"]["name"],
        "work_queue_name": declared["work_pool"]["work_queue_name"],
        "pull_steps": [{_CHDIR: {"directory": str(folder)}}],
    }


def register(client: SyncPrefectClient, name: str, flow: Flow[..., Any], fields: dict[str, Any]) -> str:
    """Make the deployment `name` of a flow, or bring its `fields` up to date: what else the server has of it, such as
    schedules, stays. Returns MADE, THERE, or which fields it has changed."""
    try:
        found = client.read_deployment_by_name(f"{flow.name}/{name}")
    except ObjectNotFound:
        client.create_deployment(flow_id=client.create_flow_from_name(flow.name), name=name, **fields)
        return MADE
    changed = [field for field, value in fields.items() if getattr(found, field) != value]
    if not changed:
        return THERE
    client.update_deployment(found.id, DeploymentUpdate(**fields))
    return f"changed: {', '.join(changed)}"
