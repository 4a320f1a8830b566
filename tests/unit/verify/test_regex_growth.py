"""No regex of kdrl_core/verify and kdrl_core/data grows faster than n log n with its text, up to the longest answer."""

import re

import pytest
from support import script

from kdrl_core.verify import normalise, objections
from kdrl_core.verify.normalise import MAX_CHARS

growth = script("regex_growth")
TARGETS = growth.targets()
MAX_EXPONENT = 1.5
"""n log n has 1.1 here, n² has 2; between them there is room for a busy machine."""


def is_superlinear(target: object) -> bool:
    """Measured three times at most: another process can make one measurement slow."""
    return all(growth.measure(target).exponent > MAX_EXPONENT for _ in range(3))


@pytest.mark.parametrize("target", TARGETS, ids=[f"{each.name}-{each.call}" for each in TARGETS])
def test_every_regex_is_fast_on_its_worst_text(target: object) -> None:
    assert not is_superlinear(target), growth.measure(target)


def test_every_pattern_is_found() -> None:
    names = {each.name for each in TARGETS}
    assert len(TARGETS) >= 60
    assert {"verify.sentences._CONCLUSION", "verify.screening._TOKEN", "data.decontamination._WORD"} <= names
    assert {"verify.normalise._SYNONYMS[1][0]"} <= names
    assert growth.uncompiled() == [], "give the pattern a name, so that it is tested"


@pytest.mark.parametrize(
    ("pattern", "call"),
    [  # as they stood
        (r"[^=]*[A-Za-z][^=]*[+\-*/][^=]*=[^=]*|[^=]*[+\-*/][^=]*[A-Za-z][^=]*=[^=]*", "fullmatch"),
        (r"(?i)\b(?:so|thus|hence|therefore)\b[A-Za-z, ]*$", "search"),
        (r"\$[^$]*\$|\\\(.*?\\\)|\\\[.*?\\\]", "sub"),
        (r"[(\[][^()\[\],]*\bor\b[^()\[\],]*[)\]]", "search"),
        (r"/\(*0*\.?0+\)*(?![\d.])", "search"),
        (r"(\d+(?:\.\d+)?)\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))", "sub"),
        (r"(?<=[A-Za-z}])\s*\^\s*\{?\s*-?\d\s*\}?", "sub"),
    ],
)
def test_slow_patterns_are_caught(pattern: str, call: str) -> None:
    target = growth.Target(name="old", pattern=re.compile(pattern), call=call)
    # Measured three times at most, as above: another process can make the shorter text slow.
    assert any(growth.measure(target, length=1_024).exponent > MAX_EXPONENT for _ in range(3))


@pytest.mark.parametrize("char", ["\ufdfa", "·", "°", "½", "√", "∞", "²"])
def test_the_limit_holds_for_what_symbols_are_written_as(char: str) -> None:
    """U+FDFA becomes 18 characters, and 4,096 of them 73,728."""
    for content in (char * MAX_CHARS, f"1{char}" * (MAX_CHARS // 2), f"5 {char}"):
        assert len(normalise.normalise(content)) <= MAX_CHARS
    assert normalise.normalise("\ufdfa" * MAX_CHARS) == "\ufdfa" * MAX_CHARS


@pytest.mark.parametrize("unit", [".1 ", "pi1", "sqrt(1)", "x10^"])
def test_the_limit_holds_for_what_repairs_add(unit: str) -> None:
    assert len(normalise.normalise(f"1{unit}" * (MAX_CHARS // (len(unit) + 1)))) <= MAX_CHARS


def test_a_truth_that_is_an_equation_is_recognised() -> None:
    for truth, is_sum in (("x+y=2", True), ("2=x+y", False), ("x=2", False), ("1+1=2", False), ("x+y=2=z", False)):
        assert (objections.objection("2", truth) == "a value where the ground truth is an equation") is is_sum, truth
