"""A disk that is full, or read-only, in each phase of a run: told, nothing half-written, and the run goes on."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crash.tiny_run import differing, finish, open_tiny, train
from support import small_disk

from kdrl_core.boxes.completion import student
from kdrl_core.boxes.evaluate import evaluate_model
from kdrl_core.boxes.filter import filter_run
from kdrl_core.boxes.make import make
from kdrl_core.boxes.session import StageSession, close_sessions, stage_session
from kdrl_core.boxes.stage import open_stage
from kdrl_core.boxes.step import rollout, score_step, update_step, verify
from kdrl_core.errors import StorageError
from kdrl_core.ledger import Run, is_published, open_run, run_lock, verify_published
from kdrl_core.ledger.graph import evaluated_labels
from kdrl_core.look.reporting.run_report import report

pytestmark = pytest.mark.usefixtures("fast_sessions")

ONE_STAGE = ["stage1=null", "stage2.steps=1"]
_BELOW_A_CHECKPOINT = 200_000
"""Bytes left on the disk: enough for a step's tables, too little for a checkpoint of 0.9 MB."""

_BEFORE_A_CHECKPOINT = {"update.parquet", "_update.manifest.json"} | {
    f"{name}.parquet" for name in ("metrics", "timings", "alarms")
}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 96 MiB, of its own."""
    with small_disk(tmp_path / "disk", mib=96) as folder:
        yield folder
        close_sessions()


def fill(disk: Path, *, leave: int = 0) -> Path:
    """Fill the disk but for `leave` bytes; the file to delete afterwards."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (2**20, 2**12):
            try:
                while shutil.disk_usage(disk).free >= leave + size:
                    file.write(b"\0" * size)
            except OSError:
                continue
    return ballast


def published(run: Run) -> set[str]:
    """Everything that readers of the run would see."""
    hidden = (".scratch", ".tmp-", ".damaged-")
    names = (path.relative_to(run.paths.root).as_posix() for path in run.paths.root.rglob("*") if path.is_file())
    return {name for name in names if not any(part.startswith(hidden) for part in name.split("/"))}


def test_a_disk_that_is_full_in_any_phase(disk: Path, tmp_path: Path) -> None:
    whole = open_tiny(tmp_path / "whole", "r", ONE_STAGE)
    train(whole)
    finish(whole)
    run = open_tiny(disk, "r", ONE_STAGE)

    def step(do: Callable[[StageSession, int], object]) -> Callable[[], object]:
        return lambda: do(stage_session(run.paths.root, "stage2"), 0)

    phases: list[tuple[str, Path, Callable[[], object], int]] = [
        ("filter", run.paths.pool, lambda: filter_run(run), 0),
        ("rollout", run.paths.rollouts("stage2", 0), step(lambda session, at: make(session, rollout, at)), 0),
        ("teacher-score", run.paths.teacher("stage2", 0), step(score_step), 0),
        ("verify", run.paths.rewards("stage2", 0), step(lambda session, at: make(session, verify, at)), 0),
        ("update", run.paths.update("stage2", 0), step(update_step), 0),
        ("checkpoint", run.paths.checkpoint("stage2", 1), step(update_step), _BELOW_A_CHECKPOINT),
        ("evaluate", run.paths.evaluation("stage2"), lambda: evaluate_model(run, "stage2"), 0),
        ("student", run.paths.student, lambda: make(run, student), _BELOW_A_CHECKPOINT),
    ]
    for phase, path, do, leave in phases:
        before = published(run)
        ballast = fill(disk, leave=leave)
        with pytest.raises(StorageError, match="no disk space; free some, then run it again or resume the run") as told:
            do()
        assert path.name in str(told.value), phase
        assert not is_published(path), phase
        ballast.unlink()
        surplus = published(run) - before
        assert {Path(name).name for name in surplus} <= _BEFORE_A_CHECKPOINT, phase
        close_sessions()  # as the process that failed
        if phase != "update":
            open_stage(run, "stage2")
            do()
            verify_published(path)
    for label in evaluated_labels(run.recipe):
        evaluate_model(run, label)
    fill(disk, leave=50_000)
    with pytest.raises(StorageError, match=r"report: no disk space"):
        make(run, report)
    assert not run.paths.report.exists()
    (disk / "ballast").unlink()
    finish(run)
    assert differing(run, whole) == []


def test_a_full_disk_is_told_before_a_run_is_opened_or_resumed(disk: Path) -> None:
    run = open_tiny(disk, "r", ONE_STAGE)
    fill(disk)
    with pytest.raises(StorageError, match="no disk space"):
        open_tiny(disk, "r", ONE_STAGE)
    with pytest.raises(StorageError, match="no disk space"), run_lock(run.paths.lock):
        pass
    assert open_run("r", artifacts=disk).recipe == run.recipe


def test_a_disk_that_became_read_only(disk: Path) -> None:
    run = open_tiny(disk, "r", ONE_STAGE)
    train(run, until=("stage2", 0))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(StorageError, match="cannot be written; change its permissions or set KDRL_ARTIFACTS"):
        open_tiny(disk, "r", ONE_STAGE)
    with pytest.raises(StorageError, match="cannot be written"), run_lock(run.paths.lock):
        pass
    with pytest.raises(StorageError, match=r"rollouts\.parquet: the folder cannot be written"):
        make(stage_session(run.paths.root, "stage2"), rollout, 0)
    assert open_run("r", artifacts=disk).recipe == run.recipe  # looking on is still possible
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    train(run)
