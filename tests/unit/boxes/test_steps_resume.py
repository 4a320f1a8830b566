"""A run interrupted at any point and gone on with ends in the same bytes as one that was not."""

import shutil
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from crash.tiny_run import differing, finish, open_tiny, results, train, train_step

from kdrl_core.boxes import make as make_module
from kdrl_core.boxes import stage as stage_module
from kdrl_core.boxes.check import check_run
from kdrl_core.boxes.completion import is_finished
from kdrl_core.boxes.make import make
from kdrl_core.boxes.session import close_sessions, stage_session
from kdrl_core.boxes.stage import checkpoint_steps, latest_checkpoint, remaining_steps
from kdrl_core.boxes.step import rollout, score_step, update_step, verify
from kdrl_core.errors import RunError
from kdrl_core.ledger import Run, manifest_of, publish_file
from kdrl_core.ledger.manifest import manifest_path
from kdrl_core.tables.files import load_metrics, read_table, write_table

pytestmark = pytest.mark.usefixtures("fast_sessions")

SPARSE = ["stage2.checkpoint.every=3", "stage2.steps=7"]


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An undisturbed run that checkpoints every third step of stage 2."""
    run = open_tiny(tmp_path_factory.mktemp("sparse"), "undisturbed", SPARSE)
    train(run)
    return run


def test_two_runs_are_the_same_bytes(finished: Run, tmp_path: Path) -> None:
    again = open_tiny(tmp_path, "again")
    train(again)
    finish(again)
    assert len(results(finished)) > 30
    assert differing(finished, again) == []


def test_another_seed_is_another_run(sparse: Run, tmp_path: Path) -> None:
    other = open_tiny(tmp_path, "other", [*SPARSE, "seed=1"])
    train(other, until=("stage1", 1))
    name = other.paths.relative(other.paths.rollouts("stage1", 0))
    assert results(other)[name] != results(sparse)[name]


@pytest.mark.parametrize("until", [("stage1", 1), ("stage2", 0), ("stage2", 4), ("stage2", 5), ("stage2", 6)])
def test_steps_after_the_last_checkpoint_are_replayed(sparse: Run, tmp_path: Path, until: tuple[str, int]) -> None:
    run = open_tiny(tmp_path, "stopped", SPARSE)
    train(run, until=until)
    before = results(run)
    if until == ("stage2", 5):
        assert (latest_checkpoint(run, "stage2"), remaining_steps(run, "stage2")) == (3, range(3, 7))
    train(open_tiny(tmp_path, "stopped", SPARSE))
    assert differing(run, sparse) == []
    after = results(run)
    kept = [name for name in before if not name.startswith(("checkpoints/", "metrics/"))]
    assert {name: before[name] for name in kept} == {name: after[name] for name in kept}


def test_replayed_step_says_so_and_rewrites_nothing(tmp_path: Path) -> None:
    run = open_tiny(tmp_path, "r", SPARSE)
    train(run, until=("stage2", 2))
    path = run.paths.update("stage2", 1)
    before = path.stat().st_mtime_ns, load_metrics(run, "stage2")
    run = open_tiny(tmp_path, "r", SPARSE)
    session = stage_session(run.paths.root, "stage2")
    told = stage_module.step_facts(session, 2, {"loss/total": 1.0, "memory/peak_gib": 2.0}, {"time/update_s": 3.0})
    assert told["metrics"] == {"loss/total": 1.0}  # a replay compares them
    assert told["timings"] == {"time/update_s": 3.0, "memory/peak_gib": 2.0}
    for step in range(2):
        assert make(session, rollout, step).reused
        assert make(session, verify, step).reused
        assert all(artifact.reused for artifact in score_step(session, step))
        summary = update_step(session, step)
        assert summary.replayed
        assert summary.checkpoint is None
    assert (path.stat().st_mtime_ns, load_metrics(run, "stage2")) == before


def test_a_run_of_a_version_without_entropies_and_alarms_goes_on(sparse: Run, tmp_path: Path) -> None:
    run = open_tiny(tmp_path, "old", SPARSE)
    train(run, until=("stage2", 1))
    path = run.paths.update("stage2", 0)
    published, table = manifest_of(path), read_table(path).drop_columns(["entropies"])
    for file in (path, manifest_path(path), run.paths.alarms("stage2")):
        file.unlink(missing_ok=True)
    publish_file(
        path,
        lambda file: write_table(table, file),
        inputs=published.inputs,
        metadata={name: published.metadata[name] for name in ("metrics", "timings")},
    )
    train(open_tiny(tmp_path, "old", SPARSE))
    assert run.paths.relative(path) in differing(run, sparse)
    assert set(differing(run, sparse)) <= {run.paths.relative(path), run.paths.relative(run.paths.alarms("stage2"))}
    assert check_run(run).findings == []


OVERRIDES = ["stage1.steps=1", "stage2.checkpoint.every=2", "stage2.checkpoint.keep_last=1"]


class _Killed(BaseException):
    """In place of SIGKILL: nothing catches it."""


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[tuple[str, Path]]]:
    """An undisturbed run, and a copy of its folder after each single publication. Not to be changed."""
    taken: list[tuple[str, Path]] = []
    folder = tmp_path_factory.mktemp("snapshots")
    run = open_tiny(folder / "whole", "r", ["stage2.steps=3", *OVERRIDES])

    def noting(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @wraps(function)
        def wrapper(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            artifacts = folder / f"{len(taken):02d}"
            shutil.copytree(run.paths.root, artifacts / "runs" / "r")
            what = run.paths.relative(arguments[0]) if isinstance(arguments[0], Path) else name
            taken.append((what, artifacts))
            return result

        return wrapper

    with pytest.MonkeyPatch.context() as patched:
        for module in (make_module, stage_module):
            for name in ("publish_file", "publish_directory", "append_metrics", "prune_checkpoints"):
                if hasattr(module, name):
                    patched.setattr(module, name, noting(getattr(module, name), name))
        train(run)
    return run, taken


@pytest.mark.parametrize("first", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_crash_after_each_publication(
    first: int, snapshots: tuple[Run, list[tuple[str, Path]]], tmp_path: Path
) -> None:
    """Every second one, from the first or the second on: both halves take long."""
    whole, taken = snapshots
    assert len(taken) >= 25
    for what, artifacts in taken[first::2]:
        run = open_tiny(shutil.copytree(artifacts, tmp_path / artifacts.name), "r", ["stage2.steps=3", *OVERRIDES])
        train(run)
        assert [f for f in differing(run, whole) if not _is_superseded(f)] == [], f"after {what}"


def _is_superseded(name: str) -> bool:
    """A checkpoint that retention would have deleted next."""
    return name.startswith("checkpoints/stage2/step-000002/")


def test_crash_before_each_manifest(snapshots: tuple[Run, list[tuple[str, Path]]], tmp_path: Path) -> None:
    """The file is there, torn, its manifest not yet: it does not count and is made anew."""
    whole, taken = snapshots
    for what, artifacts in taken:
        if not what.endswith(".parquet") or "stage2" not in what:
            continue
        run = open_tiny(shutil.copytree(artifacts, tmp_path / artifacts.name), "r", ["stage2.steps=3", *OVERRIDES])
        file = run.paths.root / what
        file.with_name(f"_{file.stem}.manifest.json").unlink()
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        train(run)
        assert [f for f in differing(run, whole) if not _is_superseded(f)] == [], f"within {what}"


def test_crash_while_old_checkpoints_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_tiny(tmp_path, "r", ["stage1.steps=5", "stage1.checkpoint.keep_last=1"])

    def killed(path: Path) -> None:
        raise _Killed

    with monkeypatch.context() as patched:
        patched.setattr("kdrl_core.ledger.heal.shutil.rmtree", killed)
        with pytest.raises(_Killed):
            train(run)
    (half_deleted,) = run.paths.checkpoint("stage1", 1).parent.glob(".tmp-step-000001-*")
    assert (half_deleted / "model.safetensors").is_file()
    train(open_tiny(tmp_path, "r", ["stage1.steps=5", "stage1.checkpoint.keep_last=1"]))
    assert not half_deleted.exists()
    assert not list(run.paths.root.rglob(".damaged-*"))


def test_what_is_no_checkpoint_is_left_alone(tmp_path: Path) -> None:
    run = open_tiny(tmp_path, "r", ["stage1.steps=5", "stage1.checkpoint.keep_last=1"])
    folder = run.paths.checkpoint("stage1", 1).parent
    (folder / "step-000001.bak").mkdir(parents=True)
    (folder / "step-notes.txt").write_text("mine")
    train(run)
    assert (folder / "step-000001.bak").is_dir()
    assert (folder / "step-notes.txt").read_text() == "mine"


def test_more_steps_go_on_where_the_run_ended(tmp_path: Path, sparse: Run) -> None:
    run = open_tiny(tmp_path, "r", ["stage2.steps=3"])
    train(run)
    finish(run)
    assert is_finished(run)
    run = open_tiny(tmp_path, "r", ["stage2.steps=7"])
    assert not is_finished(run)
    assert remaining_steps(run, "stage2") == range(3, 7)
    train(run)
    ours, theirs = results(run), results(sparse)
    assert [n for n in theirs if n.startswith("rollouts/") and ours[n] != theirs[n]] == []
    assert [n for n in theirs if "step-000007" in n and ours[n] != theirs[n]] == []
    finish(run)
    assert is_finished(run)


def test_other_changes_of_the_recipe_are_refused(tmp_path: Path) -> None:
    open_tiny(tmp_path, "r")
    for change in ("stage2.steps=3", "stage1.steps=3", "stage2.learning_rate=1e-5"):
        with pytest.raises(RunError, match=r"started with another recipe: stage.\."):
            open_tiny(tmp_path, "r", [change])


def test_memory_ahead_of_the_files_is_refused(tmp_path: Path) -> None:
    run = open_tiny(tmp_path, "r")
    train(run, until=("stage1", 1))
    session = stage_session(run.paths.root, "stage1")
    with pytest.raises(RunError, match=r"stage1 is at step 1, but step 0 was asked for; .*kdrl resume r"):
        update_step(session, 0)


def test_stage_two_waits_for_stage_one(tmp_path: Path) -> None:
    run = open_tiny(tmp_path, "r")
    train(run, until=("stage1", 1))
    with pytest.raises(RunError, match="stage2 starts from the result of stage1, which is not finished"):
        stage_session(run.paths.root, "stage2")


def test_unscored_step_is_not_trained_on(tmp_path: Path) -> None:
    """A teacher file that was never published does not count, though it can be read."""
    run = open_tiny(tmp_path, "r", ["stage1=null"])
    train(run, until=("stage2", 0))
    session = stage_session(run.paths.root, "stage2")
    make(session, rollout, 0)
    make(session, verify, 0)
    score_step(session, 0)
    (run.paths.step("stage2", 0) / "_teacher.manifest.json").unlink()
    with pytest.raises(RunError, match=r"teacher\.parquet is not published"):
        update_step(session, 0)


def test_sessions_close_without_a_trace(tmp_path: Path) -> None:
    run = open_tiny(tmp_path, "r", SPARSE)
    train(run, until=("stage2", 2))
    session = stage_session(run.paths.root, "stage2")
    for step in range(2):
        train_step(run, "stage2", step)
    session.sampler_at(2, [])
    assert list(run.paths.scratch.glob("policy-*"))
    close_sessions()
    assert not run.paths.scratch.exists()
    assert checkpoint_steps(run, "stage2") == []
