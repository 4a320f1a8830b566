"""Overlap with evaluation problems, counted by hand, and what it must and must not find."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdrl_core.config import DataConfig, DecontaminationConfig, VerificationConfig
from kdrl_core.data import read_problems
from kdrl_core.data.decontamination import Decontaminator, words_of
from kdrl_core.data.sieve import unparsable_answers
from kdrl_core.errors import DataError

LONG = "Let x be the number of apples that Ann buys on Monday and y the number she buys later"
SHORT = "What is 2+2?"


def index(tmp_path: Path, *problems: str, ngram: int = 3, min_overlap: float = 0.5) -> Decontaminator:
    rows = [{"id": f"b{number}", "problem": text, "answer": "1"} for number, text in enumerate(problems)]
    file = tmp_path / "bench.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Decontaminator(DecontaminationConfig(files=[str(file)], ngram=ngram, min_overlap=min_overlap))


def test_share_is_that_of_the_shorter_problem(tmp_path: Path) -> None:
    # Benchmark "a b c d e f": the 3-grams abc bcd cde def. The problem "a b c d x y z w": abc bcd cdx dxy xyz yzw.
    # Shared are abc and bcd: 2 of min(6, 4) = 0.5.
    found = index(tmp_path, "a b c d e f").find("a b c d x y z w")
    assert found is not None
    assert (found.benchmark, found.problem_id, found.share) == ("bench", "b0", 0.5)
    assert index(tmp_path, "a b c d e f", min_overlap=0.51).find("a b c d x y z w") is None
    # "a b c d x": abc bcd cdx, so 2 of min(3, 4).
    assert index(tmp_path, "a b c d e f").find("a b c d x").share == pytest.approx(2 / 3)  # type: ignore[union-attr]


def test_repeated_ngrams_count_once(tmp_path: Path) -> None:
    # "a b c a b c a b c": abc bca cab. "a b c x y": abc bcx cxy. Shared: abc, 1 of 3.
    assert index(tmp_path, "a b c a b c a b c").find("a b c x y") is None
    assert index(tmp_path, "a b c a b c a b c", min_overlap=0.33).find("a b c x y") is not None
    # The training problem "a b c a b c a b c" has 3 distinct ones of which "d a b c e f g h" has one: 1 of 3, not of 7.
    found = index(tmp_path, "d a b c e f g h", min_overlap=0.33).find("a b c a b c a b c")
    assert found is not None
    assert found.share == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "text",
    [
        LONG,
        LONG.upper(),
        LONG.replace(" ", "  \n"),
        f"Here is a story about fruit. {LONG}. Find x + y, and write it as a fraction in lowest terms.",
        LONG.replace("x", "$x$").replace("y ", "\\left(y\\right) "),
    ],
    ids=["same", "case", "blanks", "inside a longer text", "LaTeX that changes the look"],
)
def test_variants_are_found(tmp_path: Path, text: str) -> None:
    found = index(tmp_path, SHORT, LONG, ngram=5).find(text)
    assert found is not None
    assert found.problem_id == "b1"


def test_a_neighbour_from_the_same_template_stays(tmp_path: Path) -> None:
    ending = " can be written as m/n, where m and n are relatively prime positive integers. Find m+n."
    bench = "The area of the triangle with vertices A, B and C on the unit circle whose sides are all equal" + ending
    other = (
        "A fair coin is thrown until three heads in a row come up; the chance that it takes just nine throws" + ending
    )
    assert index(tmp_path, bench, ngram=13).find(bench + " ") is not None
    assert index(tmp_path, bench, ngram=13).find(other) is None


def test_problems_shorter_than_an_ngram_must_be_equal(tmp_path: Path) -> None:
    decontaminator = index(tmp_path, SHORT, ngram=13)
    assert decontaminator.find("what is $2 + 2$").share == 1.0  # type: ignore[union-attr]
    assert decontaminator.find("What is 2+3?") is None


def test_words() -> None:
    assert words_of("Let \\dfrac{1}{2}x₂ = ２３") == ["let", "frac", "1", "2", "x", "2", "23"]
    assert words_of("\\left( \\text{area} \\right)") == ["area"]


@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=30), st.integers(2, 6))
def test_a_problem_overlaps_itself(tmp_path_factory: pytest.TempPathFactory, words: list[str], ngram: int) -> None:
    text = " ".join(words)
    found = index(tmp_path_factory.mktemp("d"), text, ngram=ngram).find(text)
    assert found is not None
    assert found.share == 1.0


def test_the_six_benchmarks_overlap_themselves_and_not_the_shipped_problems() -> None:
    decontaminator = Decontaminator(DecontaminationConfig())
    for name in ("aime24", "minerva_math"):
        benchmark = read_problems(DataConfig(files=[f"builtin:benchmarks/{name}.jsonl"]))
        assert None not in decontaminator.find_all(benchmark["question"].to_pylist())
    problems = read_problems(DataConfig(files=["builtin:problems/skywork_synthetic_labels.parquet"]))
    found = [overlap for overlap in decontaminator.find_all(problems["question"].to_pylist()) if overlap]
    assert sorted(overlap.benchmark for overlap in found) == ["math500", "math500", "olympiad_bench", "olympiad_bench"]


def test_a_bad_benchmark_is_named(tmp_path: Path) -> None:
    file = tmp_path / "b.jsonl"
    file.write_text('{"id": "1", "answer": "2"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl: columns answer, id are of no known format"):
        Decontaminator(DecontaminationConfig(files=[str(file)]))


def test_answers_that_cannot_be_parsed() -> None:
    """A tower of powers exhausts the time limit: as a ground truth it is as useless as one that is no mathematics."""
    readable = ["12", "-3.5", "7/2", r"\frac{1}{2}", r"\sqrt{2}+1", "(1,2]", r"\{1,2\}", "x=3", "10\\%", "A"]
    bad = ["x=", r"\sqrt{", "1/0", "9^{9^{9^{9}}}", "\\{"]
    partly = r"x = 2 \text{ is a double root}"
    found = unparsable_answers([*readable, *bad, partly], VerificationConfig(workers=1, timeout_s=3.0))
    assert found == (set(bad), {partly})
