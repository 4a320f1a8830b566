"""Agreement with labelled cases, and property tests: right answers in other spellings, near misses of right ones."""

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrl_core.types import VerdictKind
from kdrl_core.verify import Verifier

CASES = Path(__file__).resolve().parents[2] / "data/verifier"


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(workers=2, timeout_s=20.0) as verifier:
        yield verifier


def boxed(answer: str) -> str:
    # A lone backslash at the end would escape the brace: `\ ` is LaTeX's blank.
    return answer if r"\boxed" in answer else rf"\boxed{{{answer}{' ' if answer.endswith(chr(92)) else ''}}}"


def read(file: str) -> list[tuple[str, str, bool]]:
    """(response, ground truth, expected) of each case."""
    rows = [json.loads(line) for line in (CASES / file).read_text(encoding="utf-8").splitlines()]
    return [
        (row["response"], row["ground_truth"], row["expected"])
        if "response" in row
        else (boxed(row["prediction"]), row["gold"], row["expected"])
        for row in rows
    ]


@pytest.mark.parametrize(
    ("file", "max_wrong"),
    [
        ("cases.jsonl", 11),
        ("reports.jsonl", 0),
        ("kinds.jsonl", 2),
        ("unseen.jsonl", 0),
        pytest.param("aside_public.jsonl", 6, marks=pytest.mark.slow),
        pytest.param("aside_own.jsonl", 1, marks=pytest.mark.slow),
    ],
)
def test_agreement(verifier: Verifier, file: str, max_wrong: int) -> None:
    """kdrl has no false positive in any of them; math-verify alone has up to 118."""
    cases = read(file)
    verdicts = verifier.verify_batch([(response, truth) for response, truth, _ in cases], require_format=False)
    differ = [(*case, v.reason) for case, v in zip(cases, verdicts, strict=True) if (v.reward == 1.0) != case[2]]
    assert [case for case in differ if not case[2]] == [], "false positives"
    assert len(differ) <= max_wrong, differ
    failed = [v.reason for v in verdicts if v.kind is VerdictKind.TIMEOUT]
    assert failed == []


small = st.integers(-999, 999)
fractions = st.fractions(min_value=-20, max_value=20, max_denominator=40)


def latex(value: Fraction) -> str:
    sign = "-" if value < 0 else ""
    return str(value) if value.denominator == 1 else rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


@st.composite
def right_and_wrong(draw: st.DrawFn) -> tuple[str, str, str]:
    """(ground truth, the same in another spelling, a near miss)."""
    kind = draw(st.sampled_from(["integer", "fraction", "pair", "interval", "list", "root", "power", "unit", "word"]))
    a = draw(small.filter(lambda n: abs(n) > 1))
    b = draw(small.filter(lambda n: n not in (a, -a, 0)))
    low, high = min(a, b), max(a, b)
    if kind == "integer":
        spelling = draw(st.sampled_from([f"{a}.0", f"${a}$", f"x={a}", rf"\text{{The answer is }} {a}", f"**{a}**"]))
        return (
            str(a),
            spelling,
            draw(st.sampled_from([str(-a), f"{a}.5", f"{a}0", f"{a} or {b}", rf"\leq {a}", str(b)])),
        )
    if kind == "fraction":
        value = draw(fractions.filter(lambda v: v != 0))
        double = f"{2 * value.numerator}/{2 * value.denominator}"
        wrong = draw(st.sampled_from([-value, value + 1, value + Fraction(1, 1000)]))
        return latex(value), double, latex(wrong)
    if kind == "pair":
        wrong = draw(st.sampled_from([f"({b},{a})", f"({a},{b + 1})", f"({a})", f"({a} or {b})"]))
        return f"({a},{b})", rf"\left({a}, {b}\right)", wrong
    if kind == "interval":
        return f"[{low},{high})", rf"{low}\le x<{high}", draw(st.sampled_from([f"[{low},{high}]", f"({low},{high})"]))
    if kind == "list":
        c = high + 7
        return (
            f"{a}, {b}, {c}",
            f"{c}, {a}, {b}",
            draw(st.sampled_from([f"{a}, {b}", f"{a}, {b}, {c}, {c + 1}", str(c)])),
        )
    if kind == "root":
        n = abs(a)
        return (
            rf"{n}\sqrt{{2}}",
            rf"\sqrt{{{2 * n * n}}}",
            draw(st.sampled_from([rf"\sqrt{{{2 * n}}}", rf"-{n}\sqrt{{2}}"])),
        )
    if kind == "power":
        return (
            f"x^{{2}}+{abs(a)}",
            f"{abs(a)}+x²",
            draw(st.sampled_from([f"x^2-{abs(a)}", f"x2+{abs(a)}", str(abs(a))])),
        )
    if kind == "unit":
        return rf"{a}\text{{ cm}}", f"{a} centimeters", draw(st.sampled_from([rf"{a}\text{{ km}}", f"{b} cm"]))
    word = draw(st.sampled_from(["even", "Monday", "parallel", "ellipse"]))
    return rf"\text{{{word}}}", word.upper(), draw(st.sampled_from([word[::-1], f"not {word}", word[:-1]]))


@given(st.lists(right_and_wrong(), min_size=20, max_size=40))
@settings(max_examples=12, deadline=None)
def test_right_answers_in_other_spellings_pass_and_near_misses_do_not(
    verifier: Verifier, cases: list[tuple[str, str, str]]
) -> None:
    rights = verifier.verify_batch([(boxed(right), truth) for truth, right, _ in cases], require_format=False)
    wrongs = verifier.verify_batch([(boxed(wrong), truth) for truth, _, wrong in cases], require_format=False)
    assert [c[:2] for c, v in zip(cases, rights, strict=True) if v.kind is not VerdictKind.CORRECT] == []
    assert [(c[0], c[2]) for c, v in zip(cases, wrongs, strict=True) if v.reward != 0.0] == []
