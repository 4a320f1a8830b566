r"""Answers in other forms than their ground truth, kind by kind: what is the same, and what is nearly the same.

Each row is a truth, answers that are equal to it, and answers that are not. All go through real workers.
"""

from collections.abc import Iterator

import pytest

from kdrl_core.types import VerdictKind
from kdrl_core.verify import Verifier

FORMS: dict[str, list[tuple[str, list[str], list[str]]]] = {
    "parts of a truth": [
        (r"\{x \mid x \ge 0\}", [r"[0,\infty)", r"x \geq 0", r"\{y : y \ge 0\}"], ["0", r"(0,\infty)", "x>0"]),
        (r"n \equiv 1 \pmod{3}", [r"n \equiv 4 \pmod 3", "n=3k+1", r"1 \pmod{3}"], ["1", r"n \equiv 1 \pmod 4"]),
        (r"x \equiv 2, 5 \pmod 7", [r"x \equiv 5, 2 \pmod 7"], [r"x \equiv 2 \pmod 7", "2, 5"]),
        (r"5 \text{ hours } 30 \text{ minutes}", ["5.5 hours", r"330 \text{ min}", "5 h 30 min"], ["5", "5 hours"]),
        (r"3 \text{ boys and } 4 \text{ girls}", ["4 girls, 3 boys", "(3, 4)"], ["3", "3 girls and 4 boys", "4, 3"]),
        (r"\begin{cases} x=1 \\ y=2 \end{cases}", ["(1,2)", "y=2, x=1", "(x,y)=(1,2)"], ["2", "(2,1)", "x=2, y=1"]),
        (r"1, 2, \ldots, n", [r"1,2,3,\dots,n"], ["2", "1, n", r"1, 3, \ldots, n", r"1,2,\dots,m"]),
        (r"1,2,\dots,6", ["1,2,3,4,5,6"], ["1,2,6", "1,2,3,4,5"]),
        (r"f(x)=cx \text{ for any real } c", ["f(x)=cx", r"f(x)=kx \text{ for any real } k"], [r"f(x)=cx^2", "c"]),
        (r"x = k\pi, k \in \mathbb{Z}", [r"x=n\pi \ (n \in \mathbb{Z})"], [r"x=k\pi, k \in \mathbb{N}", r"x=2k\pi"]),
        (r"\frac{1}{\sqrt{2}}c", [r"\frac{c}{\sqrt 2}"], [r"\frac{1}{\sqrt{2}}"]),
        (r"E_1+2E_2", ["2E_2+E_1"], ["E_1+3E_2", "2"]),
    ],
    "units": [
        (
            r"8 \mathrm{~cm}",
            ["8 cm", "8", "80 mm", r"0.08\text{ meters}"],
            [r"8 \mathrm{~mm}", "8 m", "9 cm", "8 cm^2"],
        ),
        (r"8 \text{ square centimeters}", [r"8\text{ cm}^2", "8 sq. cm", "8"], [r"8 \text{ cm}^3", "8 square meters"]),
        (
            r"10 \text{ m/s}",
            [r"36 \mathrm{~km} / \mathrm{h}", r"10\,\mathrm{m\,s^{-1}}"],
            ["10 km/h", r"10 \text{ m/s}^2"],
        ),
        (r"8 \mathrm{~Hz}", [r"0.008 \mathrm{~kHz}"], [r"8 \mathrm{~kHz}"]),
        (r"100^\circ \text{C}", [r"212^{\circ}\mathrm{F}", "100"], [r"100^\circ F"]),
        (r"90^\circ", [r"90", r"90\text{ degrees}"], [r"90\text{ radians}", r"91^\circ"]),
        (r"\$5", ["5 dollars", r"500\text{ cents}", "5.00"], ["5 cents", "€5"]),
        (r"5.4 \text{ cents}", ["5.4¢"], [r"\$5.4"]),
        (r"5{,}000{,}000", [r"5 \text{ million}"], [r"5 \text{ thousand}", "5"]),
        (r"5 \text{ apples}", ["5", "5 red apples"], [r"5 \text{ pears}", "6 apples"]),
        (r"90^{\circ}, 60^{\circ}", ["60, 90", r"60^\circ \text{ or } 90^\circ"], [r"60^\circ", r"\$90, \$60"]),
        (r"4.4677 \times 10^{14} Hz", ["4.4677e14"], ["4.4677e13"]),
    ],
    "words": [
        (r"\text{Yes}", ["yes", "Yes.", "Yes, since $x=2$"], ["sYe", "No", "Yes and no"]),
        ("No", [r"\text{no}"], ["on", "yes"]),
        ("even", [r"\text{Even}"], ["neve", "odd", "not even"]),
        ("ace", ["Ace"], ["cae"]),
        ("parabola", [r"\text{a parabola}", '"parabola"'], ["hyperbola", "parabolas and lines"]),
        (r"\text{Mrs. Smith}", ["Mrs Smith"], ["Mr. Smith"]),
        (r"\text{A,B,C,D}", ["A, B, C, D", r"\text{D, C, B and A}"], ["A, B, C", "A, B, C, E"]),
        (r"\text{No solution}", [r"\emptyset", "There is no solution.", r"\varnothing"], ["0", "one solution"]),
        (
            r"(-\infty,\infty)",
            [r"\mathbb{R}", "all real numbers", r"x \in \mathbb{R}"],
            ["all integers", r"(0,\infty)"],
        ),
        ("abc", ["bca"], ["abd"]),
    ],
    "numbers and letters": [
        ("4-4i", ["4(1-i)", r"4-4\mathrm{i}"], ["4+4i", "4"]),
        ("(1+i)^2", ["2i"], ["-2i"]),
        (r"1-\frac{1}{e}", [r"1-\frac{1}{\mathrm e}", r"1-\mathrm{e}^{-1}"], [r"1+\frac1e"]),
        (r"\frac{71}{6}", [r"11~\frac56", "11 5/6"], [r"11 \cdot \frac56"]),
        ("12", [r"12^{\text{th}}", "12th", r"\text{twelve}"], ["12^2"]),
        (r"\frac{4}{11}", [r"0.\dot3\dot6", r"0.\overline{36}", "0.(36)", "0.363636..."], ["0.36", r"0.3\overline{6}"]),
        (r"\frac{1}{\sqrt{n}}", [r"\sqrt{1/n}"], [r"\sqrt{n}"]),
        (r"\frac{\sqrt3}{3}", [r"\frac{\sqrt3}{3} \approx 0.577"], [r"\frac{\sqrt3}{3} \approx 0.7", "0.577"]),
        ("2", [r"17 \bmod 5 = 2", r"17 \equiv 2 \pmod 5"], [r"17 \bmod 5 = 3", r"17 \bmod 6"]),
        ("1:2:3", ["2:4:6"], ["1:2:4", "3:2:1"]),
        (r"4:30 \text{ p.m.}", ["4:30 PM", "16:30"], ["4:30 am", "5:30 pm"]),
        ("2^{1009}", [r"2 \cdot 2^{1008}"], ["2^{1009}-1"]),
    ],
    "choices": [
        (
            "E",
            [r"\text{(E)},", "E: a score", r"\text{Option E}", "E. 12"],
            ["F", "(A) or (E)", "e", "2.718", "D: see E"],
        ),
        (r"\text{(B) } 12", ["B", "12", r"\textbf{(B)}\ 12"], ["A", "(B) 13", "(A) 12"]),
    ],
    "sets and relations": [
        (r"(-\infty,1)\cup(2,\infty)", ["x<1, x>2", r"\{x \mid x<1 \text{ or } x>2\}"], ["x<1", "1<x<2", "x<1 or x>3"]),
        (r"x \le 5", [r"5 \ge x", r"(-\infty,5]", r"\text{at most } 5"], ["x<5", "5", r"x \ge 5"]),
        (r"-2<x<2", ["|x|<2", "(-2,2)", "]-2,2["], [r"|x| \le 2", "|x|>2", "[-2,2]"]),
        (r"(-\infty,0)\cup(0,\infty)", [r"x \ne 0", r"\mathbb{R} \setminus \{0\}"], [r"\mathbb{R}", r"x \neq 1"]),
        (r"(-\infty,0]", [r"x \le 0"], [r"[-\infty,0]"]),
        (r"(\pm3,\pm2)", ["(3,2),(3,-2),(-3,2),(-3,-2)"], ["(3,2),(-3,-2)", "(3,2)"]),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", [r"\langle 1, 2\rangle", "(1,2)"], ["(2,1)", r"\langle 1,3 \rangle"]),
        (r"\begin{pmatrix} 6 & -5 \\ 0 & 2 \end{pmatrix}", ["[[6,-5],[0,2]]"], ["[[6,0],[-5,2]]"]),
        (r"13824 \notin A", [r"13824 \not\in A"], [r"13824 \in A"]),
        ("1,1,2", ["2,1,1"], ["1,2,2"]),
        ("a<b<c", ["c>b>a"], ["a<c<b", "a>b>c"]),
    ],
}


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(workers=2, timeout_s=20.0) as verifier:
        yield verifier


