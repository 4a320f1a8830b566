"""The filter's rules: golden counts by hand, exact caps, order independence, errors."""

import hashlib
import json
import random
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdrl_core.config import Recipe
from kdrl_core.data import POOL_SCHEMA, PROBLEM_SCHEMA, FilterReport, RuleCount, filter_problems, read_problems
from kdrl_core.data.labels import label_column
from kdrl_core.data.reading import Reading
from kdrl_core.errors import DataError, ModelError, RecipeError

SMALL, MIDDLE, LARGE = "DeepSeek-R1-Distill-Qwen-1.5B", "DeepSeek-R1-Distill-Qwen-7B", "DeepSeek-R1-Distill-Qwen-32B"
PAPER_RULES = {"drop_passes_at_least": 15, "drop_all_failed": True, "max_unsolved_share": 0.1}
MakeRecipe = Callable[..., Recipe]


def labels(small: int | None, middle: int | None = 0, large: int | None = 0) -> list[tuple[str, int]]:
    named = ((SMALL, small), (MIDDLE, middle), (LARGE, large))
    return [(name, count) for name, count in named if count is not None]


def row(name: str, failures: list[tuple[str, int]] | None, question: str | None = None) -> dict[str, Any]:
    return {
        "problem_id": name,
        "question": question or f"question {name}",
        "answer": "1",
        "source": "test",
        "failures": failures,
    }


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, PROBLEM_SCHEMA)


def ids(pool: pa.Table) -> list[str]:
    return pool["problem_id"].to_pylist()


def test_golden_counts_of_the_papers_rules(make_recipe: MakeRecipe, words: Any) -> None:
    rows = [
        *(row(f"solved-{i:02}", labels(8)) for i in range(18)),
        *(row(f"unsolved-{i}", labels(16, 3, 2)) for i in range(5)),  # the teacher may still teach these
        row("easy-0", labels(0)),  # 16 of 16 passes
        row("easy-1", labels(1)),  # 15 of 16 passes: at least 15
        row("edge-2", labels(2)),  # 14 of 16 passes: stays
        row("hopeless", labels(16, 16, 16)),
        row("nearly", labels(15, 16, 16)),  # solved once: stays
        row("twin", labels(8), "question  solved-00 "),  # a duplicate up to blanks
        row("unlabelled", None),
        row("half-labelled", labels(8, None)),  # rule 2 needs all three
        row("long", labels(8), "word " * 30),
    ]
    recipe = make_recipe(max_prompt_tokens=20, missing_labels="drop", **PAPER_RULES)

    pool, report = filter_problems(table(rows).replace_schema_metadata(dropping(4)), recipe, tokenizer=words)

    assert report.rows_in == len(rows) + 4 == 36
    assert [(rule.rule, rule.dropped) for rule in report.rules] == [
        ("malformed", 4),
        ("no_answer", 0),
        ("conflicting_answers", 0),
        ("duplicates", 1),  # 31 left
        ("missing_labels", 2),  # 29
        ("drop_passes_at_least", 2),  # 27
        ("drop_all_failed", 1),  # 26
        ("min_pass_rate", 0),
        ("max_prompt_tokens", 1),  # 25: 20 solved (18 + edge-2 + nearly), 5 unsolved
        ("decontamination", 0),
        ("unparsable_answers", 0),
        ("max_unsolved_share", 3),  # u ≤ 0.1 · (20 + u) ⇒ u ≤ 2
        ("max_problems", 0),
    ]
    assert report.rows_out == pool.num_rows == 22
    assert {"edge-2", "nearly"} <= set(ids(pool))
    assert sum(name.startswith("unsolved") for name in ids(pool)) == 2
    assert pool.schema.equals(POOL_SCHEMA)
    assert set(pool["stage"].to_pylist()) == {"stage1"}
    assert ids(pool) == sorted(ids(pool))


def test_a_label_of_16_means_never_solved_not_always(make_recipe: MakeRecipe, words: Any) -> None:
    rows = [row("always", labels(0)), row("never", labels(16, 0)), row("middle", labels(8))]

    pool, _ = filter_problems(table(rows), make_recipe(drop_passes_at_least=15), tokenizer=words)

    assert ids(pool) == ["middle", "never"]
    assert pool["student_failures"].to_pylist() == [8, 16]


