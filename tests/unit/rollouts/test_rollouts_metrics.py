"""metrics.parquet and timings.parquet are derived from manifests, and can be rebuilt from them at any time."""

from pathlib import Path

import pytest

from kdrl_core.config import load_recipe
from kdrl_core.errors import DamagedArtifactError
from kdrl_core.ledger import Run, create_run, publish_file
from kdrl_core.rollouts.metrics import append_metrics, load_metrics


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with the published updates of five steps, without metrics."""
    run = create_run("r", load_recipe("miniature"), artifacts=tmp_path)
    for step in range(5):
        publish_file(
            run.paths.update("stage2", step),
            lambda file: file.write_bytes(b"x") and None,
            metadata={
                "metrics": {"reward/mean": step / 10, "beta": 1.0},
                "timings": {"time/update_s": 0.5 + step},
            },
        )
    return run


def both(run: Run) -> tuple[bytes, bytes]:
    return run.paths.metrics("stage2").read_bytes(), run.paths.timings("stage2").read_bytes()


def test_rows_are_joined_by_step(run: Run) -> None:
    assert load_metrics(run, "stage2") == []
    for step in range(3):
        append_metrics(run, "stage2", step)
    assert load_metrics(run, "stage2") == [
        {"step": k, "reward/mean": k / 10, "beta": 1.0, "time/update_s": 0.5 + k} for k in range(3)
    ]


def test_rebuilt_files_are_the_appended_ones(run: Run) -> None:
    for step in range(5):
        append_metrics(run, "stage2", step)
    expected = both(run)
    for name in ("metrics", "timings"):
        getattr(run.paths, name)("stage2").unlink()
        append_metrics(run, "stage2", 4)
        assert both(run) == expected


def test_missing_rows_are_filled_in(run: Run) -> None:
    append_metrics(run, "stage2", 0)
    append_metrics(run, "stage2", 3)  # steps 1 and 2 were published by a process that died before their rows were
    assert [row["step"] for row in load_metrics(run, "stage2")] == [0, 1, 2, 3]


def test_replayed_step_changes_nothing(run: Run) -> None:
    for step in range(5):
        append_metrics(run, "stage2", step)
    before = both(run)
    for step in range(5):
        append_metrics(run, "stage2", step)
    assert both(run) == before


def test_lost_update_is_named(run: Run) -> None:
    run.paths.update("stage2", 1).unlink()
    with pytest.raises(DamagedArtifactError, match=r"step=000001/update\.parquet is missing, though later steps"):
        append_metrics(run, "stage2", 3)


def test_torn_metrics_are_named(run: Run) -> None:
    append_metrics(run, "stage2", 0)
    run.paths.metrics("stage2").write_bytes(b"PAR1")
    with pytest.raises(DamagedArtifactError, match=r"metrics\.parquet cannot be read"):
        append_metrics(run, "stage2", 1)
