"""Results read from real runs: what the runs themselves say, and what cannot be read."""

from pathlib import Path

import pytest

from kdrl_core.evaluation.results import read_results
from kdrl_core.ledger import Run
from kdrl_core.look.sweeps.aggregate import build_table
from kdrl_core.look.sweeps.results import SweepResults, read_results_of
from kdrl_core.look.sweeps.state import CellState, CellStatus


@pytest.fixture
def donor(donor_and_alone: tuple[Run, Run], copied_run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The copied run, in the artifacts folder."""
    monkeypatch.setenv("KDRL_ARTIFACTS", str(copied_run.paths.root.parent.parent))
    return copied_run


def _read() -> SweepResults:
    status = CellStatus(run="kdrl", variant="KDRL", seed=0, state=CellState.FINISHED)
    return read_results_of("s", "", "miniature", [status])


def test_a_cell_of_one_seed_has_the_accuracies_of_its_evaluation(donor: Run) -> None:
    results = _read()
    table = build_table(results)
    told = read_results(donor.paths.evaluation("stage2"))["benchmarks"]
    *references, row = table.rows
    assert {name: row.scores[name].mean for name in told} == pytest.approx({n: r["accuracy"] for n, r in told.items()})
    assert [reference.label for reference in references] == ["student before", "after stage 1", "teacher"]
    base = read_results(donor.paths.evaluation("base"))["benchmarks"]["test"]["accuracy"]
    assert references[0].scores["test"].mean == pytest.approx(base)
    assert (row.steps, results.cells[0].seed) == (4, 0)
    assert results.cells[0].train_s > 0.0


def test_a_damaged_evaluation_is_missing_and_named(donor: Run) -> None:
    path = donor.paths.evaluation("stage2") / "responses.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    results = _read()
    assert results.cells == []
    (missing,) = results.missing
    assert missing.state is CellState.FAILED
    assert f"{path} is damaged" in missing.detail
    assert Path(path).exists()