@pytest.mark.parametrize(("rate", "kept_failures"), [(0.25, 12), (0.5, 8), (0.0, 16), (0.3, 11)])
def test_min_pass_rate_keeps_up_to_so_many_failures(
    make_recipe: MakeRecipe, words: Any, rate: float, kept_failures: int
) -> None:
    # B.3: below 25 % is d > 12, below 50 % is d > 8. 0.3 · 16 = 4.8, so five passes are needed.
    rows = [row(f"d{d:02}", labels(d)) for d in range(17)]

    pool, _ = filter_problems(table(rows), make_recipe(min_pass_rate=rate), tokenizer=words)

    assert pool["student_failures"].to_pylist() == list(range(kept_failures + 1))


@pytest.mark.parametrize("num_solved", [0, 8, 9, 10, 17, 18, 27, 63, 71, 90])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.29, 1.0])
def test_unsolved_cap_is_exact(make_recipe: MakeRecipe, words: Any, num_solved: int, share: float) -> None:
    rows = [row(f"s{i:03}", labels(5)) for i in range(num_solved)] + [row(f"u{i:03}", labels(16)) for i in range(40)]
    exact = Fraction(str(share))
    expected = max(u for u in range(41) if u <= exact * (num_solved + u))
    recipe = make_recipe(max_unsolved_share=share)
    if num_solved + expected == 0:
        with pytest.raises(
            DataError, match=r"rule max_unsolved_share dropped the most, 40 .*raise stage1\.data\.max_un"
        ):
            filter_problems(table(rows), recipe, tokenizer=words)
        return

    pool, report = filter_problems(table(rows), recipe, tokenizer=words)

    assert pool["student_failures"].to_pylist().count(16) == expected
    assert report.dropped("max_unsolved_share") == 40 - expected


def test_rows_without_the_students_label_do_not_count_as_solved(make_recipe: MakeRecipe, words: Any) -> None:
    rows = [
        *(row(f"s{i}", labels(5)) for i in range(9)),
        *(row(f"x{i:02}", None) for i in range(50)),
        *(row(f"u{i}", labels(16)) for i in range(5)),
    ]
    recipe = make_recipe(max_unsolved_share=0.1, missing_labels="keep")

    pool, report = filter_problems(table(rows), recipe, tokenizer=words)

    assert pool["student_failures"].to_pylist().count(16) == 1
    assert pool["student_failures"].null_count == 50
    assert report.dropped("missing_labels") == 0
    assert "50 rows without a label" in {r.rule: r.description for r in report.rules}["missing_labels"]


def test_a_missing_label_is_no_failure(make_recipe: MakeRecipe, words: Any) -> None:
    rows = [row("student only", [(SMALL, 16)]), row("all", labels(16, 16, 16)), row("no student", [(MIDDLE, 16)])]
    recipe = make_recipe(drop_all_failed=True, missing_labels="keep")
    pool, report = filter_problems(table(rows), recipe, tokenizer=words)
    assert ids(pool) == ["no student", "student only"]
    assert report.dropped("drop_all_failed") == 1


def test_the_sample_keeps_the_cap_where_labels_are_missing(make_recipe: MakeRecipe, words: Any) -> None:
    """Unlabelled problems do not count as solved in the sample either."""
    rows = [
        *(row(f"s{i:02}", labels(5)) for i in range(36)),
        *(row(f"x{i:03}", None) for i in range(200)),
        *(row(f"u{i}", labels(16)) for i in range(4)),
    ]
    seen = set()
    for seed in range(10):
        recipe = make_recipe(max_unsolved_share=0.1, max_problems=40, missing_labels="keep", values={"seed": seed})
        pool, _ = filter_problems(table(rows), recipe, tokenizer=words)
        found = pool["student_failures"].to_pylist()
        assert len(found) == 40
        assert found.count(16) <= 0.1 * (found.count(5) + found.count(16))
        seen.add((found.count(5), found.count(16)))
    assert len(seen) > 1


