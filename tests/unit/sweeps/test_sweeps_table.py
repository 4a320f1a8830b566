"""Tables of made-up results, whose means and ranks can be read off."""

import csv
import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrl_core.evaluation.statistics import accuracy, over_seeds, paired_difference
from kdrl_core.look.sweeps.aggregate import build_table
from kdrl_core.look.sweeps.results import CellResult, ModelScores, ReferenceResult, SweepResults, Watched
from kdrl_core.look.sweeps.state import CellState, CellStatus
from kdrl_core.look.sweeps.table import AVERAGE, SweepTable


def _model(test: list[float], hard: list[float], length: float = 30.0) -> ModelScores:
    named = {"test": test, "hard": hard}
    scores = {name: {f"p{i}": value for i, value in enumerate(values)} for name, values in named.items()}
    return ModelScores(scores=scores, length_mean=length)


def _cell(variant: str, seed: int, test: list[float], hard: list[float], **fields: Any) -> CellResult:
    values = {"steps": 4, "train_s": 10.0, **fields}
    return CellResult(variant=variant, seed=seed, run=f"s--{variant}--seed{seed}", model=_model(test, hard), **values)


def _status(variant: str, seed: int, state: CellState = CellState.FINISHED, detail: str = "") -> CellStatus:
    return CellStatus(run=f"s--{variant}--seed{seed}", variant=variant, seed=seed, state=state, detail=detail)


@pytest.fixture
def partial() -> SweepTable:
    """Three variants × two seeds; `b` lacks a seed, `c` both."""
    cells = [
        _cell("a", 0, [1.0, 0.0], [0.0, 0.0], train_s=10.0),
        _cell("a", 1, [1.0, 1.0], [0.0, 1.0], train_s=30.0),
        _cell("b", 0, [1.0, 0.5], [0.0, 0.0]),
    ]
    failed = _status("c", 0, CellState.FAILED, "it | broke")
    statuses = [_status("a", 0), _status("b", 0), failed, _status("a", 1)]
    statuses += [_status("b", 1, CellState.PENDING), _status("c", 1, CellState.STOPPED, "kdrl resume s--c--seed1")]
    base = ReferenceResult(
        name="student before", group="x", first_variant="a", seed=0, model=_model([0.0, 0.5], [0.0, 0.0])
    )
    return build_table(
        SweepResults(name="s", description="d", recipe="r", statuses=statuses, cells=cells, references=[base])
    )


def test_means_are_over_problems_and_seeds_and_avg_over_benchmarks(partial: SweepTable) -> None:
    base, a, b, c = partial.rows
    assert (base.label, base.is_reference, base.num_planned, base.seeds) == ("student before", True, 2, [0])
    assert {name: score.mean for name, score in a.scores.items()} == {"test": 0.75, "hard": 0.25, AVERAGE: 0.5}
    assert (a.seeds, a.train_s, a.steps) == ([0, 1], 20.0, 4.0)
    assert {name: score.mean for name, score in b.scores.items()} == {"test": 0.75, "hard": 0.0, AVERAGE: 0.375}
    assert (c.scores, c.seeds, c.num_planned) == ({}, [], 2)


def test_best_and_second_best_are_of_the_variants_alone(partial: SweepTable) -> None:
    base, a, b, _ = partial.rows
    assert {score.rank for score in base.scores.values()} == {None}
    assert {name: score.rank for name, score in a.scores.items()} == {"test": None, "hard": 1, AVERAGE: 1}
    assert {name: score.rank for name, score in b.scores.items()} == {"test": None, "hard": 2, AVERAGE: 2}


def test_a_difference_is_over_the_seeds_that_both_have(partial: SweepTable) -> None:
    differences = {row.label: row.differences for row in partial.rows}
    assert differences["b"]["test"].mean == 0.25  # of seed 0 alone: (0 + 0.5) / 2
    assert differences["student before"] == differences["a"] == differences["c"] == {}


def test_a_partial_table_says_what_is_missing(partial: SweepTable) -> None:
    text = partial.to_markdown()
    assert "| a | 75.0 (" in text
    assert "**25.0** (" in text
    assert "*0.0* (" in text
    assert "| c | – | – | – | 0/2 |" in text
    assert "| b | 75.0 " in text
    assert "| 1/2 |" in text
    assert "| s--c--seed0 | failed | it \\| broke |" in text
    assert "| s--b--seed1 | pending |  |" in text
    assert "| s--c--seed1 | stopped | kdrl resume s--c--seed1 |" in text


def test_csv_and_json_hold_the_numbers(partial: SweepTable) -> None:
    rows = list(csv.DictReader(io.StringIO(partial.to_csv())))
    hard = next(row for row in rows if (row["variant"], row["benchmark"]) == ("a", "hard"))
    assert (float(hard["mean"]), hard["rank"], hard["num_seeds"], hard["num_planned"]) == (0.25, "1", "2", "2")
    assert [row["mean"] for row in rows if row["variant"] == "c"] == [""]
    content = json.loads(json.dumps(partial.to_json()))
    assert content["rows"][1]["scores"]["hard"]["mean"] == 0.25
    assert [cell["train_s"] for cell in content["cells"]] == [10.0, 30.0, 10.0]


def test_nothing_finished_is_a_table_too() -> None:
    statuses = [_status("a", 0, CellState.PENDING)]
    table = build_table(SweepResults(name="s", description="", recipe="r", statuses=statuses, cells=[], references=[]))
    assert "| a | 0/1 |" in table.to_markdown()
    assert [one.title for one in table.tables()] == [
        "Accuracy, % (95 % interval)",
        "Cost, means over seeds",
        "Not finished",
    ]


