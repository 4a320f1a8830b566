"""A seeded collapse through the real Prefect API: what an alarm leaves there; a stop that goes on to the same bytes."""

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest
from crash.tiny_run import differing, results
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.settings import PREFECT_API_URL
from rich.console import Console
from support import TINY
from typer.testing import CliRunner

from flows.alarms import event_id
from flows.cli import app
from flows.cli.watch import RunView
from flows.full_pipeline import full_pipeline
from kdrl_core.alarms import alarms_of
from kdrl_core.boxes.check import check_run
from kdrl_core.boxes.completion import is_finished
from kdrl_core.errors import StoppedByAlarmError
from kdrl_core.ledger import Run, RunPaths, is_published, open_run

SEEDED = [
    *(one for one in TINY if one.startswith("stage2.")),
    "stage1=null",
    "stage2.steps=4",
    "stage2.checkpoint.every=4",  # the last step's alone: what is gone on with is replayed
    "stage2.evaluate_every=null",
    "stage2.warmup_steps=0",
    "stage2.learning_rate=0.05",  # the failure: the first update destroys the policy
    "evaluation={benchmarks: [{name: test, file: 'builtin:miniature/benchmarks/test.jsonl', max_problems: 4}], "
    "temperature: 1.0, max_context_tokens: 96}",
    "alarms.reward_collapse.window=1",
    "alarms.reward_collapse.patience=2",
    *(f"alarms.{rule}=null" for rule in ("clip_ratio", "repetition")),
]
STOP = "alarms.reward_collapse.stop=true"
_PATIENCE_S = 20.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="module")
def told(folder: Path) -> Run:
    """A run that raises alarms and goes on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDRL_ARTIFACTS", str(folder))
        full_pipeline(recipe="miniature", run_name="told", overrides=SEEDED)
    return open_run("told", artifacts=folder)


def events(run: Run, expected: int) -> list[dict[str, Any]]:
    """The events of a run's alarms that the server has; it takes them in a moment after they were sent."""
    asked = {"event": {"prefix": ["kdrl.alarm."]}, "resource": {"id": [f"kdrl.run.{run.name}"]}}
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        answer = httpx.post(f"{PREFECT_API_URL.value()}/events/filter", json={"filter": asked}, timeout=_PATIENCE_S)
        found: list[dict[str, Any]] = answer.raise_for_status().json()["events"]
        if len(found) >= expected or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def markdown(key: str) -> list[str]:
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))
    return [str(artifact.data) for artifact in found]


def status(*arguments: str) -> Any:
    done = CliRunner().invoke(app, ["status", *arguments])
    assert done.exit_code == 0, done.output
    return json.loads(done.output) if "--json" in arguments else done.output


def test_the_run_goes_on_and_keeps_the_alarm(told: Run) -> None:
    assert is_finished(told, verify=True)
    assert [(alarm.stage, alarm.step, alarm.since, alarm.rule) for alarm in alarms_of(told)] == [
        ("stage2", 2, 1, "reward_collapse")
    ]
    assert check_run(told).findings == []


def test_an_alarm_is_an_event(told: Run) -> None:
    (alarm,) = alarms_of(told)
    (event,) = events(told, 1)
    assert event["id"] == str(event_id(told, alarm))
    assert event["event"] == "kdrl.alarm.reward_collapse"
    assert event["resource"]["prefect.resource.id"] == "kdrl.run.told"
    assert event["resource"]["kdrl.severity"] == "critical"
    payload = event["payload"]
    assert (payload["run"], payload["stage"], payload["step"], payload["stops"]) == ("told", "stage2", 2, False)
    assert (payload["value"], payload["threshold"]) == (alarm.value, alarm.threshold)
    flow_runs = [r["prefect.resource.name"] for r in event["related"] if r["prefect.resource.role"] == "flow-run"]
    assert flow_runs == ["told-stage2"]


def test_an_alarm_is_an_artifact(told: Run) -> None:
    (text,) = markdown("told-stage2-alarm-reward-collapse")
    assert text.startswith("# critical: reward_collapse")
    assert "kdrl rollouts show told --stage stage2 --step 2" in text
    assert "| step | reward/mean |" in text
    assert "The stage stops here" not in text


def test_an_alarm_is_in_status_and_report(told: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDRL_ARTIFACTS", str(folder))
    (alarm,) = alarms_of(told)
    assert status("told", "--json")["alarms"] == [asdict(alarm)]
    assert next(row for row in status("--json") if row["run"] == "told")["alarms"] == [asdict(alarm)]
    assert "1, 1 critical" in status()
    shown = status("told")
    assert f"alarm  stage2 step 2, reward_collapse (critical): {alarm.text}" in shown
    assert "look at it: kdrl rollouts show told --stage stage2 --step 2" in shown
    for name in ("report.html", "report.md"):
        assert alarm.text in (told.paths.report / name).read_text(encoding="utf-8")


def test_an_alarm_is_shown_while_a_run_is_watched(told: Run, tmp_path: Path) -> None:
    paths = RunPaths(Path(shutil.copytree(told.paths.root, tmp_path / "runs" / "told")))
    raised = paths.alarms("stage2").read_bytes()
    paths.alarms("stage2").unlink()
    view, console = RunView(paths), Console(record=True, width=400)
    view.refresh()
    assert view.new_alarms() == []
    paths.alarms("stage2").write_bytes(raised)
    console.print(view.render(1.0))
    assert "alarm  stage2 step 2, reward_collapse (critical): reward/mean fell" in console.export_text()
    assert [alarm.rule for alarm in view.new_alarms()] == ["reward_collapse"]
    assert view.new_alarms() == []


def test_a_stop_fails_the_flow_holds_and_goes_on_to_the_same_bytes(
    told: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDRL_ARTIFACTS", str(folder))
    with pytest.raises(StoppedByAlarmError, match=r"stage2 step 2, reward_collapse .*acknowledged\.stage2=2"):
        full_pipeline(recipe="miniature", run_name="stopped", overrides=[*SEEDED, STOP])
    run = open_run("stopped")
    assert [step for step in range(4) if is_published(run.paths.update("stage2", step))] == [0, 1, 2]
    assert "The stage stops here." in markdown("stopped-stage2-alarm-reward-collapse")[-1]
    way_on = "kdrl resume stopped --set alarms.acknowledged.stage2=2"
    assert status("stopped", "--json")["state"] == f"stopped by reward_collapse; {way_on}"
    assert any("**stopped-stage2** failed" in text and way_on in text for text in markdown("kdrl-failure"))

    before = results(run)  # a retry of the flow, or a resume without a word
    with pytest.raises(StoppedByAlarmError):
        full_pipeline(recipe="miniature", run_name="stopped", overrides=[*SEEDED, STOP])
    assert results(run) == before
    assert len(events(run, 1)) == 1  # told again, under the same id

    full_pipeline(recipe="miniature", run_name="stopped", overrides=[*SEEDED, STOP, "alarms.acknowledged.stage2=2"])
    assert is_finished(open_run("stopped"), verify=True)
    assert differing(open_run("stopped"), told) == []
    assert "metrics/stage=stage2/alarms.parquet" in results(told)
    history = json.loads(run.paths.manifest.read_text())["history"]
    assert history[-1]["changes"] == ["alarms.acknowledged.stage2: None → 2"]
