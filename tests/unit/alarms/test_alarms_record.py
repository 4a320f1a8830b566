"""alarms.parquet is derived from the manifests of the steps; a stop holds until it is acknowledged."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from kdrl_core.alarms import (
    Alarm,
    alarms_of,
    load_alarms,
    require_not_stopped,
    resume_command,
    sentence,
    stopping_alarm,
    to_metadata,
)
from kdrl_core.config import load_recipe
from kdrl_core.errors import DamagedArtifactError, StoppedByAlarmError
from kdrl_core.ledger import Run, create_run, publish_file
from kdrl_core.tables.files import append_metrics, differing_metrics, load_metrics, rebuild_metrics


def alarm(step: int, rule: str = "reward_collapse", **changes: Any) -> Alarm:
    values = {
        "stage": "stage2",
        "step": step,
        "rule": rule,
        "severity": "critical",
        "metric": "reward/mean",
        "value": 0.1 + 0.2,
        "threshold": 0.35,
        "since": step - 2,
        "text": "it fell",
    }
    return Alarm(**{**values, **changes})


RAISED = {2: [alarm(2)], 4: [alarm(4), alarm(4, "timeouts", severity="warning")]}


@pytest.fixture
def run(artifacts: Path) -> Run:
    """Published updates of six steps; step 1's is from before there were alarms."""
    run = create_run("r", load_recipe("miniature", ["stage1=null", "alarms.reward_collapse.stop=true"]))
    for step in range(6):
        said = {} if step == 1 else {"alarms": to_metadata(RAISED.get(step, []))}
        publish_file(
            run.paths.update("stage2", step),
            lambda file: file.write_bytes(b"x") and None,
            metadata={"metrics": {"reward/mean": 0.5}, "timings": {"time/update_s": 1.0}, **said},
        )
    return run


def acknowledged(run: Run, step: int) -> Run:
    recipe = load_recipe(run.paths.recipe, [f"alarms.acknowledged.stage2={step}"])
    return create_run("r", recipe)


def test_alarms_come_back_as_they_were(run: Run) -> None:
    for step in range(6):
        append_metrics(run, "stage2", step)
    assert load_alarms(run, "stage2") == alarms_of(run) == [*RAISED[2], *RAISED[4]]
    table = pq.read_table(run.paths.alarms("stage2"), partitioning=None)
    assert table.num_rows == 3
    assert b"description" in table.schema.field("threshold").metadata


def test_a_stage_without_alarms_has_no_file(run: Run) -> None:
    append_metrics(run, "stage2", 0)
    append_metrics(run, "stage2", 1)
    assert not run.paths.alarms("stage2").exists()
    assert alarms_of(run) == []


@pytest.mark.parametrize("damage", ["lost", "torn", "a row too few"])
def test_the_file_is_named_and_rebuilt_as_it_was(run: Run, damage: str) -> None:
    rebuild_metrics(run, "stage2", num_steps=6)
    path = run.paths.alarms("stage2")
    before = path.read_bytes()
    if damage == "lost":
        path.unlink()
    elif damage == "torn":
        path.write_bytes(before[:-9])
        with pytest.raises(DamagedArtifactError, match=r"alarms\.parquet cannot be read"):
            load_alarms(run, "stage2")
    else:
        pq.write_table(pq.read_table(path, partitioning=None).slice(1), path)
    assert differing_metrics(run, "stage2", num_steps=6) == [path]
    rebuild_metrics(run, "stage2", num_steps=6)
    assert path.read_bytes() == before
    assert differing_metrics(run, "stage2", num_steps=6) == []


def test_a_file_that_should_not_be_there_goes(run: Run) -> None:
    rebuild_metrics(run, "stage2", num_steps=6)
    for step in (2, 4):
        run.paths.update("stage2", step).unlink()
        publish_file(
            run.paths.update("stage2", step),
            lambda file: file.write_bytes(b"y") and None,
            metadata={"metrics": {"reward/mean": 0.5}, "timings": {"time/update_s": 1.0}, "alarms": []},
        )
    rebuild_metrics(run, "stage2", num_steps=6)
    assert not run.paths.alarms("stage2").exists()


def test_an_alarm_whose_manifest_is_lost_is_kept(run: Run) -> None:
    rebuild_metrics(run, "stage2", num_steps=6)
    before = run.paths.alarms("stage2").read_bytes()
    run.paths.update("stage2", 2).with_name("_update.manifest.json").unlink()
    rebuild_metrics(run, "stage2", num_steps=6)
    assert run.paths.alarms("stage2").read_bytes() == before


def test_a_stop_holds_until_the_alarm_is_acknowledged(run: Run) -> None:
    rebuild_metrics(run, "stage2", num_steps=6)
    with pytest.raises(StoppedByAlarmError) as stopped:
        require_not_stopped(run, "stage2")
    message = str(stopped.value)
    assert message.startswith(
        "stopped by an alarm: stage2 step 4, reward_collapse (critical): it fell and 1 more before"
    )
    for part in (
        "value 0.3, threshold 0.35",
        "kdrl rollouts show r --stage stage2 --step 4",
        "kdrl resume r --set alarms.acknowledged.stage2=4",
        "kdrl resume r --set alarms.reward_collapse.stop=false",
    ):
        assert part in message
    assert resume_command(run) == "kdrl resume r --set alarms.acknowledged.stage2=4"
    assert stopping_alarm(acknowledged(run, 3)) == RAISED[4][0]
    heard = acknowledged(run, 4)
    require_not_stopped(heard, "stage2")
    assert resume_command(heard) == "kdrl resume r"
    assert len(alarms_of(heard)) == 3  # still on record


def test_a_rule_that_only_tells_stops_nothing(run: Run) -> None:
    rebuild_metrics(run, "stage2", num_steps=6)
    for change in ("alarms.reward_collapse.stop=false", "alarms.reward_collapse=null"):
        require_not_stopped(create_run("r", load_recipe(run.paths.recipe, [change])), "stage2")
    assert len(alarms_of(run)) == 3


def test_a_line_for_people() -> None:
    assert sentence(alarm(7)) == "stage2 step 7, reward_collapse (critical): it fell"
    assert alarm(7).commands("r") == [
        "kdrl rollouts stats r --stage stage2 --step 0-7 --all",
        "kdrl rollouts show r --stage stage2 --step 7",
    ]
    assert alarm(7, "of another version").advice == ""


def test_a_metric_of_some_steps_only_is_kept_and_is_no_damage(artifacts: Path) -> None:
    """A part that a reward function gives to some responses is a metric of the steps that have such a response."""
    run = create_run("r", load_recipe("miniature", ["stage1=null"]))
    for step, more in enumerate([{}, {"reward/mine.part/mean": 0.25}, {}]):
        publish_file(
            run.paths.update("stage2", step),
            lambda file: file.write_bytes(b"x") and None,
            metadata={"metrics": {"reward/mean": 0.5, **more}, "timings": {"time/update_s": 1.0}},
        )
        append_metrics(run, "stage2", step)
    assert pq.read_table(run.paths.metrics("stage2"), partitioning=None)["reward/mine.part/mean"].to_pylist() == [
        None,
        0.25,
        None,
    ]
    assert [row.get("reward/mine.part/mean") for row in load_metrics(run, "stage2")] == [None, 0.25, None]
    assert differing_metrics(run, "stage2", num_steps=3) == []
