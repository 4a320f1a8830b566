"""Work pools and deployments at a real (temporary) Prefect server.

`kdrl deploy` makes a process pool and the deployments; a whole wheel with its worker is in roads/test_deploy_wheel.py.
The Kubernetes pool's template is tried as far as that goes without a cluster: against the template that Prefect ships
for its own worker, through Prefect's own rendering, and at the server.
"""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import prefect.server.api as prefect_api
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.utilities.templating import apply_values
from setuptools import Distribution
from typer.testing import CliRunner

import flows
from flows.cli import app
from flows.cli.deploy import declared

TEMPLATE = Path(flows.__file__).parent / "work_pools" / "kubernetes.json"
ROOT = Path(__file__).parents[2]
SHIPPED = Path(prefect_api.__file__).parent / "collections_data" / "views" / "aggregate-worker-metadata.json"

NAMES = ["kdrl/full-pipeline", "kdrl-sweep/sweep", "kdrl-filtering/filtering", "kdrl-training-stage/training-stage"]
NAMES += ["kdrl-sft-stage/sft-stage", "kdrl-evaluation/evaluation", "kdrl-reporting/reporting"]
NAMES += ["kdrl-model-evaluation/model-evaluation"]


@pytest.fixture
def template() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(TEMPLATE.read_text())
    return found


def rendered(template: dict[str, Any], **values: Any) -> dict[str, Any]:
    """The job that the worker would send to Kubernetes, for a flow run with these job variables."""
    variables = template["variables"]
    jsonschema.validate(values, variables)
    defaults = {name: field["default"] for name, field in variables["properties"].items() if "default" in field}
    job: dict[str, Any] = apply_values(template["job_configuration"], {**defaults, **values})["job_manifest"]
    return job


def test_it_is_prefects_template_and_more(template: dict[str, Any]) -> None:
    own = json.loads(SHIPPED.read_text())["prefect-kubernetes"]["kubernetes"]["default_base_job_configuration"]
    jsonschema.Draft202012Validator.check_schema(template["variables"])
    assert set(template["job_configuration"]) == set(own["job_configuration"])
    for name, field in own["variables"]["properties"].items():
        assert template["variables"]["properties"][name]["type" if "type" in field else "title"]
    used = set(re.findall(r"\{\{ *(\w+) *\}\}", json.dumps(template["job_configuration"])))
    assert used == set(template["variables"]["properties"])


def test_it_renders_a_job_with_gpus_and_shared_storage(template: dict[str, Any]) -> None:
    job = rendered(template, image="registry.example/kdrl:1", command="prefect flow-run execute", gpus=4, name="run")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert job["spec"]["backoffLimit"] == 0  # what goes on, and from where, is decided by the run's files
    assert (job["spec"]["parallelism"], job["spec"]["completions"]) == (1, 1)
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert container["image"] == "registry.example/kdrl:1"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert container["env"]["KDRL_ARTIFACTS"].startswith("/work/")
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {"shared": "/work", "shm": "/dev/shm"}  # noqa: S108  (a path in the pod)
    assert {volume["name"] for volume in pod["volumes"]} == set(mounted)
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "kdrl-shared"}
    assert "{{" not in json.dumps(job)


def test_job_variables_are_checked(template: dict[str, Any]) -> None:
    for wrong in ({"gpus": 8}, {"image": "kdrl", "gpus": -1}, {"image": "kdrl", "gpus": "all"}):
        with pytest.raises(jsonschema.ValidationError):
            rendered(template, **wrong)


def test_a_prefect_server_takes_it(template: dict[str, Any]) -> None:
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="kdrl-kubernetes", type="kubernetes", base_job_template=template))
        assert client.read_work_pool("kdrl-kubernetes").base_job_template == template


def deploy(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["deploy", "--json", *arguments])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["deploy", *arguments])
    assert done.exit_code == 1
    (line,) = [line for line in done.output.splitlines() if line.strip()]
    return line


