"""metrics.parquet and timings.parquet are derived from manifests, and can be rebuilt from them at any time."""

from pathlib import Path

import pyarrow as pa
import pytest

from kdrl_core.config import load_recipe
from kdrl_core.errors import DamagedArtifactError
from kdrl_core.ledger import Run, create_run, publish_file
from kdrl_core.tables.files import append_metrics, differing_metrics, load_metrics, rebuild_metrics, write_table


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


def steps(run: Run) -> list[int]:
    return [row["step"] for row in load_metrics(run, "stage2")]


def lose(run: Run, step: int) -> None:
    run.paths.update("stage2", step).with_name("_update.manifest.json").unlink()


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
        assert differing_metrics(run, "stage2", num_steps=0) == [getattr(run.paths, name)("stage2")]
        rebuild_metrics(run, "stage2", num_steps=0)
        assert both(run) == expected


def test_missing_rows_are_filled_in(run: Run) -> None:
    append_metrics(run, "stage2", 0)
    append_metrics(run, "stage2", 3)  # steps 1 and 2 were published by a process that died before their rows were
    rebuild_metrics(run, "stage2", num_steps=0)
    assert steps(run) == [0, 1, 2, 3, 4]
    assert differing_metrics(run, "stage2", num_steps=0) == []


def test_replayed_step_changes_nothing(run: Run) -> None:
    for step in range(5):
        append_metrics(run, "stage2", step)
    before = both(run)
    for step in range(5):
        append_metrics(run, "stage2", step)
    rebuild_metrics(run, "stage2", num_steps=5)
    assert both(run) == before


@pytest.mark.parametrize("step", [1, 4])
def test_the_row_of_a_lost_manifest_is_kept(run: Run, step: int) -> None:
    rebuild_metrics(run, "stage2", num_steps=5)
    before = both(run)
    lose(run, step)
    run.paths.update("stage2", step).unlink()
    rebuild_metrics(run, "stage2", num_steps=5)
    assert both(run) == before


def test_a_row_that_is_lost_with_its_manifest_is_told_and_left_out(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    lose(run, 1)
    rebuild_metrics(run, "stage2", num_steps=5)
    assert steps(run) == [0, 2, 3, 4]
    assert "stage2 step 1: its metrics are lost, with the manifest of its update" in caplog.text
    append_metrics(run, "stage2", 3)
    assert steps(run) == [0, 2, 3, 4]


def test_the_manifest_of_another_update_gives_no_row(run: Run) -> None:
    rebuild_metrics(run, "stage2", num_steps=5)
    before = both(run)
    manifests = [run.paths.update("stage2", step).with_name("_update.manifest.json") for step in (1, 4)]
    manifests[0].write_bytes(manifests[1].read_bytes())
    rebuild_metrics(run, "stage2", num_steps=5)
    assert both(run) == before


def test_a_folder_that_is_no_step_is_passed_over(run: Run) -> None:
    (run.paths.step("stage2", 0).parent / "step=old").mkdir()
    rebuild_metrics(run, "stage2", num_steps=0)
    assert steps(run) == [0, 1, 2, 3, 4]


def test_torn_metrics_are_named(run: Run) -> None:
    append_metrics(run, "stage2", 0)
    run.paths.metrics("stage2").write_bytes(b"PAR1")
    with pytest.raises(DamagedArtifactError, match=r"metrics\.parquet cannot be read"):
        append_metrics(run, "stage2", 1)


def test_metrics_without_steps_are_named_and_written_anew(run: Run) -> None:
    write_table(pa.table({"reward/mean": [1.0]}), _in_place(run.paths.metrics("stage2")))
    with pytest.raises(DamagedArtifactError, match=r"metrics\.parquet has no column step"):
        load_metrics(run, "stage2")
    rebuild_metrics(run, "stage2", num_steps=5)
    assert steps(run) == [0, 1, 2, 3, 4]


def _in_place(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    return path
