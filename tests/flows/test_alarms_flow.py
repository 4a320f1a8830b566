"""Alarms of a real run through a real Prefect server: what they set off, and a stage that stops and goes on."""

import json
import time
from pathlib import Path
from statistics import fmean

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from support import TINY
from typer.testing import CliRunner

from flows.cli import app
from flows.full_pipeline import full_pipeline
from kdrl_core.errors import AlarmError
from kdrl_core.ledger import open_run
from kdrl_core.rollouts.metrics import load_metrics
from kdrl_core.steps.completion import is_finished

CUT_SHORT = ["stage2.max_response_tokens=4", "alarms.clip_ratio.threshold=0.1", "alarms.clip_ratio.window=2"]
"""Nearly every response of stage 2 is cut, so that the rule's mean of two steps is above its threshold at step 1."""
STOPPING = [*TINY, *CUT_SHORT, "alarms.clip_ratio.stop=true"]


def _artifact(key: str) -> str:
    with get_client(sync_client=True) as client:
        (found,) = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))
    return str(found.data)


def _events(name: str) -> list[dict[str, object]]:
    """Events of this name that the server has; it gets them a moment after they were sent."""
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        with get_client(sync_client=True) as client:
            found = client._client.post("/events/filter", json={"filter": {"event": {"name": [name]}}}).json()["events"]
        if found:
            return list(found)
        time.sleep(0.5)
    return []


def test_an_alarm_stops_the_stage_and_the_run_goes_on(artifacts: Path) -> None:
    with pytest.raises(AlarmError) as error:
        full_pipeline(recipe="miniature", run_name="cut", overrides=STOPPING)
    for words in (
        "cut stage2 step 1: alarm clip_ratio: response/clip_ratio is 0.9",
        "`kdrl resume cut`",
        "--stage stage2",
    ):
        assert words in str(error.value)
    run = open_run("cut")
    rows = load_metrics(run, "stage2")
    assert [row["step"] for row in rows] == [0, 1]  # the step that raised it is kept
    measured = fmean(row["response/clip_ratio"] for row in rows)

    assert "kdrl rollouts show cut --stage stage2 --step 1 --finish length" in _artifact("cut-alarm-clip-ratio")
    (event,) = _events("kdrl.alarm.clip_ratio")
    assert event["resource"] == {"prefect.resource.id": "kdrl.run.cut", "prefect.resource.name": "cut"}
    payload = event["payload"]
    assert isinstance(payload, dict)
    assert (payload["run"], payload["stage"], payload["step"]) == ("cut", "stage2", 1)
    assert payload["value"] == pytest.approx(measured)

    status = CliRunner().invoke(app, ["status", "cut", "--json"])
    (alarm,) = json.loads(status.stdout)["alarms"]
    assert (alarm["rule"], alarm["step"], alarm["stop"]) == ("clip_ratio", 1, True)
    assert "clip_ratio" in CliRunner().invoke(app, ["status", "cut"]).stdout

    # The condition still holds at step 2, but it is no new alarm: the run ends as one without the rule does.
    full_pipeline(recipe="miniature", run_name="cut", overrides=STOPPING)
    assert is_finished(open_run("cut"))
    full_pipeline(recipe="miniature", run_name="free", overrides=[*TINY, *CUT_SHORT])
    assert open_run("free").paths.metrics("stage2").read_bytes() == run.paths.metrics("stage2").read_bytes()
    assert "response/clip_ratio is 0.9" in (run.paths.report / "report.md").read_text()