def test_max_problems_is_a_seeded_sample_that_keeps_the_cap(make_recipe: MakeRecipe, words: Any) -> None:
    rows = [row(f"s{i:03}", labels(5)) for i in range(180)] + [row(f"u{i:03}", labels(16)) for i in range(60)]
    pools = []
    for seed in range(12):
        recipe = make_recipe(max_unsolved_share=0.1, max_problems=30, values={"seed": seed})
        pool, report = filter_problems(table(rows), recipe, tokenizer=words)
        assert pool.num_rows == 30
        assert report.dropped("max_unsolved_share") == 40
        assert report.dropped("max_problems") == 170
        assert pool["student_failures"].to_pylist().count(16) <= 3
        pools.append(tuple(ids(pool)))
    assert len(set(pools)) == 12
    # The two choices are independent: a problem kept by the cap is no likelier to be sampled than another.
    unsolved = [sum(name.startswith("u") for name in pool) for pool in pools]
    assert 0 < sum(unsolved) < 36


def test_stages_draw_different_samples(make_recipe: MakeRecipe, words: Any) -> None:
    rows = table([row(f"s{i:03}", labels(5)) for i in range(100)])
    first, _ = filter_problems(rows, make_recipe(max_problems=10), tokenizer=words)
    second, _ = filter_problems(rows, make_recipe(max_problems=10, stage="stage2"), tokenizer=words)
    assert set(second["stage"].to_pylist()) == {"stage2"}
    assert ids(first) != ids(second)


def test_the_last_stage_is_the_default(make_recipe: MakeRecipe, words: Any) -> None:
    stage = make_recipe().model_dump(mode="json")["stage1"]
    recipe = make_recipe(values={"stage2": {**stage, "max_prompt_tokens": 7}})
    pool, report = filter_problems(table([row("a", None)]), recipe, tokenizer=words, stage="stage1")
    assert (pool.num_rows, report.stage) == (1, "stage1")
    with pytest.raises(
        DataError, match=r"stage2: no problem is left of 1; rule max_prompt_tokens .*stage2\.max_prompt"
    ):
        filter_problems(table([row("a", None)]), recipe, tokenizer=words)
    with pytest.raises(RecipeError, match="has no stage 'stage3'; it has stage1, stage2"):
        filter_problems(table([row("a", None)]), recipe, tokenizer=words, stage="stage3")


def test_of_duplicates_the_best_labelled_row_stays(make_recipe: MakeRecipe, words: Any) -> None:
    rows = [
        row("a", None, "same\nquestion"),
        row("b", labels(4), " same question"),
        row("c", labels(5), "same \u00a0 question"),
        row("d", labels(5), "Same question"),  # letter case is kept apart
        row("e", labels(5), "caf\u00e9"),
        row("f", labels(5), "cafe\u0301"),
    ]
    for seed in range(5):
        random.Random(seed).shuffle(rows)
        pool, report = filter_problems(table(rows), make_recipe(), tokenizer=words)
        assert ids(pool) == ["b", "d", "e"]
        assert report.dropped("duplicates") == 3


def test_of_duplicates_that_differ_in_labels_alone_the_order_does_not_choose(
    make_recipe: MakeRecipe, words: Any
) -> None:
    rows = [row("a", labels(small, middle), "one question") for small in (3, 9, 12) for middle in (2, 7)]
    kept = set()
    for seed in range(8):
        random.Random(seed).shuffle(rows)
        pool, _ = filter_problems(table(rows), make_recipe(missing_labels="keep"), tokenizer=words)
        kept.add(tuple(pool["student_failures"].to_pylist()))
    assert kept == {(3,)}


def test_labels_are_checked_against_the_recipe_that_filters(make_recipe: MakeRecipe, words: Any) -> None:
    """A table read with 16 samples a label is no table of a recipe with 8."""
    read = table([row("a", labels(12))]).replace_schema_metadata(dropping(0))
    assert filter_problems(read, make_recipe(), tokenizer=words)[0].num_rows == 1
    with pytest.raises(
        DataError, match=r"table row 1, field 'failures\.DeepSeek-R1-Distill-Qwen-1\.5B': 12 is outside"
    ):
        filter_problems(read, make_recipe(difficulty={"num_samples": 8}), tokenizer=words)


