r"""Every shipped ground truth that is no plain number: respelled it is right, changed a little it is wrong.

The truths are those of MATH, MATH500, Minerva and OlympiadBench that kdrl ships, 1,000 of them.
"""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from latex2sympy2_extended import latex2sympy
from sympy import Expr, latex  # type: ignore[import-untyped, unused-ignore]

from kdrl_core.verify import Verifier

ASSETS = Path(__file__).resolve().parents[3] / "kdrl_core/assets"
PLAIN = re.compile(r"-?[\d,.]+")
NOT_FOR_SYMPY = re.compile(
    r"\\(?:text|mathrm|log|ln|dot|Delta|Gamma|varpi)|[A-Z]|\^\\?\{?\\circ|%|\de-?\d|[ei](?![a-z])"
)
"""What latex2sympy writes otherwise than it reads it."""

KNOWN = {
    ("-2,-2", "-2"),  # the set of the roots is the same
}


def truths() -> list[str]:
    rows = json.loads((ASSETS / "problems/deepscaler.json").read_text(encoding="utf-8"))
    for name in ("math500", "minerva_math", "olympiad_bench"):
        lines = (ASSETS / f"benchmarks/{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows += [json.loads(line) for line in lines]
    found = dict.fromkeys(row["answer"].strip() for row in rows)
    return [truth for truth in found if not PLAIN.fullmatch(truth) and not truth.endswith(("\\", "."))]


def same(truth: str) -> Iterator[str]:
    """The truth in other spellings."""
    yield truth
    if truth.count("$") == 0:
        yield f"${truth}$"
    yield truth + "."
    if r"\frac" in truth:
        yield truth.replace(r"\frac", r"\dfrac")
    if (text := re.fullmatch(r"\\text\{([^{}]*)\}", truth)) is not None:
        yield text[1]
    if re.search(r"\\leq?(?![a-z])", truth):
        yield re.sub(r"\\leq?(?![a-z])", r"\\leqslant ", truth)
    if r"\left" in truth:
        yield truth.replace(r"\left", "").replace(r"\right", "")
    if not NOT_FOR_SYMPY.search(truth) and (expression := read(truth)) is not None:
        yield latex(expression.doit())


def read(truth: str) -> Expr | None:
    try:
        found = latex2sympy(truth, is_real=True, convert_degrees=False)
    except Exception:
        return None
    return found if isinstance(found, Expr) and not found.has(float("nan")) else None


def others(truth: str, rng: random.Random) -> Iterator[str]:
    """What is near the truth, and not it."""
    if digits := list(re.finditer(r"\d", truth)):
        place = rng.choice(digits)
        yield truth[: place.start()] + str((int(place[0]) + rng.randint(1, 8)) % 10) + truth[place.end() :]
    if r"\infty" in truth and truth[0] in "([" and truth[-1] in ")]":
        yield {"(": "[", "[": "("}[truth[0]] + truth[1:]
    if "," in truth and r"\text" not in truth and not re.search(r"\d,\d{3}", truth) and truth[0] not in r"([\:":
        yield truth.rpartition(",")[0]
    if (text := re.fullmatch(r"\\text\{([A-Za-z ]{3,})\}", truth)) is not None:
        yield rf"\text{{{text[1][:-1]}q}}"
    for old, new in (("+", "-"), ("<", ">")):
        if old in truth:
            yield truth.replace(old, new, 1)
    if not re.search(r"\\text|=|\\in|[<>]|\\le|\\ge|,", truth):
        yield f"{truth}+1"
        yield rf"{truth} \text{{ or }} 7"


@pytest.mark.parametrize("share", [0.15, pytest.param(1.0, marks=pytest.mark.slow)])
def test_respelled_truths_are_right_and_changed_ones_wrong(share: float) -> None:
    rng = random.Random(0)
    found = truths()
    assert len(found) > 900
    chosen = rng.sample(found, round(share * len(found)))
    cases = [(truth, answer, True) for truth in chosen for answer in same(truth)]
    cases += [(truth, answer, False) for truth in chosen for answer in others(truth, rng)]
    with Verifier(workers=2, timeout_s=20.0) as verifier:
        verdicts = verifier.verify_batch([(rf"\boxed{{{a}}}", t) for t, a, _ in cases], require_format=False)
    differ = [(*c, v.reason) for c, v in zip(cases, verdicts, strict=True) if (v.reward == 1.0) != c[2]]
    assert [case for case in differ if not case[2] and case[:2] not in KNOWN] == []
    assert len(differ) <= 0.005 * len(cases), differ
