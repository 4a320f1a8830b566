"""Golden verdicts: (ground truth, answer in the box) → kind, through real workers."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrl_core.rewards.builtin import math
from kdrl_core.types import Verdict, VerdictKind
from kdrl_core.verify import Verifier

CORRECT, WRONG = VerdictKind.CORRECT, VerdictKind.WRONG
NO_ANSWER, MALFORMED, ERROR = VerdictKind.NO_ANSWER, VerdictKind.MALFORMED, VerdictKind.ERROR


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(workers=1, timeout_s=20.0) as verifier:
        yield verifier


def boxed(answer: str) -> str:
    return rf"<think>a</think>The answer is $\boxed{{{answer}}}$."


RIGHT = [
    ("42", "42"),
    ("42", " 42 "),
    ("42", "$42$"),
    ("42", "042"),
    ("42", "42.0"),
    ("0.0001234", "1.234e-4"),
    ("1/1000!", r"\frac{1}{1000 \cdot 999!}"),
    ("0", r"\sqrt{2}\sqrt{3}-\sqrt{6}"),
    ("42", r"\text{42}"),
    (r"\boxed{42}", "42"),
    (r"$42$", "42"),
    (r"\$42", "42"),
    ("A", "A"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", r"\dfrac{1}{2}"),
    (r"\frac{1}{2}", r"\frac12"),
    ("1/2", r"\frac{1}{2}"),
    ("7 / 2", "3.5"),
    ("2**3", "8"),
    ("3*10^8", r"3 \times 10^{8}"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("10", r"10\%"),
    ("50", r"50^\circ"),
    ("5", r"5 \text{ cm}"),
    ("12345", "12,345"),
    ("12345", "12{,}345"),
    ("12345", r"12\,345"),
    ("12345", "12 345"),
    ("4.5e33", r"4.5 \times 10^{33}"),
    ("12345\\", "12345"),
    ("-3", "\u22123"),
    ("5", "x=5"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("(1,2)", r"\left(1,2\right)"),
    ("[0,1)", r"\left[0,1\right)"),
    (r"(-\infty,2)", r"(-\infty, 2)"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
    ("1, 2", r"1 \text{ and } 2"),
    (r"\frac{\sqrt{\frac{1}{4}}}{2}", r"\frac{1}{4}"),  # braces within braces
]

NOT_RIGHT = [
    ("42", "43"),
    ("42", "-42"),
    ("42", "4.2"),
    ("73", "**74**"),
    ("A", "B"),
    (r"\frac{1}{2}", "2"),
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
    ("1/2004!", "1/2006!"),
    ("x+y=1", "x+y=2"),
    ("0", "0.0000001"),
    ("0.0000001", "0.0000004"),
    ("4.5e33", "4.5e32"),
    ("2x=4", "3x=9"),
    ("x<5", "x>5"),
    ("(1,2)", "(2,1)"),
    ("[0,1)", "(0,1]"),
    ("[0,1]", "(0,1)"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\4&3\end{pmatrix}"),
    # reward hacking: lists, alternatives and debris against one answer
    ("5", "3, 5"),
    ("5", r"3 \text{ or } 5"),
    ("5", "3 5"),
    ("5", r"\{1,2,3,4,5,6,7,8,9\}"),
    ("3", "3*/8"),
    ("5", r"\text{as the question says}"),
]


FOOLED = [
    # a sentence that says something else than that the number is the answer
    *(
        ("5", answer)
        for answer in (
            "6; answer: 5",
            "4 + answer: 5",
            "-answer = 5",
            "2 answer = 5",
            "1/answer is 5",
            "10 minus the answer is 5",
            "7 or the answer is 5",
            "The wrong answer is 5",
            "It is false that the answer is 5",
            "Twice the result is 5",
            "The opposite of the answer is 5",
            "The result is 6. The answer is 5",
            "The answer is 5. But six.",
            "The answer is not 5",
        )
    ),
    # chains of logic, and equalities that are none
    *(
        ("5", rf"6 {sign} 5")
        for sign in (r"\lor", r"\land", r"\to", r"\Rightarrow", r"\iff", r"\sim", r"\mid", r"\cup", "=")
    ),
    ("5", r"6 \\ 5"),
    ("5", "x=6=5"),
    ("5", r"\frac{5}{6}=5"),
    ("5", r"5 \approx 6"),
    ("5", r"\neg 5"),
    ("5", r"\ldots 5"),
    ("0", "0/0"),
    ("x+y=2", "2"),
    # words behind the number that change it
    *(
        ("5", f"5 {words}")
        for words in ("million", r"\text{thousand}", r"\text{ is not the answer}", "squared", "less than")
    ),
    ("5", r"5\text{ or six}"),
    (r"5\mathrm{m}", r"5\mathrm{cm}"),
    (r"5\text{ cm}^3", r"5\text{ cm}^2"),
    (r"\text{even}", "neve"),
    ("1011_2", "1011_3"),
    ("5", r"3 \text{ apples or } 5 \text{ apples}"),
]
"""Wrong answers that a policy might find, most of which math-verify alone takes for right."""

STILL_RIGHT = [
    ("1/3", r"0.\overline{3}"),
    ("1/6", r"0.1\overline{6}"),
    ("5", "2+3=5"),
    ("5", r"x = \frac{10}{2} = 5"),
    (r"5\text{ m}", "5 meters"),
    ("5", r"5\,\mathrm{cm}"),
    ("5 million", "5 million"),
    (r"(-\infty,0)\cup(0,\infty)", r"(-\infty, 0) \cup (0, \infty)"),
    ("1", r"\lim_{x \to 0} \frac{\sin x}{x} = 1"),
    ("5", "a=5"),
    ("42", "Step 1: add. Step 2: halve. The final answer is 42"),
    (r"\boxed{1} \text{ and } \boxed{2}", "1, 2"),
    ("1/0.5", "2"),
]


@pytest.mark.parametrize(
    ("response", "truth", "reward"),
    [
        (r"\boxed{6} or perhaps \boxed{5}", "5", 0.0),
        (r"\boxed{6}/\boxed{5}", "5", 0.0),
        (r"\boxed{6} | \boxed{5}", "5", 0.0),
        ("the answer is not 5", "5", 0.0),
        ("the answer is 5 or 6", "5", 0.0),
        ("I think the answer is 5", "5", 1.0),
        ("the answer is 5", "5", 1.0),
    ],
)
def test_hedges_outside_a_box(verifier: Verifier, response: str, truth: str, reward: float) -> None:
    assert verifier.verify(response, truth, require_format=False).reward == reward


def test_what_a_policy_might_try_earns_nothing(verifier: Verifier) -> None:
    verdicts = verifier.verify_batch([(boxed(answer), truth) for truth, answer in FOOLED])
    assert [case for case, verdict in zip(FOOLED, verdicts, strict=True) if verdict.reward != 0.0] == []


def test_objections_spare_right_answers(verifier: Verifier) -> None:
    verdicts = verifier.verify_batch([(boxed(answer), truth) for truth, answer in STILL_RIGHT])
    assert [case for case, verdict in zip(STILL_RIGHT, verdicts, strict=True) if verdict.reward != 1.0] == []


def test_right_answers_earn_the_reward(verifier: Verifier) -> None:
    verdicts = verifier.verify_batch([(boxed(answer), truth) for truth, answer in RIGHT])
    assert [case for case, verdict in zip(RIGHT, verdicts, strict=True) if verdict.kind is not CORRECT] == []
    assert {(v.reward, v.format_reward, v.accuracy_reward) for v in verdicts} == {(1.0, 1.0, 1.0)}


def test_wrong_answers_do_not(verifier: Verifier) -> None:
    verdicts = verifier.verify_batch([(boxed(answer), truth) for truth, answer in NOT_RIGHT])
    assert [case for case, verdict in zip(NOT_RIGHT, verdicts, strict=True) if verdict.kind is not WRONG] == []
    assert {(v.reward, v.format_reward, v.accuracy_reward) for v in verdicts} == {(0.0, 1.0, 0.0)}
    assert all(verdict.reason for verdict in verdicts)


def test_gold_goes_first(verifier: Verifier) -> None:
    # The asymmetry of math-verify: an assignment may be answered by its value, an equation may not.
    one, two = verifier.verify_batch([(boxed("5"), "x=5"), (boxed("5"), "2x+z=5")])
    assert (one.kind, two.kind) == (CORRECT, WRONG)


@pytest.mark.parametrize(
    ("response", "truth", "expected", "reward"),
    [
        (r"<think>\boxed{5}</think>\boxed{6}", "5", WRONG, 0.0),
        (r"<think>\boxed{6}</think>\boxed{5}", "5", CORRECT, 1.0),
        (r"<think>\boxed{5}</think>done", "5", NO_ANSWER, 0.0),
        (r"<think>a</think>\boxed{5} and then put your final answer within \boxed{}", "5", NO_ANSWER, 0.0),
        (r"<think>a</think>\boxed{3} or \boxed{5}", "5", WRONG, 0.0),
        (r"<think>a</think>\boxed{3}, no, I mean \boxed{5}", "5", CORRECT, 1.0),
        (r"<think>a</think>\boxed{5}, no, I mean \boxed{3}", "5", WRONG, 0.0),
        (r"\boxed{5}", "5", MALFORMED, 0.0),
        (r"<think>a</think>\boxed{5} \boxed{6", "5", MALFORMED, 0.0),
    ],
)
def test_format_and_accuracy_together(
    verifier: Verifier, response: str, truth: str, expected: VerdictKind, reward: float
) -> None:
    verdict = verifier.verify(response, truth)
    assert (verdict.kind, verdict.reward) == (expected, reward), verdict.reason
    assert verdict.reward == verdict.format_reward * verdict.accuracy_reward


def test_a_malformed_response_still_reports_its_accuracy(verifier: Verifier) -> None:
    verdict = verifier.verify(r"\boxed{\frac{10}{2}}", "5")
    assert verdict == Verdict(
        kind=MALFORMED,
        reward=0.0,
        format_reward=0.0,
        accuracy_reward=1.0,
        extracted=r"\frac{10}{2}",
        reason="the thought is never closed: no </think>; the answer itself: equal to the ground truth",
    )


@pytest.mark.parametrize(
    ("response", "expected", "format_reward"),
    [
        (r"So it is \boxed{\frac{14}{2}}.", CORRECT, 0.0),
        (r"<think>a</think>\boxed{7}", CORRECT, 1.0),
        (r"<think>\boxed{7}", NO_ANSWER, 0.0),
        (r"<think>\boxed{8}</think>\boxed{7}", CORRECT, 1.0),
        (r"The final answer is $7$.", CORRECT, 0.0),
        (r"Answer: 7", CORRECT, 0.0),
        (r"The answer is $8$.", WRONG, 0.0),
        (r"We add 3 and 4 and get 7", NO_ANSWER, 0.0),  # a bare last number may be where the text was cut
        (r"so the answer is \boxed{7", NO_ANSWER, 0.0),
        (r"<think>the answer is 7", NO_ANSWER, 0.0),
        (r"\boxed{}", NO_ANSWER, 0.0),
        ("", NO_ANSWER, 0.0),
    ],
)
def test_accuracy_alone_for_r1_zero(
    verifier: Verifier, response: str, expected: VerdictKind, format_reward: float
) -> None:
    verdict = verifier.verify(response, "7", require_format=False)
    assert (verdict.kind, verdict.format_reward) == (expected, format_reward), verdict.reason
    assert verdict.reward == verdict.accuracy_reward == (1.0 if expected is CORRECT else 0.0)


def test_what_cannot_be_judged_is_an_error_and_not_wrong(verifier: Verifier) -> None:
    items = [
        (boxed("5"), ""),
        (boxed("5"), "  "),
        (boxed("5"), "9" * 40_000),
        (None, "5"),
        (boxed("5"), 5),
        ("alone",),
        7,
        (boxed("5"), ".π$e^{i\\pi}"),  # a lone dollar: nothing is left to compare with
    ]
    verdicts = verifier.verify_batch(items)  # type: ignore[arg-type]
    assert [(v.kind, v.reward) for v in verdicts] == [(ERROR, 0.0)] * len(items)
    assert all(verdict.reason for verdict in verdicts)


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("1:00", "11:00"),  # 1/0 and 11/0 to math-verify
        ("i", "1:00"),
        ("5", r"\frac{1}{0}"),
        ("(1,2)", "0:0"),
        (r"\frac{1}{0}", "5"),
        ("1/0,0:0", "1/0,0:1"),  # inside a list
        (r"x \neq 6", r"x \neq 5"),  # math-verify raises KeyError inside
        (r"x \neq 2", r"x \neq 1"),
        (r"x \leq 3", "x!=1"),
        ("x>1", r"x \ne 1"),
    ],
)
def test_a_comparison_that_fails_is_wrong_and_no_error(verifier: Verifier, answer: str, truth: str) -> None:
    verdict = verifier.verify(boxed(answer), truth)
    assert (verdict.kind, verdict.reward) == (WRONG, 0.0), verdict.reason
    assert verifier.verify(boxed(truth), truth).kind is CORRECT


ODD = (
    "1:00", "11:00", "0:0", r"x \neq 1", "x!=2", r"\frac{1}{0}", "0/0", r"\infty-\infty", r"\pm 3", r"\{1,2\}",
    r"\{x \mid x>1\}", "(1,2)", r"[1,\infty)", r"(-\infty,0)\cup(1,2]", "1<x<2", "y=2x+1", r"\emptyset",
    r"\begin{pmatrix}1\\2\end{pmatrix}", "i", r"\log_1 2", r"\tan(\pi/2)", "(-1)!", r"\lim_{x\to 0} \frac{1}{x}",
    r"\mathbb{R}\setminus\{0\}", r"50\%", "12_8", r"x \equiv 1 \pmod 3", r"90^\circ", "x=1,y=2", "1..2", r"\sqrt{}",
    "^2", r"\cup", r"\{\}", "()", "x=x", "zoo", "S", "(i,2i)", "[2,1]", r"x\notin(1,2)", "a:b", "x^2<0", "½²",
)  # fmt: skip
SHAPES = ["A,B", "(A,B)", r"\frac{A}{B}", "A=B", "A^{B}", r"A \neq B", "A<B", "A:B", r"\{A,B\}", r"A\text{ or }B"]
odd = st.sampled_from(ODD) | st.builds(
    lambda shape, one, other: shape.replace("A", one).replace("B", other),
    st.sampled_from(SHAPES),
    st.sampled_from(ODD),
    st.sampled_from(ODD),
)


@given(st.lists(st.tuples(odd, st.sampled_from(ODD)), min_size=30, max_size=30))
@settings(max_examples=8, deadline=None)
def test_no_odd_answer_is_an_error(verifier: Verifier, pairs: list[tuple[str, str]]) -> None:
    verdicts = verifier.verify_batch([(boxed(answer), truth) for answer, truth in pairs], require_format=False)
    failed = [(pair, v.reason) for pair, v in zip(pairs, verdicts, strict=True) if v.kind is ERROR]
    assert failed == []


@pytest.mark.parametrize(
    "answer",
    [
        "9" * 1_000_000,
        "{" * 10_000 + "5" + "}" * 10_000,
        r"\frac{1}{" * 10_000 + "5" + "}" * 10_000,
        "(" * 10_000,
        "5\x00",
        "\x00",
        "5\ud800",
        "\udfff\ud800",
        "\U0001f600" * 1_000,
        r"\sqrt[" * 30,
        r"\begin{matrix}" * 50,
        "a" * 2_000,
        "+" * 2_000,
        "1+" * 1_000 + "1",
    ],
)
def test_hostile_answers_cost_nothing_but_their_reward(verifier: Verifier, answer: str) -> None:
    hostile, ordinary = verifier.verify_batch([(boxed(answer), "5"), (boxed(r"\frac{10}{2}"), "5")])
    assert hostile.reward == 0.0
    assert hostile.kind is not CORRECT
    assert hostile.reason
    assert len(hostile.extracted or "") <= 4_096
    f"{hostile.extracted}{hostile.reason}".encode()  # can be written to Parquet
    assert ordinary.kind is CORRECT


def test_a_long_answer_that_is_the_ground_truth_is_not_refused_unseen(verifier: Verifier) -> None:
    (refused,) = verifier.verify_batch([(boxed("1" + "+0" * 3_000), "1")])
    assert refused.kind is WRONG
    assert "6,001 characters" in refused.reason


def test_math_as_a_function_of_the_reward_is_the_verifier(verifier: Verifier) -> None:
    problem = {"think_opened": False}
    cases = [(boxed("0.5"), r"\frac{1}{2}"), (boxed("5"), "6"), ("no thought \\boxed{5}", "5"), ("none", "5")]
    for is_strict in (True, False):
        verdicts = verifier.verify_batch(cases, require_format=is_strict)
        scores = [math(*case, problem, require_format=is_strict) for case in cases]
        assert [(s.value, s.reason, s.extracted) for s in scores] == [
            (v.reward, v.reason, v.extracted) for v in verdicts
        ]
