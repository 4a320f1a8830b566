"""The miniature's task: its arithmetic by hand, and that what is measured on was never trained on."""

import json
import random
import re

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdrl_core.config import resolve_path
from kdrl_core.data.schema import SKYWORK_SCHEMA
from kdrl_core.miniature.models import END, build_tokenizer
from kdrl_core.miniature.world import HARD_LENGTHS, LENGTHS, bracket, sample_questions, solve, solve_result_first

BENCHMARKS = ("validation", "test", "hard", "ood")


@pytest.mark.parametrize(
    ("question", "response", "answer"),
    [
        ("3+5*2", "<think>3+5=8,8*2=6</think>\\boxed{6}", "6"),  # left to right: (3 + 5) · 2 = 16 → 6
        ("1-4", "<think>1-4=7</think>\\boxed{7}", "7"),  # −3 → 7
        ("9*9-5+7", "<think>9*9=1,1-5=6,6+7=3</think>\\boxed{3}", "3"),
        ("0*7+0", "<think>0*7=0,0+0=0</think>\\boxed{0}", "0"),
    ],
)
def test_solve_golden(question: str, response: str, answer: str) -> None:
    assert solve(question) == (response, answer)


def test_a_chain_worked_result_first_golden() -> None:
    assert solve_result_first("3+5*2") == "<think>8=3+5,6=8*2</think>\\boxed{6}"
    assert solve_result_first("1-4") == "<think>7=1-4</think>\\boxed{7}"


@pytest.mark.parametrize(("question", "written"), [("3+5", "3+5"), ("3+5*2", "(3+5)*2"), ("9*9-5+7", "((9*9)-5)+7")])
def test_brackets_say_in_which_order_a_chain_is_read(question: str, written: str) -> None:
    assert bracket(question) == written


def test_out_of_domain_problems_are_in_brackets_which_nothing_is_trained_on() -> None:
    lines = resolve_path("builtin:miniature/benchmarks/ood.jsonl").read_text().splitlines()
    problems = [json.loads(line)["problem"] for line in lines]
    assert len(problems) == 128
    assert all(problem == bracket(re.sub("[()]", "", problem)) and "(" in problem for problem in problems)
    trained_on = [question for name in ("stage1", "stage2") for question, _ in _problems()[name]]
    assert not any("(" in question for question in trained_on)


@given(st.integers(0, 9), st.lists(st.tuples(st.sampled_from("+-*"), st.integers(0, 9)), min_size=1, max_size=9))
def test_answer_is_the_chain_modulo_ten(first: int, steps: list[tuple[str, int]]) -> None:
    value = first
    for operator, digit in steps:
        value = {"+": value + digit, "-": value - digit, "*": value * digit}[operator]
    question = str(first) + "".join(f"{operator}{digit}" for operator, digit in steps)
    response, answer = solve(question)
    assert answer == str(value % 10)
    assert response.endswith(f"</think>\\boxed{{{answer}}}")
    assert response.count("=") == len(steps)


def test_questions_are_distinct_and_of_the_lengths_asked_for() -> None:
    exclude = set(sample_questions(random.Random(1), 50, LENGTHS, exclude=set()))
    questions = sample_questions(random.Random(1), 400, LENGTHS, exclude=exclude)
    assert len(set(questions)) == 400
    assert not exclude & set(questions)
    assert {len(re.findall(r"\d", question)) for question in questions} == set(LENGTHS)
    assert all(re.fullmatch(r"\d([+*-]\d)+", question) for question in questions)


def test_tokenizer_round_trips_and_ends() -> None:
    tokenizer = build_tokenizer()
    text = "<|user|>3+5*2<|assistant|>" + solve("3+5*2")[0] + END
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "3+5*2" + solve("3+5*2")[0]
    assert len(ids) == 1 + 5 + 1 + 1 + 5 + 1 + 5 + 1 + 1 + 1 + 1 + 1  # each tag and each character is a token


def _problems() -> dict[str, list[tuple[str, str]]]:
    """Question, without its brackets, and answer of everything shipped."""
    found = {}
    for name in BENCHMARKS:
        lines = resolve_path(f"builtin:miniature/benchmarks/{name}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        found[name] = [(re.sub("[()]", "", row["problem"]), row["answer"]) for row in rows]
    rows = json.loads(resolve_path("builtin:miniature/stage1.json").read_text())
    found["stage1"] = [(row["problem"], row["answer"]) for row in rows]
    table = pq.read_table(resolve_path("builtin:miniature/stage2.parquet"))
    found["stage2"] = [
        (row["prompt"][0]["content"], json.loads(row["reward_model"]["ground_truth"])[0]) for row in table.to_pylist()
    ]
    return found


def test_shipped_answers_are_right() -> None:
    for problems in _problems().values():
        assert problems
        assert all(solve(question)[1] == answer for question, answer in problems)


def test_shipped_benchmarks_and_training_problems_do_not_overlap() -> None:
    sets = {name: {question for question, _ in problems} for name, problems in _problems().items()}
    for name in BENCHMARKS:
        for other in sets.keys() - {name}:
            assert not sets[name] & sets[other], (name, other)
    assert not sets["stage1"] & sets["stage2"]


def test_hard_chains_are_longer_than_any_trained_on() -> None:
    lengths = {name: {(len(q) + 1) // 2 for q, _ in problems} for name, problems in _problems().items()}
    assert lengths["hard"] <= set(HARD_LENGTHS)
    for name in ("stage1", "stage2", "validation", "test"):
        assert lengths[name] <= set(LENGTHS)
    assert max(LENGTHS) < min(HARD_LENGTHS)


def test_shipped_labels_are_failures_out_of_sixteen() -> None:
    table = pq.read_table(resolve_path("builtin:miniature/stage2.parquet"))
    assert table.schema.equals(SKYWORK_SCHEMA)
    labels = [row["model_difficulty"] for row in table["extra_info"].to_pylist()]
    assert all(0 <= count <= 16 for row in labels for count in row.values())
    means = {name: sum(row[name] for row in labels) / len(labels) for name in labels[0]}
    assert means["DeepSeek-R1-Distill-Qwen-1.5B"] > means["DeepSeek-R1-Distill-Qwen-7B"]  # the student fails more