@pytest.mark.parametrize("kind", FORMS)
def test_forms(verifier: Verifier, kind: str) -> None:
    cases = [(t, a, True) for t, same, _ in FORMS[kind] for a in same]
    cases += [(t, a, False) for t, _, others in FORMS[kind] for a in others]
    verdicts = verifier.verify_batch([(rf"\boxed{{{a}}}", t) for t, a, _ in cases], require_format=False)
    differ = [(*case, v.reason) for case, v in zip(cases, verdicts, strict=True) if (v.reward == 1.0) != case[2]]
    assert differ == []


UNKNOWN = [
    r"\minus 5", r"\half 5", r"\phantom{5}", r"\tag{7} 5", r"\xcancel{4} 5", r"\lceil 5", "5_{6}", r"\def\a{\a\a}\a 5",
    r"\let\a=\b 5", r"\foo{7} 5", r"\sout{6} 5", r"5 \hphantom{6}", r"\rfloor 5", r"\verb|5|",
]  # fmt: skip


def test_commands_that_math_verify_leaves_out_are_no_answer(verifier: Verifier) -> None:
    verdicts = verifier.verify_batch([(rf"\boxed{{{answer}}}", "5") for answer in UNKNOWN], require_format=False)
    assert [a for a, v in zip(UNKNOWN, verdicts, strict=True) if v.kind is not VerdictKind.WRONG] == []
    look = [r"\color{red} 5", r"\textcolor{blue}{5}", r"\displaystyle 5", r"\fbox{5}", r"\boldsymbol{5}", r"\large 5"]
    verdicts = verifier.verify_batch([(rf"\boxed{{{answer}}}", "5") for answer in look], require_format=False)
    assert [a for a, v in zip(look, verdicts, strict=True) if v.kind is not VerdictKind.CORRECT] == []