def test_a_prompt_of_just_the_limit_stays(make_recipe: MakeRecipe, words: Any) -> None:
    # The template adds 12 words to the question's.
    rows = [row("at", None, "w " * 8), row("above", None, "w " * 9)]
    pool, report = filter_problems(table(rows), make_recipe(max_prompt_tokens=20), tokenizer=words)
    assert ids(pool) == ["at"]
    assert len(pool["prompt_token_ids"][0]) == 20
    assert report.dropped("max_prompt_tokens") == 1


def test_duplicates_are_found_across_chunks(make_recipe: MakeRecipe, words: Any) -> None:
    chunked = pa.concat_tables([table([row(f"{name}{i}", None, f"q{i}") for i in range(3)]) for name in "abc"])
    pool, report = filter_problems(chunked, make_recipe(), tokenizer=words)
    assert ids(pool) == ["a0", "a1", "a2"]
    assert report.dropped("duplicates") == 6


def test_labels_are_read_from_slices_with_gaps() -> None:
    rows: list[Any] = [None, [("a", 1), ("b", 2)], [], [("b", 3)], None, [("a", None), ("b", 5)], [("a", 0)]]
    failures = pa.array(rows, PROBLEM_SCHEMA.field("failures").type)
    for start, end in ((0, 7), (1, 6), (3, 4), (2, 2)):
        column = pa.chunked_array([failures, failures.slice(start, end - start)])
        problems = pa.table({"failures": column})
        for name, expected in (("a", [-1, 1, -1, -1, -1, -1, 0]), ("b", [-1, 2, -1, 3, -1, 5, -1]), ("c", [-1] * 7)):
            assert label_column(problems, name).tolist() == [*expected, *expected[start:end]]


MIXED = [
    *(row(f"s{i:02}", labels(i % 15, i % 7, i % 3)) for i in range(40)),
    *(row(f"u{i:02}", labels(16, 16 - i % 2, 16)) for i in range(20)),
    *(row(f"x{i:02}", labels(None, 3)) for i in range(6)),
    *(row(f"t{i:02}", labels(i), f"question s{i:02}  ") for i in range(6)),
    row("t06", labels(9), "question s01 "),
]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(len(MIXED))), cuts=st.sets(st.integers(1, len(MIXED) - 1), max_size=3))
def test_the_input_order_never_matters(make_recipe: MakeRecipe, words: Any, order: list[int], cuts: set[int]) -> None:
    recipe = make_recipe(missing_labels="drop", max_problems=25, **PAPER_RULES)
    expected, expected_report = filter_problems(table(MIXED), recipe, tokenizer=words)
    edges = [0, *sorted(cuts), len(MIXED)]
    shuffled = [MIXED[i] for i in order]
    parts = [table(shuffled[a:b]) for a, b in pairwise(edges)]

    pool, report = filter_problems(pa.concat_tables(parts), recipe, tokenizer=words)

    assert pool.to_pylist() == expected.to_pylist()
    assert report == expected_report


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.tuples(*[st.one_of(st.none(), st.integers(0, 16), st.just(16))] * 3), min_size=1, max_size=60),
    bound=st.one_of(st.none(), st.integers(1, 16)),
    all_failed=st.booleans(),
    rate=st.one_of(st.none(), st.sampled_from([0.1, 0.25, 0.5])),
    share=st.one_of(st.none(), st.sampled_from([0.0, 0.1, 0.3, 0.5])),
    size=st.one_of(st.none(), st.integers(1, 40)),
    missing=st.sampled_from(["keep", "drop"]),
)
def test_the_rules_hold_on_the_result_and_the_report_adds_up(
    make_recipe: MakeRecipe,
    words: Any,
    counts: list[tuple[int | None, int | None, int | None]],
    bound: int | None,
    all_failed: bool,
    rate: float | None,
    share: float | None,
    size: int | None,
    missing: str,
) -> None:
    rows = [row(f"p{i:03}", labels(*count) or None) for i, count in enumerate(counts)]
    recipe = make_recipe(
        drop_passes_at_least=bound,
        drop_all_failed=all_failed,
        min_pass_rate=rate,
        max_unsolved_share=share,
        max_problems=size,
        missing_labels=missing,
    )
    try:
        pool, report = filter_problems(table(rows), recipe, tokenizer=words)
    except DataError as error:
        assert "no problem is left" in str(error)  # noqa: PT017 - an empty pool is a possible result
        return
    assert report.rows_in - sum(rule.dropped for rule in report.rules) == report.rows_out == pool.num_rows
    assert report.rows_in == len(rows)
    by_id = {f"p{i:03}": count for i, count in enumerate(counts)}
    kept = [by_id[name] for name in ids(pool)]
    student = [count[0] for count in kept]
    assert pool["student_failures"].to_pylist() == student
    known = [d for d in student if d is not None]
    assert bound is None or all(16 - d < bound for d in known)
    assert not all_failed or (16, 16, 16) not in kept
    assert rate is None or all((16 - d) / 16 >= rate for d in known)
    assert share is None or known.count(16) <= Fraction(str(share)) * len(known)
    assert size is None or len(kept) <= size


