"""Format rules (B.1.2): one row per rule of kdrl_core/verify/screening.py, and the finding of the answer."""

import time

import pytest

from kdrl_core.types import ThinkOpened, VerdictKind
from kdrl_core.verify import check_format
from kdrl_core.verify.screening import answer_region, last_box

MALFORMED, NO_ANSWER = VerdictKind.MALFORMED, VerdictKind.NO_ANSWER


@pytest.mark.parametrize(
    ("response", "kind", "answer"),
    [
        (r"<think>a</think>\boxed{42}", None, "42"),
        ("\n <think>\na\n</think>\n\nSo it is $\\boxed{42}$.\n", None, "42"),
        (r"<think></think>\boxed{42}", None, "42"),
        (r"<think>a</think>\boxed {42}", None, "42"),
        (r"<think>a</think>\\boxed{42}", None, "42"),  # escaped once too often
        (r"<think>\boxed{1}</think>\boxed{42}", None, "42"),  # a box in the thought does not count
        (r"<think>a</think>first \boxed{1}, no: it is really \boxed{42}", None, "42"),
        (r"<think>\boxed{42}</think>so that is it", NO_ANSWER, None),
        (r"<think>a</think>the answer is 42", NO_ANSWER, None),
        (r"<think>a</think>\boxed{}", NO_ANSWER, ""),
        (r"<think>a</think>\boxed{ }", NO_ANSWER, ""),
        (r"<think>a</think>\boxed{42} within \boxed{}.", NO_ANSWER, ""),  # the prompt echoed after the answer
        (r"<think>a</think>\boxed{42", MALFORMED, None),  # cut off
        (r"<think>a</think>\boxed{1} then \boxed{\frac{1}{2}", MALFORMED, "1"),
        (r"<think>a long thought that is cut off, \boxed{42}", MALFORMED, None),
        (r"a</think>\boxed{42}", MALFORMED, "42"),
        (r"\boxed{42}", MALFORMED, "42"),
        (r"<think>a</think><think>b</think>\boxed{42}", MALFORMED, "42"),
        (r"<think>a<think>b</think>\boxed{42}", MALFORMED, "42"),
        (r"<think>a</think>b</think>\boxed{42}", MALFORMED, "42"),
        (r"</think>a<think>\boxed{42}", MALFORMED, None),
        (r"Sure! <think>a</think>\boxed{42}", MALFORMED, "42"),
        (r"<THINK>a</THINK>\boxed{42}", MALFORMED, "42"),
        ("", MALFORMED, None),
    ],
)
def test_structure_when_the_response_opens_the_thought(
    response: str, kind: VerdictKind | None, answer: str | None
) -> None:
    result = check_format(response)
    assert (result.kind, result.answer) == (kind, answer), result.reason
    assert result.reward == (1.0 if kind is None else 0.0)
    assert result.reason


@pytest.mark.parametrize(
    ("response", "kind", "answer"),
    [
        (r"a</think>\boxed{42}", None, "42"),
        (r"</think>\boxed{42}", None, "42"),
        (r"<think>a</think>\boxed{42}", MALFORMED, "42"),
        (r"a \boxed{42}", MALFORMED, None),  # everything is thought
        (r"a</think>b</think>\boxed{42}", MALFORMED, "42"),
        (r"a</think>42", NO_ANSWER, None),
    ],
)
def test_structure_when_the_prompt_opened_the_thought(
    response: str, kind: VerdictKind | None, answer: str | None
) -> None:
    result = check_format(response, think_opened=True)
    assert (result.kind, result.answer) == (kind, answer), result.reason


@pytest.mark.parametrize(
    ("response", "kind", "answer"),
    [
        (r"\boxed{42}", None, "42"),
        (r"  So it is $\boxed{42}$.", None, "42"),
        (r"<think>a</think>\boxed{42}", MALFORMED, "42"),
        (r"a</think>\boxed{42}", MALFORMED, "42"),
        (r"\boxed{42} <think>a", MALFORMED, "42"),
        (r"\boxed{42", MALFORMED, None),
        ("42", NO_ANSWER, None),
    ],
)
def test_structure_when_the_prompt_closed_the_thought(
    response: str, kind: VerdictKind | None, answer: str | None
) -> None:
    result = check_format(response, think_opened="closed")
    assert (result.kind, result.answer) == (kind, answer), result.reason
    assert result.reward == (1.0 if kind is None else 0.0)


@pytest.mark.parametrize(
    ("text", "answer", "is_last_closed"),
    [
        ("nothing", None, True),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
        (r"\boxed{\left\{1,2\right.}", r"\left\{1,2\right.", True),  # an escaped brace is no brace
        (r"\boxed{\{1,2\}}", r"\{1,2\}", True),
        (r"\boxed{\begin{matrix}1\\{2}\end{matrix}}", r"\begin{matrix}1\\{2}\end{matrix}", True),
        (r"\boxed{\boxed{5}}", "5", True),
        ("{ } } { " + r"\boxed{5}", "5", True),
        (r"\boxed{1 and on, then \boxed{5}", "5", True),  # the one that never closes came before
        (r"\boxed", None, True),
        (r"\boxed5", None, True),
        # several boxes with nothing but separators between them are one answer
        (r"\boxed{1}, \boxed{2} and \boxed{3}", "1, 2, 3", True),
        (r"$\boxed{1} \quad \text{or} \quad \boxed{2}$", "1, 2", True),
        (r"\boxed{1}\[\boxed{1}\]", "1", True),
        (r"\boxed{1} is wrong, \boxed{2}", "2", True),
    ],
)
def test_last_box(text: str, answer: str | None, is_last_closed: bool) -> None:
    assert last_box(text) == (answer, is_last_closed)


@pytest.mark.parametrize(
    ("response", "think_opened", "region"),
    [
        ("a<think>b</think>c", False, "c"),
        ("b</think>c", True, "c"),
        ("b</think>c</think>d", True, "d"),
        ("a<think>b", False, "a"),
        ("b", True, ""),
        ("b</think>c<think>d", True, "c"),
        ("a", False, "a"),
        ("a", "closed", "a"),
        ("a<think>b", "closed", "a"),
        ("b</think>c", "closed", "c"),
    ],
)
def test_answer_region(response: str, think_opened: ThinkOpened, region: str) -> None:
    assert answer_region(response, think_opened=think_opened) == region


@pytest.mark.parametrize(
    "flood",
    [
        "{" * 1_000_000,
        "}" * 1_000_000,
        r"\boxed{" * 140_000,
        r"\boxed{1}" * 110_000,
        r"\boxed{a}, " * 90_000,
        r"\boxed" + " " * 1_000_000,
        r"\boxed{" + "9" * 1_000_000 + "}",
        "\\" * 1_000_000,
        "<think>" * 140_000,
    ],
)
def test_a_million_characters_take_linear_time(flood: str) -> None:
    started = time.perf_counter()
    check_format("<think></think>" + flood)
    check_format(flood, think_opened=True)
    assert time.perf_counter() - started < 5.0  # 0.1 to 0.6 s; quadratic would take minutes