@pytest.mark.parametrize(
    ("response", "truth", "reward"),
    [
        ("So it is **61**.\n\n---\n\nFinal Answer: **61**", "61", 1.0),
        ("The answer is 61 at first sight, but no.\n\nFinal Answer: **59**", "61", 0.0),
        ("**Answer: (B)**", "B", 1.0),
        ("Final Answer: **12 mm**", r"12 \text{ cm}", 0.0),
        (r"Thus \fbox{61}", "61", 1.0),
        (r"\boxed{\text{notfound}}", "notfound", 0.0),
        (r"\boxed{proof}", "proof", 0.0),
    ],
)
def test_answers_without_a_box_and_truths_that_are_none(
    verifier: Verifier, response: str, truth: str, reward: float
) -> None:
    assert verifier.verify(response, truth, require_format=False).reward == reward


def test_a_truth_that_is_no_answer_is_an_error(verifier: Verifier) -> None:
    verdict = verifier.verify(r"\boxed{5}", r"\text{proof}", require_format=False)
    assert verdict.kind is VerdictKind.ERROR
    assert "no answer" in verdict.reason


def test_a_truth_that_is_read_in_part_is_compared_as_text(verifier: Verifier) -> None:
    truth = r"x = 2 \text{ is a double root}"
    wrong, right = verifier.verify_batch(
        [(r"\boxed{2}", truth), (r"\boxed{x=2\text{ is a double root}}", truth)], require_format=False
    )
    assert (wrong.reward, right.reward) == (0.0, 1.0)
    assert "only in part" in wrong.reason
