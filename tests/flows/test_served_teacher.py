"""A teacher behind a key that is kept in a Prefect Secret block: used by the flow, written nowhere."""

import json
from pathlib import Path

import pytest
from faulty_server import faulty_server
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_HOME
from support import TINY

from flows.full_pipeline import full_pipeline
from kdrl_core.boxes.completion import is_finished
from kdrl_core.config.paths import ASSETS
from kdrl_core.errors import SecretError
from kdrl_core.ledger import open_run

KEY = "sk-planted-in-a-block-1a2b3c"


def served(url: str, api_key: str) -> list[str]:
    fields = [f"urls={json.dumps([url])}", f"api_key={api_key}", "first_pause_s=0.01", "retry_for_s=5"]
    return [*TINY, "stage1=null", *(f"teacher.server.{field}" for field in fields)]


def test_the_key_reaches_the_server_and_nothing_else(artifacts: Path, caplog: pytest.LogCaptureFixture) -> None:
    Secret(value=KEY).save("teacher-key", overwrite=True)
    with faulty_server(ASSETS / "miniature" / "teacher", key=KEY) as server:
        server.faults.extend(["echo", "503"])
        full_pipeline(recipe="miniature", run_name="served", overrides=served(server.url, "block:teacher-key"))
        assert f"Bearer {KEY}" in server.seen_keys
    assert is_finished(open_run("served"))
    assert json.loads(open_run("served").paths.manifest.read_text())["served_teacher"]["model"]
    assert "tried again in" in caplog.text
    assert KEY not in caplog.text
    with get_client(sync_client=True) as client:
        shown = [*client.read_logs(), *client.read_artifacts(), *client.read_flow_runs(), *client.read_task_runs()]
    assert len(shown) > 20
    assert not any(KEY in item.model_dump_json() for item in shown)
    for root in (artifacts, Path(PREFECT_HOME.value())):
        files = [path for path in root.rglob("*") if path.is_file()]
        assert files
        assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_a_block_that_is_missing_is_told_before_any_work(artifacts: Path) -> None:
    with pytest.raises(SecretError, match="block:no-such: the Prefect server has no Secret block of that name"):
        full_pipeline(recipe="miniature", run_name="served", overrides=served("http://127.0.0.1:9/v1", "block:no-such"))
    assert not (artifacts / "runs").exists()