def test_missing_labels_fail_by_default_and_name_the_remedy(make_recipe: MakeRecipe, words: Any) -> None:
    rows = table([row("b", labels(3)), row("a", None), row("c", labels(None, 2))])
    with pytest.raises(DataError) as caught:
        filter_problems(rows, make_recipe(drop_passes_at_least=15), tokenizer=words)
    assert str(caught.value) == (
        "stage1: 2 of 3 problems lack a difficulty label of DeepSeek-R1-Distill-Qwen-1.5B, first a; "
        "set stage1.data.missing_labels=drop or keep"
    )
    pool, report = filter_problems(rows, make_recipe(), tokenizer=words)  # no rule reads a label
    assert (pool.num_rows, report.dropped("missing_labels")) == (3, 0)


def test_an_unknown_label_name_is_told_apart_from_missing_labels(make_recipe: MakeRecipe, words: Any) -> None:
    recipe = make_recipe(min_pass_rate=0.5, difficulty={"student": "Qwen-1.5B"})
    with pytest.raises(
        DataError, match=r"no row has the difficulty label Qwen-1\.5B \(labels found: DeepSeek-.*data\.dif"
    ):
        filter_problems(table([row("a", labels(3))]), recipe, tokenizer=words)


def test_an_empty_result_names_the_rule_that_dropped_the_most(make_recipe: MakeRecipe, words: Any) -> None:
    rows = [row("a", labels(16, 16, 16)), *(row(f"e{i}", labels(0)) for i in range(3))]
    with pytest.raises(DataError) as caught:
        filter_problems(table(rows), make_recipe(**PAPER_RULES), tokenizer=words)
    assert str(caught.value) == (
        "stage1: no problem is left of 4; rule drop_passes_at_least dropped the most, 3 (student passes ≥ 15 of 16 "
        "(failures ≤ 1), B.1.1); raise stage1.data.drop_passes_at_least or give harder problems"
    )


def test_an_empty_input_says_so(make_recipe: MakeRecipe, words: Any) -> None:
    with pytest.raises(DataError, match=r"stage1: the input has no rows; give files .* stage1\.data\.files"):
        filter_problems(table([]), make_recipe(**PAPER_RULES), tokenizer=words)


def test_two_questions_under_one_id_are_refused(make_recipe: MakeRecipe, words: Any) -> None:
    rows = [row("a", None, "one"), row("a", None, "two"), row("b", None)]
    with pytest.raises(
        DataError, match=r"problem_id 'a' stands on more than one question \(source test\); make the ids unique"
    ):
        filter_problems(table(rows), make_recipe(), tokenizer=words)


