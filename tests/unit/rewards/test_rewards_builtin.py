"""The functions that kdrl ships: golden values."""

import json

import pytest

from kdrl_core.boxes.preflight import check_rewards
from kdrl_core.config import load_recipe
from kdrl_core.config.answers import BUILT_IN_REWARDS
from kdrl_core.errors import RecipeError
from kdrl_core.rewards import builtin

PROBLEM = {"problem_id": "q", "length": 0, "think_opened": False}
SCHEMA = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}


def test_the_recipe_knows_the_same_functions() -> None:
    assert tuple(builtin.BUILT_IN_FUNCTIONS) == BUILT_IN_REWARDS


def boxed(text: str) -> str:
    return rf"<think>\boxed{{0}}</think>\boxed{{{text}}}"


@pytest.mark.parametrize(
    ("function", "response", "answer", "arguments", "value"),
    [
        ("exact", boxed("a  b"), "a b", {}, 1.0),
        ("exact", boxed("A"), "a", {}, 0.0),
        ("exact", boxed("A"), "a", {"ignore_case": True}, 1.0),
        ("exact", "a", "a", {}, 0.0),  # no box
        ("exact", "answer: 1\nanswer: 2", "2", {"pattern": r"answer: (\d)"}, 1.0),
        ("exact", "answer: 2 or\nanswer: ", "2", {"pattern": r"answer: (\d)?"}, 0.0),  # the last has no group
        ("choice", boxed("(B)"), "B", {}, 1.0),
        ("choice", boxed("C"), "B", {}, 0.0),
        ("choice", "<think>A</think>So it goes.\nThe answer is (B)", "B", {}, 1.0),
        ("choice", "A or B", "B", {}, 0.0),
        ("numeric", boxed("1,234.5"), "1234.5", {}, 1.0),
        ("numeric", boxed(r"\frac{1}{2}"), "0.5", {}, 1.0),
        ("numeric", boxed("-3/4"), "-.75", {}, 1.0),
        ("numeric", boxed("3.14"), "3.14159", {}, 0.0),
        ("numeric", boxed("3.14"), "3.14159", {"absolute": 0.01}, 1.0),
        ("numeric", boxed("99"), "100", {"relative": 0.01}, 1.0),
        ("numeric", boxed("98.9"), "100", {"relative": 0.01}, 0.0),
        ("numeric", boxed("many"), "100", {}, 0.0),
        ("numeric", boxed("1/0"), "100", {}, 0.0),
        ("regex", "<think>yes</think>no", "", {"pattern": "yes"}, 0.0),
        ("regex", "<think>no</think>yes!", "", {"pattern": "yes"}, 1.0),
        ("regex", "<think>no</think>yes!", "", {"pattern": "yes", "is_whole": True}, 0.0),
        ("json_schema", '<think></think>{"n": 1}', "", {"schema": SCHEMA}, 1.0),
        ("json_schema", 'Here:\n```json\n{"n": 1}\n```\n', "", {"schema": SCHEMA}, 1.0),
        ("json_schema", '{"n": "1"}', "", {"schema": SCHEMA}, 0.0),
        ("json_schema", "{n: 1}", "", {"schema": SCHEMA}, 0.0),
    ],
)
def test_values(function: str, response: str, answer: str, arguments: dict, value: float) -> None:
    score = builtin.BUILT_IN_FUNCTIONS[function](response, answer, PROBLEM, **arguments)
    assert score.value == value
    assert score.reason


@pytest.mark.parametrize(
    ("length", "value"),
    [(1, 0.0), (60, 0.0), (61, -0.025), (80, -0.5), (100, -1.0), (101, -1.0)],
)
def test_the_length_penalty_is_dapos_equation_13(length: int, value: float) -> None:
    """L_max = 100, L_cache = 40: 0 up to 60 tokens, then ((100 − 40) − |y|) / 40, and −1 beyond 100."""
    problem = {**PROBLEM, "length": length}
    assert builtin.length_penalty("", "", problem, max_tokens=100, cache=40).value == pytest.approx(value)


@pytest.mark.parametrize("function", ["choice", "numeric"])
def test_a_truth_of_another_kind_is_an_error(function: str) -> None:
    with pytest.raises(ValueError, match="mend the problem"):
        builtin.BUILT_IN_FUNCTIONS[function](boxed("1"), "blue", PROBLEM)


@pytest.mark.parametrize(
    ("function", "arguments", "said"),
    [
        ("regex", {"pattern": "("}, "missing ), unterminated subpattern"),
        ("regex", {"pattern": "x", "is_whole": "false"}, "Input should be a valid boolean"),
        ("numeric", {"absolute": "0.1"}, "Input should be a valid number"),
        ("json_schema", {"schema": {"type": "integr"}}, "'integr' is not valid"),
        ("length_penalty", {"max_tokens": 10, "cache": 11}, "cache=11 must be above 0"),
    ],
)
def test_arguments_that_cannot_work_are_refused_before_a_run(function: str, arguments: dict, said: str) -> None:
    recipe = load_recipe(
        "miniature", [f"reward.functions=[{json.dumps({'function': function, 'arguments': arguments})}]"]
    )
    with pytest.raises(RecipeError, match=rf"field 'reward.functions.0.arguments': {function}: ") as told:
        check_rewards(recipe)
    assert said in str(told.value)
