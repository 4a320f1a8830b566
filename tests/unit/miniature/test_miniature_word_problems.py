"""Sums and word problems of the recipe smollm2-zero: worked out by hand, the same from one seed, none in two files."""

import json
import re
from pathlib import Path

import pyarrow.parquet as pq

from kdrl_core.config import load_recipe, resolve_path
from kdrl_core.data import PROBLEM_SCHEMA
from kdrl_core.miniature.word_problems import KINDS, OTHER_KINDS, SIZES, build_word_problems, problems

ASSETS = resolve_path("builtin:word_problems/test.jsonl").parent
LABEL = "SmolLM2-135M-Instruct"

GOLDEN: dict[str, tuple[tuple[int, ...], str, str]] = {
    "sum": ((16, 6), "16 + 6 = ?", "22"),
    "difference": ((12, 2), "12 - 2 = ?", "10"),
    "product": ((2, 13), "2 * 13 = ?", "26"),
    "bought": ((18, 4), "18 apples, 4 more are bought. How many apples are there?", "22"),
    "eaten": ((24, 2), "24 apples, 2 are eaten. How many apples are left?", "22"),
    "boxes": ((9, 10), "9 boxes of 10 pens. How many pens?", "90"),
    "three": ((3, 4, 3), "3 + 4 + 3 = ?", "10"),
    "boxes-and-more": ((2, 7, 5), "2 boxes of 7 pens and 5 more pens. How many pens?", "19"),  # 14 + 5
    "twice": ((13,), "13 apples, and twice as many pens. How many pens?", "26"),
}


def test_questions_and_answers_golden() -> None:
    kinds = {kind.name: kind for kind in (*KINDS, *OTHER_KINDS)}
    assert kinds.keys() == GOLDEN.keys()
    for name, (values, *expected) in GOLDEN.items():
        row = kinds[name].row(values)
        assert [row["problem"], row["answer"]] == expected


def test_the_first_problems_of_the_seed_golden() -> None:
    assert [row["problem"] for row in problems()["train"][:3]] == ["16 + 6 = ?", "12 - 2 = ?", "2 * 13 = ?"]


def test_shipped_problems_are_what_the_command_builds(tmp_path: Path) -> None:
    build_word_problems(tmp_path)
    for name in SIZES:
        assert (ASSETS / f"{name}.jsonl").read_bytes() == (tmp_path / f"{name}.jsonl").read_bytes()
    built = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    shipped = pq.read_table(ASSETS / "train.parquet", schema=PROBLEM_SCHEMA).to_pylist()
    names = {"problem_id": "id", "question": "problem", "answer": "answer", "source": "source"}
    assert [{name: row[name] for name in names} for row in shipped] == [
        {name: row[column] for name, column in names.items()} for row in built
    ]


def test_no_problem_is_in_two_files() -> None:
    questions = [row["problem"] for rows in problems().values() for row in rows]
    assert len(set(questions)) == len(questions) == sum(SIZES.values()) + 432  # 72 of each of six kinds


def test_problems_with_their_numbers_exchanged_are_as_many_as_told() -> None:
    found = {name: [(row["source"], row["id"].split("-")[1:]) for row in rows] for name, rows in problems().items()}
    exchanged = [(source, numbers[::-1]) for source, numbers in found["train"]]
    assert [sum(one in exchanged for one in found[name]) for name in ("test", "hard")] == [15, 8]


def test_harder_problems_have_other_numbers_and_the_same_kinds() -> None:
    found = problems()
    kinds = {name: {row["source"] for row in rows} for name, rows in found.items()}
    assert kinds["hard"] == kinds["train"] == kinds["test"] == kinds["validation"]
    assert not kinds["ood"] & kinds["train"]
    largest = {row["source"]: 0 for row in found["train"]}
    for row in found["train"]:
        largest[row["source"]] = max(largest[row["source"]], int(re.findall(r"\d+", row["problem"])[0]))
    assert all(int(re.findall(r"\d+", row["problem"])[0]) > largest[row["source"]] for row in found["hard"])


def test_labels_are_measured_and_leave_a_pool_between_10_and_60_percent() -> None:
    stage = load_recipe("smollm2-zero").stage("stage2")
    table = pq.read_table(ASSETS / "train.parquet")
    origin = json.loads(table.schema.metadata[f"kdrl.label.{LABEL}".encode()])
    assert origin["model"].startswith("SmolLM2-135M-Instruct.Q4_1")
    assert (origin["samples"], origin["temperature"]) == (16, stage.temperature)
    assert origin["max_response_tokens"] == stage.max_response_tokens
    failures = [dict(each)[LABEL] for each in table["failures"].to_pylist()]
    assert all(0 <= count <= 16 for count in failures)
    assert (stage.data.min_pass_rate, stage.data.drop_passes_at_least) == (0.1, 10)
    kept = [count for count in failures if 16 - 9 <= count <= 16 - 2]  # 2 to 9 of 16 are right: 12 to 56 %
    assert len(kept) >= 200
