"""Tables of made-up results, whose means and ranks can be read off."""

import csv
import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrl_core.config import load_recipe
from kdrl_core.evaluation.statistics import accuracy, accuracy_difference, over_seeds, paired_difference, wilson
from kdrl_core.look.sweeps.aggregate import build_table
from kdrl_core.look.sweeps.claims import AVERAGE
from kdrl_core.look.sweeps.equal_time import around
from kdrl_core.look.sweeps.results import (
    CellResult,
    ModelScores,
    ReferenceResult,
    SweepResults,
    Watched,
    reference_groups,
)
from kdrl_core.look.sweeps.state import CellState, CellStatus
from kdrl_core.look.sweeps.table import SweepTable


def _model(test: list[float], hard: list[float], length: float = 30.0) -> ModelScores:
    named = {"test": test, "hard": hard}
    scores = {name: {f"p{i}": value for i, value in enumerate(values)} for name, values in named.items()}
    return ModelScores(scores=scores, lengths={name: dict.fromkeys(scores[name], length) for name in scores})


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


def _watched(*points: tuple[int, float, float]) -> list[Watched]:
    """Step, seconds and accuracy."""
    return [
        Watched(step=step, seconds=seconds, model=ModelScores(scores={"val": {"p": right}}, lengths={}))
        for step, seconds, right in points
    ]


def _timed(cells: list[CellResult]) -> SweepTable:
    statuses = [_status(cell.variant, cell.seed) for cell in cells]
    return build_table(
        SweepResults(name="s", description="", recipe="r", statuses=statuses, cells=cells, references=[])
    )


def test_at_equal_time_accuracy_is_read_between_two_evaluations() -> None:
    slow = [
        _cell("slow", 0, [1.0], [1.0], watched=_watched((10, 7.0, 0.2), (20, 15.0, 0.6))),
        _cell("slow", 1, [1.0], [1.0], watched=_watched((10, 9.0, 0.4), (20, 17.0, 0.5))),
    ]
    fast = [_cell("fast", seed, [1.0], [1.0], watched=_watched((10, 5.0, 0.1), (20, 10.0, 0.5))) for seed in (0, 1)]
    late = [_cell("late", seed, [1.0], [1.0], watched=_watched((20, 11.0, 0.9))) for seed in (0, 1)]
    table = _timed([*slow, *fast, *late])
    assert table.equal_time_s == 10.0
    found = {row.label: (row.steps, {name: score.mean for name, score in row.scores.items()}) for row in table.timed}
    # slow is at step 10 after 8 s and at step 20 after 16 s, so that 10 s are a quarter of the way:
    # 0.2 + 0.4 / 4 = 0.3 and 0.4 + 0.1 / 4 = 0.425
    assert found == {
        "slow": ([10, 20], {"val": pytest.approx(0.3625)}),
        "fast": ([20], {"val": 0.5}),
        "late": ([], {}),
    }
    shown = table.equal_time_table()
    assert shown.title == "Accuracy in training, % after 10 s of the last stage each"
    assert [(row[0], row[-2], row[-1]) for row in shown.rows] == [
        ("slow", "10–20", "2"), ("fast", "20", "2"), ("late", "before step 20", "0"),
    ]  # fmt: skip


def test_at_equal_time_the_model_before_the_stage_is_step_0() -> None:
    """Of each seed its own; SFT begins to train when its teacher is sampled, after 6 s."""
    recipe = load_recipe("miniature")
    group = reference_groups(recipe)["after stage 1"]
    references = [
        ReferenceResult(
            name="after stage 1",
            group=group,
            first_variant="sft",
            seed=seed,
            model=ModelScores(scores={"val": {"p": right}}, lengths={"val": {"p": 1.0}}),
        )
        for seed, right in ((0, 0.2), (1, 0.6), (2, 1.0))
    ]
    cells = [_cell("sft", s, [1.0], [1.0], start_s=6.0, watched=_watched((20, 16.0, 1.0))) for s in (0, 1)]
    cells += [_cell("fast", seed, [1.0], [1.0]) for seed in (0, 1)]
    statuses = [_status(cell.variant, cell.seed) for cell in cells]
    results = SweepResults(
        name="s",
        description="",
        recipe="r",
        statuses=statuses,
        cells=cells,
        references=references,
        recipes={"sft": recipe, "fast": recipe},
    )
    for seconds, means in ((8.5, (0.4, 0.7)), (5.0, (0.2, 0.6))):  # 8.5 s: a quarter of the way to 1
        fast = [replace(cell, watched=_watched((10, seconds, 0.0))) for cell in cells[2:]]
        table = build_table(replace(results, cells=[*cells[:2], *fast]))
        assert table.equal_time_s == seconds
        (row,) = (row for row in table.timed if row.label == "sft")
        assert (row.steps, row.seeds) == ([0, 20] if seconds > 6 else [0], [0, 1])
        assert row.scores["val"].mean == pytest.approx(sum(means) / 2)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0, (0, 0, 0.0)),  # the teacher's samples take 2 s, in which the model is the one before the stage
        (2.0, (0, 0, 0.0)),
        (4.0, (0, 10, 0.25)),
        (10.0, (10, 10, 0.0)),
        (13.0, (10, 20, 0.75)),
        (14.0, (20, 20, 0.0)),
        (14.1, None),  # never beyond the last evaluation
    ],
)
def test_steps_around_a_time(seconds: float, expected: tuple[int, int, float] | None) -> None:
    assert around({0: 2.0, 10: 10.0, 20: 14.0}, seconds) == expected
    assert around({10: 10.0, 20: 14.0}, 9.9) is None


