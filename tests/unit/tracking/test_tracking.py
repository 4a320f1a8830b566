"""Runs in TensorBoard, MLflow and W&B: what their own readers find, after a kill, a fault, or a late start as well."""

import json
import logging
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from crash.tiny_run import finish, open_tiny, train
from support import KeptVerifier

from kdrl_core.boxes import preflight
from kdrl_core.boxes.preflight import check_trackers
from kdrl_core.config import Recipe, TrackerName, TrackingConfig, load_recipe
from kdrl_core.config.changes import unsafe_changes
from kdrl_core.config.load import config_hash
from kdrl_core.errors import RecipeError
from kdrl_core.evaluation.results import read_results
from kdrl_core.ledger import Run, checkpoint_label, open_run
from kdrl_core.ledger.graph import evaluated_labels
from kdrl_core.look.tracking import clients, close_tracking, track
from kdrl_core.tables.files import load_metrics, read_table, write_table

ALL: tuple[TrackerName, ...] = ("tensorboard", "mlflow", "wandb")
Points = dict[str, list[tuple[int, float]]]
"""Name → step and value, as they were sent."""

for package in ("tensorboard", "mlflow", "wandb"):
    pytest.importorskip(package, reason=f"needs {package}: pip install -e '.[tracking]'")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, kept_verifier: KeptVerifier) -> Run:
    """A finished tiny run. Not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        kept_verifier.share(patch)
        run = open_tiny(tmp_path_factory.mktemp("tracking"), "tracked")
        train(run)
        finish(run)
    return run


@pytest.fixture(scope="module")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database without runs, which takes seconds to make."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def artifacts_of(trained: Run, empty_mlflow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    artifacts = tmp_path / "artifacts"
    shutil.copytree(trained.paths.root, artifacts / "runs" / trained.name)
    (artifacts / "tracking").mkdir()
    shutil.copy(empty_mlflow, artifacts / "tracking")
    monkeypatch.setenv("KDRL_ARTIFACTS", str(artifacts))
    yield artifacts
    close_tracking()


def _tracked(artifacts: Path, *names: TrackerName, **fields: Any) -> Run:
    run = open_run("tracked", artifacts=artifacts)
    config = TrackingConfig(trackers=list(names), **fields)
    return replace(run, recipe=run.recipe.model_copy(update={"tracking": config}))


def _cut(run: Run, stage: str, rows: int) -> None:
    """Have the stage end after `rows` steps, as the files of a run do that goes on."""
    for path in (run.paths.metrics(stage), run.paths.timings(stage)):
        write_table(read_table(path).slice(0, rows), path)


def _restore(run: Run, trained: Run) -> None:
    for stage in run.recipe.stages:
        shutil.copytree(trained.paths.metrics(stage).parent, run.paths.metrics(stage).parent, dirs_exist_ok=True)


def _found(name: TrackerName, run: Run) -> Points:
    return {"tensorboard": _in_tensorboard, "mlflow": _in_mlflow, "wandb": _in_wandb}[name](run)


def _in_tensorboard(run: Run) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    points: Points = {}
    for folder in (run.paths.tracking / "tensorboard").iterdir():
        read = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        for tag in read.Tags()["scalars"]:
            points[f"{folder.name}/{tag}"] = [(event.step, event.value) for event in read.Scalars(tag)]
    return points


def _in_mlflow(run: Run) -> Points:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run.paths.root.parent.parent / 'tracking' / 'mlflow.db'}")
    run_id = json.loads((run.paths.tracking / "mlflow.json").read_text())["identity"]
    names = client.get_run(run_id).data.metrics
    return {name: [(m.step, m.value) for m in client.get_metric_history(run_id, name)] for name in names}


def _in_wandb(run: Run) -> Points:
    """What `wandb sync` would send: the rows of every offline part; of two of one step the later counts."""
    from wandb.proto import wandb_internal_pb2

    rows: dict[int, dict[str, float]] = {}
    summary: dict[str, float] = {}
    for path in sorted((run.paths.tracking / "wandb").glob("offline-run-*/*.wandb")):
        for data in _log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                rows.setdefault(record.history.step.num, {}).update(_items(record.history.item))
            if record.WhichOneof("record_type") == "summary":
                summary |= _items(record.summary.update)
    points: Points = {}
    for _, row in sorted(rows.items()):
        for name, value in row.items():
            stage = name.split("/")[0]
            if not name.startswith("_") and not name.endswith("/step"):
                points.setdefault(name, []).append((int(row[f"{stage}/step"]), value))
    return points | {name: [(0, value)] for name, value in summary.items() if name.startswith("summary/")}


def _items(items: Any) -> dict[str, float]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _log_records(content: bytes) -> Iterator[bytes]:
    """Records of a .wandb file: 7 bytes, then LevelDB's log format (blocks of 32 KiB; checksum, length, type, data)."""
    assert content[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(content):
        if (left := 32_768 - position % 32_768) < 7:
            position += left
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


def _require_whole(name: TrackerName, run: Run) -> None:
    """Every step of every stage once, in order, with the numbers of metrics.parquet; periodic and final evaluations."""
    found = _found(name, run)
    for stage in run.recipe.stages:
        rows = load_metrics(run, stage)
        for metric in ("reward/mean", "optim/grad_norm", "time/update_s"):
            expected = [(row["step"], pytest.approx(row[metric], rel=1e-6)) for row in rows]
            assert found[f"{stage}/{metric}"] == expected, (name, stage, metric)
    for label in evaluated_labels(run.recipe):
        for benchmark, one in read_results(run.paths.evaluation(label))["benchmarks"].items():
            (point,) = found[f"summary/{label}/{benchmark}"]
            assert point == (0, pytest.approx(one["accuracy"], rel=1e-6))


@pytest.mark.parametrize("name", ALL)
def test_a_finished_run_is_sent_whole_and_once(name: TrackerName, artifacts_of: Path) -> None:
    run = _tracked(artifacts_of, name)
    track(run)
    track(run)
    close_tracking()
    track(run)  # a process that finds nothing to send does not open the tracker
    _require_whole(name, run)


@pytest.mark.parametrize("name", ALL)
def test_a_killed_run_goes_on_in_the_same_tracked_run(name: TrackerName, artifacts_of: Path, trained: Run) -> None:
    run = _tracked(artifacts_of, name)
    last = run.recipe.stages[-1]
    shutil.rmtree(run.paths.root / "evaluation")
    _cut(run, last, 1)
    track(run)
    noted = (run.paths.tracking / f"{name}.json").read_bytes()
    _restore(run, trained)
    track(run)
    # Killed between sending and noting: what was sent is sent again by the next process.
    close_tracking()
    (run.paths.tracking / f"{name}.json").write_bytes(noted)
    shutil.copytree(trained.paths.root / "evaluation", run.paths.root / "evaluation")
    track(run)
    close_tracking()
    _require_whole(name, run)
    identities = {"wandb": 1, "mlflow": 1, "tensorboard": 0}
    assert bool(json.loads((run.paths.tracking / f"{name}.json").read_text())["identity"]) == bool(identities[name])


KILLED = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from kdrl_core.config import TrackingConfig
from kdrl_core.ledger import open_run
from kdrl_core.look.tracking import track
run = open_run("tracked", artifacts=Path(sys.argv[1]))
track(replace(run, recipe=run.recipe.model_copy(update={"tracking": TrackingConfig(trackers=[sys.argv[2]])})))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("name", ALL)
def test_what_a_process_sent_before_its_sigkill_is_there_or_sent_again(
    name: TrackerName, artifacts_of: Path, trained: Run
) -> None:
    run = _tracked(artifacts_of, name)
    shutil.rmtree(run.paths.root / "evaluation")
    _cut(run, run.recipe.stages[-1], 2)
    # W&B's service is one for a process and its children; a program of its own has one of its own.
    own = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    done = subprocess.run([sys.executable, "-c", KILLED, str(artifacts_of), name], check=False, timeout=120, env=own)
    assert done.returncode == -signal.SIGKILL
    time.sleep(1.1)  # TensorBoard reads event files in the order of their names, by second and process
    _restore(run, trained)
    shutil.copytree(trained.paths.root / "evaluation", run.paths.root / "evaluation")
    track(run)
    close_tracking()
    _require_whole(name, run)


@pytest.mark.parametrize("name", ALL)
def test_final_evaluations_of_two_processes_are_all_there(name: TrackerName, artifacts_of: Path) -> None:
    run = _tracked(artifacts_of, name)
    for label in ("stage2", "teacher"):
        shutil.move(run.paths.evaluation(label), artifacts_of / label)
    track(run)
    close_tracking()
    for label in ("stage2", "teacher"):
        shutil.move(artifacts_of / label, run.paths.evaluation(label))
    track(run)
    close_tracking()
    _require_whole(name, run)


def test_mlflow_has_the_recipe_and_says_how_the_run_ended(artifacts_of: Path, trained: Run) -> None:
    from mlflow import MlflowClient

    run = _tracked(artifacts_of, "mlflow", project="mine")
    shutil.move(run.paths.evaluation("teacher"), artifacts_of / "teacher")
    track(run)
    client = MlflowClient(f"sqlite:///{artifacts_of / 'tracking' / 'mlflow.db'}")
    run_id = json.loads((run.paths.tracking / "mlflow.json").read_text())["identity"]
    assert client.get_run(run_id).info.status == "RUNNING"
    close_tracking()
    assert client.get_run(run_id).info.status == "KILLED"
    shutil.move(artifacts_of / "teacher", run.paths.evaluation("teacher"))
    track(run)
    close_tracking()
    found = client.get_run(run_id)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "tracked")
    assert found.data.params["stage2.objective"] == "kdrl"
    assert client.get_experiment(found.info.experiment_id).name == "mine"


