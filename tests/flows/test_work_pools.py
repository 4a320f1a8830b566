"""The Kubernetes work pool's template, as far as it can be tried without a cluster: against the template that Prefect
ships for its own worker, through Prefect's own rendering, and at a real Prefect server."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import prefect.server.api as prefect_api
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.utilities.templating import apply_values

import flows

TEMPLATE = Path(flows.__file__).parent / "work_pools" / "kubernetes.json"
SHIPPED = Path(prefect_api.__file__).parent / "collections_data" / "views" / "aggregate-worker-metadata.json"


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