def test_one_seed_is_the_bootstrap_over_problems() -> None:
    right = np.random.default_rng(0).integers(0, 2, (1, 200)).astype(float)
    ours, theirs = over_seeds({"x": right}), accuracy(right.T.tolist(), seed=0)
    assert ours.mean == theirs.mean
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.015)


# Wilson's interval by hand, z² = 3.84146. 0 of n ends at z² / (n + z²), here 3.84146 / 259.84146. 1 of 256:
# p + z² / 512 = 0.0114092 with p = 1 / 256, z √(p (1 − p) / 256 + z² / (4 · 256²)) = 1.959964 · 0.0054638, and
# (0.0114092 ± 0.0107089) / (1 + z² / 256)
@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        (0, 256, 0.0, 0.014784),
        (256, 256, 1 - 0.014784, 1.0),
        (1, 256, 0.000690, 0.021791),
        (0, 1, 0.0, 0.793451),
        (5, 10, 0.236593, 0.763407),
    ],
)
def test_wilson_golden(right: int, count: int, low: float, high: float) -> None:
    found = wilson(right / count, count)
    assert (found.low, found.high) == pytest.approx((low, high), abs=2e-6)


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_nothing_right_is_not_known_to_be_zero(num_seeds: int) -> None:
    none = np.zeros((num_seeds, 256))
    zero, full = over_seeds({"x": none}), over_seeds({"x": none + 1.0})
    assert (zero.mean, zero.low, zero.high) == pytest.approx((0.0, 0.0, 0.014784), abs=2e-6)
    assert (full.mean, full.low, full.high) == pytest.approx((1.0, 1 - 0.014784, 1.0), abs=2e-6)
    assert accuracy([[0.0] * 4] * 256, seed=0).high == pytest.approx(0.014784, abs=2e-6)
    equal = accuracy_difference({"x": none}, {"x": none})
    assert (equal.mean, equal.low, equal.high) == pytest.approx((0.0, -0.014784, 0.014784), abs=2e-6)
    apart = accuracy_difference({"x": none + 1.0}, {"x": none})
    assert (apart.mean, apart.low, apart.high) == pytest.approx((1.0, 1 - 2 * 0.014784, 1.0), abs=2e-6)
    halves = over_seeds({"x": none + 0.5})  # all alike, but neither 0 nor 1: Wilson of 128 in 256
    assert halves.high - halves.low == pytest.approx(2 * 0.0608, abs=1e-3)


def test_one_more_right_answer_does_not_narrow_the_interval() -> None:
    widths = []
    for right in range(6):
        per_problem = np.zeros((1, 256))
        per_problem[0, :right] = 1.0
        found = over_seeds({"x": per_problem})
        widths.append(found.high - found.low)
        ours = accuracy_difference({"x": per_problem}, {"x": np.zeros((1, 256))})
        assert ours.high - ours.low >= 0.0147
    assert widths[0] == min(widths)
    assert widths[:2] == sorted(widths[:2])


def test_an_average_has_the_width_of_its_benchmarks() -> None:
    """With y = 0 of 256, the average moves by half of y's 1.48 points, added as squares to what x moves it by."""
    x = np.random.default_rng(0).integers(0, 2, (1, 200)).astype(float)
    alone, both = over_seeds({"x": x}), over_seeds({"x": x, "y": np.zeros((1, 256))})
    expected = np.hypot((alone.high - alone.mean) / 2, 0.014784 / 2)
    assert both.high - both.mean == pytest.approx(expected)
    assert both.mean - both.low == pytest.approx((alone.mean - alone.low) / 2)


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