class Faulty:
    """A tracker whose second point fails until it is mended."""

    run_id = "x"

    def __init__(self) -> None:
        self.sent: list[tuple[str, int]] = []
        self.is_broken = True

    def log(self, point: Any) -> None:
        if self.is_broken and self.sent:
            raise ConnectionError("no route to\nhost")
        self.sent.append((point.group, point.step))

    def summarize(self, values: Any, time_ms: int) -> None:
        pass

    def flush(self) -> bool:
        return True

    def close(self, *, complete: bool) -> None:
        raise ConnectionError("gone")


def test_a_tracker_that_fails_is_one_warning_and_catches_up(
    artifacts_of: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    faulty = Faulty()
    monkeypatch.setitem(clients.CLIENTS, "mlflow", lambda run, sent: faulty)
    run = _tracked(artifacts_of, "mlflow")
    with caplog.at_level(logging.WARNING, "kdrl"):
        for _ in range(3):
            track(run)
    (record,) = (record for record in caplog.records if record.name == "kdrl" and record.levelno >= logging.WARNING)
    assert "mlflow: no route to host (ConnectionError); training goes on" in record.getMessage()
    faulty.is_broken = False
    track(run)
    steps = {stage: list(range(run.recipe.stage(stage).steps)) for stage in run.recipe.stages}
    for stage, expected in steps.items():
        assert sorted({step for group, step in faulty.sent if group == stage}) == expected
    close_tracking()
    assert "gone (ConnectionError) at its end" in caplog.text


@pytest.mark.parametrize("name", ALL)
def test_a_client_that_broke_is_opened_anew(
    name: TrackerName, artifacts_of: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trackers = {
        "tensorboard": clients.TensorBoardTracker,
        "mlflow": clients.MLflowTracker,
        "wandb": clients.WandbTracker,
    }
    tracker: Any = trackers[name]
    log, broken, faults = tracker.log, set(), iter([2])

    def failing(self: Any, point: Any) -> None:
        if point.step == 2 and next(faults, None) is not None:
            broken.add(id(self))
        if id(self) in broken:  # as a writer does whose thread has ended
            raise OSError(28, "no space left")
        log(self, point)

    monkeypatch.setattr(tracker, "log", failing)
    run = _tracked(artifacts_of, name)
    for _ in range(3):
        track(run)
    close_tracking()
    assert broken
    _require_whole(name, run)


def test_a_fault_between_making_and_noting_leaves_one_run_in_mlflow(
    artifacts_of: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    run, faults, log = _tracked(artifacts_of, "mlflow"), iter(range(3)), MlflowClient.log_batch

    def failing(*arguments: Any, **named: Any) -> Any:
        if next(faults, None) is not None:
            raise ConnectionError
        return log(*arguments, **named)

    monkeypatch.setattr(MlflowClient, "log_batch", failing)
    for _ in range(4):
        track(run)
    close_tracking()
    client = MlflowClient(f"sqlite:///{artifacts_of / 'tracking' / 'mlflow.db'}")
    experiments = [one.experiment_id for one in client.search_experiments()]
    assert len(client.search_runs(experiments)) == 1
    _require_whole("mlflow", run)


def test_evaluations_of_an_earlier_rhythm_are_sent_as_well(artifacts_of: Path) -> None:
    run = _tracked(artifacts_of, "mlflow")
    label = checkpoint_label("stage2", 3)
    shutil.copytree(run.paths.evaluation("stage2"), run.paths.evaluation(label))
    track(run)
    close_tracking()
    assert [step for step, _ in _found("mlflow", run)["stage2/evaluation/test"]].count(2) == 1


def test_tracking_is_off_by_default_and_changes_no_run() -> None:
    recipe = load_recipe("miniature")
    tracked = load_recipe("miniature", ["tracking.trackers=[tensorboard]"])
    assert recipe.tracking.trackers == []
    assert unsafe_changes(recipe, tracked) == []
    explicit = Recipe.model_validate_json(json.dumps({**recipe.model_dump(mode="json"), "tracking": {"trackers": []}}))
    assert config_hash(explicit) == config_hash(recipe)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tracking.trackers=[comet]", "tensorboard"),
        ("tracking.trackers=[wandb, wandb]", "a tracker stands twice"),
        ("tracking.mlflow_uri=https://me:key@host", "carries a user or a password"),
    ],
)
def test_bad_input(override: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as error:
        load_recipe("miniature", [override])
    assert "key@host" not in str(error.value)


def test_a_missing_package_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    words = "'tracking.trackers': wandb is not installed; run pip install wandb"
    with pytest.raises(RecipeError, match=re.escape(words)):
        check_trackers(load_recipe("miniature", ["tracking.trackers=[wandb, tensorboard]"]))


def test_points_are_floats(artifacts_of: Path) -> None:
    """Columns that are no numbers are left out, and so are nulls."""
    run = _tracked(artifacts_of, "tensorboard")
    path = run.paths.metrics("stage2")
    table = read_table(path)
    table = table.append_column("note", pa.array(["text"] * len(table))).append_column("none", pa.nulls(len(table)))
    write_table(table, path)
    track(run)
    close_tracking()
    assert not {"stage2/note", "stage2/none"} & set(_found("tensorboard", run))