def test_it_makes_what_is_missing_and_leaves_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = deploy("--pool", "mine")
    assert made["pools"] == {"mine": "made"}
    assert made["deployments"] == dict.fromkeys(NAMES, "made")
    assert made["next"] == ["prefect worker start --pool mine", "prefect deployment run kdrl/full-pipeline"]
    with get_client(sync_client=True) as client:
        pool, sweep = client.read_work_pool("mine"), client.read_deployment_by_name("kdrl-sweep/sweep")
        client.create_deployment_schedules(sweep.id, [(IntervalSchedule(interval=3600), False)])
    assert pool.type == "process"
    assert "working_dir" in pool.base_job_template["variables"]["properties"]
    assert (sweep.entrypoint, sweep.parameters) == ("flows.sweep.sweep", {"source": "table1"})
    assert (sweep.work_pool_name, sweep.work_queue_name) == ("mine", "default")
    assert sweep.pull_steps == [{"prefect.deployments.steps.set_working_directory": {"directory": str(tmp_path)}}]
    assert sweep.parameter_openapi_schema["properties"]["workers"]["type"] == "integer"

    again = deploy("--pool", "mine")
    assert (set(again["pools"].values()), set(again["deployments"].values())) == ({"already there"}, {"already there"})

    changed = deploy("kdrl-sweep/sweep", "--pool", "mine", "--work-queue", "night")
    assert changed["deployments"] == {"kdrl-sweep/sweep": "changed: work_queue_name"}
    assert changed["next"] == [
        "prefect worker start --pool mine --work-queue night",
        "prefect deployment run kdrl-sweep/sweep",
    ]
    with get_client(sync_client=True) as client:
        found = client.read_deployment_by_name("kdrl-sweep/sweep")
    assert (found.id, found.work_queue_name, len(found.schedules)) == (
        sweep.id,
        "night",
        1,
    )  # the schedule is the user's
    assert (
        deploy("filtering", "--pool", "mine")["next"][1]
        == "prefect deployment run kdrl-filtering/filtering -p run_dir=…"
    )


def test_bad_input_is_one_line_and_changes_nothing() -> None:
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="cluster", type="kubernetes"))
        before = client.read_deployments()
    assert refused("full-pipline", "--pool", "p").startswith(
        "error: no deployment 'full-pipline', did you mean 'full-pipeline'? there are full-pipeline, sweep, "
    )
    assert refused("kdrl/sweep") == "error: no deployment 'kdrl/sweep', did you mean 'kdrl-sweep/sweep'?"
    assert refused("--pool", "a/b") == "error: --pool 'a/b': give a name without any of / % & < >"
    assert refused("--work-queue", " ") == "error: --work-queue ' ': give a name without any of / % & < >"
    said = refused("--pool", "cluster")
    assert said.startswith(
        "error: work pool cluster is of type kubernetes, and kdrl deploy serves pools of type process; "
    )
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):  # nothing listens on the discard port
        said = refused()
    assert "http://127.0.0.1:9/api, does not answer (ConnectError" in said
    assert said.endswith("; start it (prefect server start), or correct PREFECT_API_URL")
    with temporary_settings({PREFECT_API_URL: str(PREFECT_API_URL.value()).removesuffix("/api")}):
        assert "does not answer, and the URL of a Prefect server ends with /api" in refused()
    with get_client(sync_client=True) as client:
        assert client.read_deployments() == before


def test_the_wheel_has_the_prefect_yaml_of_the_repository() -> None:
    assert (ROOT / "flows" / "prefect.yaml").resolve() == ROOT / "prefect.yaml"
    package = Distribution({"src_root": str(ROOT)})
    package.parse_config_files([str(ROOT / "pyproject.toml")])
    assert "prefect.yaml" in package.package_data["flows"]
    assert [f"kdrl{'' if name == 'full-pipeline' else f'-{name}'}/{name}" for name in declared()] == NAMES
