"""Accuracy and its interval; benchmarks read with every fault named by file, row and field."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdrl_core.config import BenchmarkConfig
from kdrl_core.data.benchmarks import load_benchmark, select_benchmarks
from kdrl_core.errors import DataError
from kdrl_core.evaluation.statistics import accuracy


def test_accuracy_golden() -> None:
    # Avg@k: mean over problems of the share of right samples, (1/2 + 1 + 0 + 1/4) / 4
    found = accuracy([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0, 0.0, 0.0]], seed=0)
    assert found.mean == pytest.approx(1.75 / 4)


def test_interval_has_the_width_of_the_binomial() -> None:
    # 400 problems, half of them right: mean ± 1.96 · sqrt(0.25 / 400) = 0.5 ± 0.049
    found = accuracy([[1.0], [0.0]] * 200, seed=0)
    assert (found.low, found.high) == (pytest.approx(0.451, abs=0.01), pytest.approx(0.549, abs=0.01))


def test_problems_not_samples_are_resampled() -> None:
    """Ten problems, each always right or always wrong: hundred samples of each do not make it surer."""
    few, many = accuracy([[1.0], [0.0]] * 5, seed=0), accuracy([[1.0] * 100, [0.0] * 100] * 5, seed=0)
    assert (few.low, few.high) == (many.low, many.high)


def test_a_certain_accuracy_has_a_width() -> None:
    """Wilson's: 0 of 20 ends at z² / (20 + z²) = 3.84146 / 23.84146."""
    none, full = accuracy([[0.0] * 4] * 20, seed=3), accuracy([[1.0]] * 20, seed=3)
    assert (none.low, none.mean, none.high) == pytest.approx((0.0, 0.0, 0.161125), abs=2e-6)
    assert (full.low, full.mean, full.high) == pytest.approx((1 - 0.161125, 1.0, 1.0), abs=2e-6)


def test_seed_fixes_the_interval() -> None:
    correct = [[1.0], [0.0], [1.0], [1.0], [0.0]]
    assert accuracy(correct, seed=1) == accuracy(correct, seed=1)


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=4), min_size=1, max_size=30))
def test_interval_lies_within_the_problems(correct: list[list[float]]) -> None:
    shares = [sum(samples) / len(samples) for samples in correct]
    found = accuracy(correct, seed=0)
    assert found.mean == pytest.approx(sum(shares) / len(shares))
    slack = 1e-9
    assert -slack <= found.low <= found.mean + slack
    assert found.mean - slack <= found.high <= 1.0 + slack
    if len(shares) - max(map(shares.count, shares)) > 3:  # otherwise it may be Wilson's
        assert min(shares) - slack <= found.low <= found.high <= max(shares) + slack
    else:
        assert found.low < found.high


ROW = {"id": "p-1", "problem": "3+5", "answer": "8"}


def write(path: Path, *rows: Any) -> BenchmarkConfig:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return BenchmarkConfig(name="bench", file=str(path))


def test_benchmark_is_read(tmp_path: Path) -> None:
    config = write(tmp_path / "b.jsonl", ROW, "", {**ROW, "id": "p-2", "answer": "π", "more": [1]})
    problems = load_benchmark(config)
    assert [(p.problem_id, p.question, p.answer) for p in problems] == [("p-1", "3+5", "8"), ("p-2", "3+5", "π")]


def test_first_problems_only(tmp_path: Path) -> None:
    config = write(tmp_path / "b.jsonl", ROW, {**ROW, "id": "p-2"}, {**ROW, "id": "p-3"})
    assert len(load_benchmark(config.model_copy(update={"max_problems": 2}))) == 2


@pytest.mark.parametrize("field", ["problem", "answer"])
@pytest.mark.parametrize("value", ["absent", None, "", "  ", True, {"a": 8}])
def test_bad_field_is_named(tmp_path: Path, field: str, value: Any) -> None:
    bad = {name: content for name, content in ROW.items() if name != field}
    if value != "absent":
        bad[field] = value
    with pytest.raises(DataError, match=rf"b\.jsonl row 3, field '{field}': .*; fill it in or drop the row"):
        load_benchmark(write(tmp_path / "b.jsonl", ROW, "", bad))


@pytest.mark.parametrize("line", ["{", "problem,answer", "NaN x"])
def test_what_is_not_json_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(DataError, match=r"b\.jsonl row 2, field 'row': not JSON "):
        load_benchmark(write(tmp_path / "b.jsonl", ROW, line))


@pytest.mark.parametrize("line", ["[7]", "7", '"x"', "null"])
def test_row_that_is_no_object_is_named(tmp_path: Path, line: str) -> None:
    with pytest.raises(DataError, match=r"b\.jsonl row 1: an object is expected"):
        load_benchmark(write(tmp_path / "b.jsonl", line))


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b'\n{"id": "\xff"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl.*UTF-8"):
        load_benchmark(BenchmarkConfig(name="bench", file=str(path)))


def test_files_without_problems_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"benchmark bench: evaluation\.benchmarks file: .*none\.jsonl does not exist"):
        load_benchmark(BenchmarkConfig(name="bench", file=str(tmp_path / "none.jsonl")))
    with pytest.raises(DataError, match=r"benchmark bench: .*b\.jsonl has no problems"):
        load_benchmark(write(tmp_path / "b.jsonl", ""))


def test_repeated_id_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"b\.jsonl row 3, field 'id': 'p-1' stands in .*b\.jsonl row 1 as well; make ids unique"
    ):
        load_benchmark(write(tmp_path / "b.jsonl", ROW, "", ROW))


def test_unknown_benchmark_lists_the_known_and_the_nearest() -> None:
    known = [BenchmarkConfig(name=name, file="x.jsonl") for name in ("aime24", "math500")]
    assert [b.name for b in select_benchmarks(known, None)] == ["aime24", "math500"]
    assert [b.name for b in select_benchmarks(known, ["math500"])] == ["math500"]
    with pytest.raises(DataError, match=r"no benchmark 'math50' \(known: aime24, math500\); did you mean 'math500'\?"):
        select_benchmarks(known, ["math50"])