def test_raw_columns_are_normalised_first(make_recipe: MakeRecipe, words: Any) -> None:
    raw = pa.table({"problem": ["one", " ", "three"], "answer": ["1", "2", None]})
    with pytest.raises(
        DataError, match=r"table row 2, field 'problem': empty; drop the row or set <stage>\.data\.on_error"
    ):
        filter_problems(raw, make_recipe(), tokenizer=words)
    pool, report = filter_problems(raw, make_recipe(on_error="drop", max_malformed_share=0.7), tokenizer=words)
    assert (report.rows_in, report.dropped("malformed"), pool.num_rows) == (3, 2, 1)
    assert ids(pool) == [f"q-{hashlib.sha256(b'one').hexdigest()[:16]}"]


def test_a_missing_student_is_a_model_error(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ModelError, match=r"student\.path no-such-model is no directory"):
        filter_problems(table([row("a", None)]), make_recipe())


def test_report_must_add_up_and_survives_json() -> None:
    rules = (RuleCount(rule="duplicates", dropped=2, description="d"),)
    report = FilterReport(stage="stage1", rows_in=5, rules=rules, rows_out=3)
    assert FilterReport.from_json(report.to_json()) == report
    assert report.to_text().splitlines()[3].split() == ["duplicates", "2", "3", "d"]
    with pytest.raises(ValueError, match="rules leave 3 rows, rows_out is 4"):
        FilterReport(stage="stage1", rows_in=5, rules=rules, rows_out=4)


def dropping(count: int) -> dict[bytes, bytes]:
    """Metadata of a table of which so many rows were malformed."""
    reading = Reading()
    reading.malformed.add("reason", "first", count)
    return reading.metadata()


def conflicting() -> list[dict[str, Any]]:
    """Two questions with different answers, one with other spellings of one answer, one asked once."""
    return [
        {**row("a", labels(4), "one"), "answer": "1"},
        {**row("b", labels(4), "two"), "answer": "0.5"},
        {**row("c", labels(4), "one "), "answer": "2"},
        {**row("d", labels(4), "two"), "answer": r"\frac{1}{2}"},
        {**row("e", labels(4), "three"), "answer": "3"},
        {**row("f", labels(4), "four"), "answer": "4"},
        {**row("g", labels(4), "four"), "answer": "5"},
        {**row("h", labels(4), "four"), "answer": "4"},
    ]


def test_questions_with_different_answers_are_dropped_and_told(
    make_recipe: MakeRecipe, words: Any, tmp_path: Path
) -> None:
    pool, report = filter_problems(table(conflicting()), make_recipe(), tokenizer=words)
    assert ids(pool) == ["b", "e"]
    assert (report.dropped("conflicting_answers"), report.dropped("duplicates")) == (5, 1)
    number = "2 questions with different answers"
    assert {rule.rule: rule.description for rule in report.rules}["conflicting_answers"] == number
    assert report.notes == (f"conflicting_answers: {number}, the first: table row 1 '1', table row 3 '2'",)

    pool, report = filter_problems(table(conflicting()), make_recipe(conflicting_answers="keep"), tokenizer=words)
    assert ids(pool) == ["a", "b", "e", "f"]
    assert (report.dropped("conflicting_answers"), report.dropped("duplicates")) == (0, 4)
    assert report.notes == (f"conflicting_answers: {number}, the first: table row 1 '1', table row 3 '2'",)

    with pytest.raises(
        DataError,
        match=f"stage1: {number}, the first: table row 1 '1', table row 3 '2'; correct the answers, remove the",
    ):
        filter_problems(table(conflicting()), make_recipe(conflicting_answers="fail"), tokenizer=words)

    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({**one, "failures": dict(one["failures"])}) + "\n" for one in conflicting()))
    read = read_problems(make_recipe(files=[str(file)]).stage("stage1").data)
    _, report = filter_problems(read, make_recipe(), tokenizer=words)
    assert report.notes == (f"conflicting_answers: {number}, the first: {file} row 1 '1', {file} row 3 '2'",)

    many = [{**row(str(i), labels(4), "one"), "answer": "2" if i == 8 else "1"} for i in range(9)]
    _, report = filter_problems(table([*many, *conflicting()[4:5]]), make_recipe(), tokenizer=words)
    assert report.notes[0].endswith("the first: table row 1 '1', table row 9 '2'"), "each answer once"
