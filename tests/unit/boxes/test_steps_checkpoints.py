"""Which checkpoints are due, which are kept, where a stage goes on."""

from pathlib import Path

import pytest
from crash.tiny_run import open_tiny

from kdrl_core.boxes.stage import (
    checkpoint_steps,
    is_checkpoint_due,
    latest_checkpoint,
    prune_checkpoints,
    remaining_steps,
)
from kdrl_core.errors import RunError
from kdrl_core.ledger import Run, publish_directory


def publish(run: Run, step: int, stage: str = "stage2") -> None:
    publish_directory(run.paths.checkpoint(stage, step), lambda folder: (folder / "x").write_text("x") and None)


def kept_after(run: Run) -> list[int]:
    """Publish and prune as a whole stage does."""
    for step in range(1, run.recipe.stage("stage2").steps + 1):
        if is_checkpoint_due(run, "stage2", step):
            publish(run, step)
            prune_checkpoints(run, "stage2")
    return checkpoint_steps(run, "stage2")


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (["keep_last=2"], [8, 9, 10]),  # two besides the final one
        (["keep_last=1"], [9, 10]),
        (["keep_last=99"], list(range(1, 11))),
        (["keep_last=1", "keep_every=4"], [4, 8, 9, 10]),
        (["keep_last=1", "every=3"], [9, 10]),
        (["keep_last=2", "every=3"], [6, 9, 10]),
        (["keep_last=1", "every=100"], [10]),
    ],
)
def test_retention(tmp_path: Path, settings: list[str], kept: list[int]) -> None:
    run = open_tiny(tmp_path, "r", ["stage2.steps=10", *(f"stage2.checkpoint.{setting}" for setting in settings)])
    assert kept_after(run) == kept


def test_pruning_tells_what_it_deleted(tmp_path: Path) -> None:
    run = open_tiny(tmp_path, "r", ["stage2.steps=10", "stage2.checkpoint.keep_last=1"])
    for step in (1, 2, 3):
        publish(run, step)
    assert prune_checkpoints(run, "stage2") == [1, 2]
    assert not run.paths.checkpoint("stage2", 1).exists()
    assert prune_checkpoints(run, "stage2") == []


def test_due_are_the_interval_the_evaluated_and_the_last(tmp_path: Path) -> None:
    run = open_tiny(tmp_path, "r", ["stage2.steps=10", "stage2.checkpoint.every=4", "stage2.evaluate_every=3"])
    assert [step for step in range(1, 11) if is_checkpoint_due(run, "stage2", step)] == [3, 4, 6, 8, 9, 10]


def test_unpublished_folders_do_not_count(tmp_path: Path) -> None:
    run = open_tiny(tmp_path, "r", ["stage2.steps=10"])
    assert (latest_checkpoint(run, "stage2"), remaining_steps(run, "stage2")) == (0, range(10))
    publish(run, 3)
    for name in ("step-000007", "step-x", "other"):
        (run.paths.checkpoint("stage2", 0).parent / name).mkdir()
    assert checkpoint_steps(run, "stage2") == [3]
    assert remaining_steps(run, "stage2") == range(3, 10)
    publish(run, 10)
    assert remaining_steps(run, "stage2") == range(10, 10)


@pytest.mark.parametrize("link", ["step-000003", "stage1"])
def test_checkpoints_that_lead_out_of_the_run_are_refused_and_left(tmp_path: Path, link: str) -> None:
    run = open_tiny(tmp_path / "artifacts", "r")
    outside = tmp_path / "outside"
    (outside / "step-000001").mkdir(parents=True)
    (outside / "manifest.json").write_text("{}")
    folder = run.paths.checkpoint("stage1", 0).parent
    place = folder if link == "stage1" else folder / link
    place.parent.mkdir(parents=True)
    place.symlink_to(outside)
    with pytest.raises(RunError, match="leads out of the run"):
        prune_checkpoints(run, "stage1")
    assert sorted(path.name for path in outside.iterdir()) == ["manifest.json", "step-000001"]