def test_two_teachers_have_two_rows() -> None:
    references = [
        ReferenceResult(name="teacher", group=group, first_variant=variant, seed=0, model=_model([1.0], [1.0]))
        for group, variant in (("x", "a"), ("y", "weaker teacher"))
    ]
    table = build_table(
        SweepResults(name="s", description="", recipe="r", statuses=[], cells=[], references=references)
    )
    assert [row.label for row in table.rows] == ["teacher", "teacher of weaker teacher"]


def test_a_teacher_of_one_recipe_alone_is_planned_for_its_seeds() -> None:
    statuses = [_status("a", 0, CellState.FINISHED), _status("b", 1, CellState.PENDING)]
    references = [ReferenceResult(name="teacher", group="x", first_variant="a", seed=0, model=_model([1.0], [1.0]))]
    table = build_table(
        SweepResults(name="runs", description="", recipe="r", statuses=statuses, cells=[], references=references)
    )
    assert table.to_json()["rows"][0]["num_planned"] == 1  # b's seed is not this teacher's, as far as is known


def test_equal_time_takes_the_last_evaluation_within_it() -> None:
    def watched(*points: tuple[int, float, float]) -> list[Watched]:
        return [
            Watched(step=step, seconds=seconds, model=ModelScores(scores={"val": {"p": right}}, length_mean=1.0))
            for step, seconds, right in points
        ]

    cells = [
        _cell("slow", 0, [1.0], [1.0], watched=watched((10, 9.0, 0.2), (20, 18.0, 0.6))),
        _cell("fast", 0, [1.0], [1.0], watched=watched((10, 5.0, 0.1), (20, 10.0, 0.5))),
        _cell("late", 0, [1.0], [1.0], watched=watched((20, 11.0, 0.9))),
    ]
    statuses = [_status(cell.variant, 0) for cell in cells]
    table = build_table(
        SweepResults(name="s", description="", recipe="r", statuses=statuses, cells=cells, references=[])
    )
    assert table.equal_time_s == 10.0
    found = {row.label: (row.step, {name: score.mean for name, score in row.scores.items()}) for row in table.timed}
    assert found == {"slow": (10, {"val": 0.2}), "fast": (20, {"val": 0.5}), "late": (None, {})}


def test_one_seed_is_the_bootstrap_over_problems() -> None:
    right = np.random.default_rng(0).integers(0, 2, (1, 200)).astype(float)
    ours, theirs = over_seeds({"x": right}), accuracy(right.T.tolist(), seed=0)
    assert ours.mean == theirs.mean
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.015)


def test_seeds_that_differ_widen_the_interval() -> None:
    same = np.tile(np.random.default_rng(0).integers(0, 2, 500), (5, 1)).astype(float)
    apart = same * np.linspace(0.6, 1.0, 5)[:, None]
    narrow, wide = over_seeds({"x": same}), over_seeds({"x": apart / 0.8})
    assert narrow.mean == pytest.approx(wide.mean)
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_what_problems_have_in_common_cancels_out_of_a_difference() -> None:
    hard = np.random.default_rng(0).random((3, 300))
    difference = paired_difference({"x": hard + 0.1}, {"x": hard})
    assert (difference.mean, difference.low, difference.high) == pytest.approx((0.1, 0.1, 0.1))


# The 97.5 % points of Student's t for S − 1 degrees of freedom.
T_975 = {2: 12.706, 3: 4.303, 5: 2.776, 8: 2.365}


@pytest.mark.parametrize("num_seeds", T_975)
def test_where_seeds_are_all_that_varies_it_is_the_t_interval(num_seeds: int) -> None:
    values = np.random.default_rng(num_seeds).normal(20.0, 3.0, (num_seeds, 1))
    found = paired_difference({"x": values}, {"x": np.zeros_like(values)})
    half = T_975[num_seeds] * values.std(ddof=1) / np.sqrt(num_seeds)
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), abs=0.12 * half)


@pytest.mark.parametrize(("num_seeds", "num_problems"), [(3, 1), (5, 1), (8, 1), (3, 60), (8, 60)])
def test_of_ties_about_one_in_twenty_seems_to_be_none(num_seeds: int, num_problems: int) -> None:
    rng, decided, trials = np.random.default_rng(7), 0, 400
    for _ in range(trials):
        hard = rng.normal(0.0, 0.2, num_problems)
        sides = [
            hard + rng.normal(0.0, 0.05, (num_seeds, 1)) + rng.normal(0.0, 0.1, (num_seeds, num_problems))
            for _ in range(2)
        ]
        found = paired_difference({"x": sides[0]}, {"x": sides[1]})
        decided += not found.low <= 0.0 <= found.high
    assert decided / trials <= 0.08  # 5 %, and three standard errors of 400 trials
    if num_problems == 1:
        assert decided / trials >= 0.02  # and no wider than need be, where seeds are all that varies


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**20))
def test_interval_holds_the_mean(num_seeds: int, num_problems: int, seed: int) -> None:
    array = np.random.default_rng(seed).random((num_seeds, num_problems))
    found = over_seeds({"x": array, "y": array[:, ::-1]})
    assert 0.0 <= found.low <= found.mean <= found.high <= 1.0
    assert found.mean == pytest.approx(array.mean())
    assert found == over_seeds({"x": array, "y": array[:, ::-1]})
