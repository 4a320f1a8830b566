r"""Sets of real numbers, written as relations, as intervals, or with a set-builder.

``x<1 \text{ or } x>2``, ``(-\infty,1)\cup(2,\infty)`` and ``\{x \mid x<1 \text{ or } x>2\}`` are one set. math-verify
reads no set-builder, and of several relations only some. Bounds are read by math-verify.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from kdrl_core.verify.latex import canonical, plain_text, split_top

if TYPE_CHECKING:
    from sympy import Set  # type: ignore[import-untyped, unused-ignore]

Read = Callable[[str], Any]
"""The number that a text is, as sympy has it; None if it is none."""

_OR = re.compile(r"(?<![A-Za-z\\])or(?![A-Za-z])|\\(?:lor|vee|cup)(?![A-Za-z])")
_AND = re.compile(r"(?<![A-Za-z\\])and(?![A-Za-z])|\\(?:land|wedge)(?![A-Za-z])|&")
_COMMA = re.compile("[,;]")
_BUILDER = re.compile(r"\\?\{\s*+([A-Za-z])\s*+(?:(?:\\in|∈)\s*+(?:\\mathbb R|R)\s*+)?[|:;](.*?)\\?\}", re.DOTALL)
_MEMBER = re.compile(r"([A-Za-z])\s*+(?:\\in(?![A-Za-z])|∈)\s*+(.+)", re.DOTALL)
_RELATION = re.compile(r"(\\(?:le|ge|ne)(?![A-Za-z])|[<>=])")
_LETTER = re.compile(r"[A-Za-z]")
_AROUND = re.compile(r"\|\s*+([A-Za-z])\s*+(?:([+-])([^|]+))?\|")
_INTERVAL = re.compile(r"([(\[])(.*)([)\]])", re.DOTALL)
_OPEN_OUTWARDS = re.compile(r"(?:^|(?<=\\cup)\s*+|(?<=\\in)\s*+)\]")
_CLOSED_OUTWARDS = re.compile(r"\[(?=\s*+(?:$|\\cup))")
"""``]1,2[`` is (1,2)."""
_WITHOUT = re.compile(r"\\setminus(?![A-Za-z])|(?<=R) ?- ?(?=\\\{)")
_EXCEPT = re.compile(
    r"(?:all )?(?:real numbers|reals|\\mathbb R) (?:[a-z] )?(?:except|excluding|other than|but)(?: for)? (.+)",
    re.DOTALL,
)
_LIST = re.compile(r"\\?\{(.*?)\\?\}", re.DOTALL)
_BOUNDS = (
    (re.compile(r"(?:at least|no less than|not less than|minimum of) ", re.IGNORECASE), r"\\ge "),
    (re.compile(r"(?:at most|no more than|not more than|up to|maximum of) ", re.IGNORECASE), r"\\le "),
    (re.compile(r"(?:(?:strictly )?(?:more|greater|larger) than|over|above) ", re.IGNORECASE), "> "),
    (re.compile(r"(?:(?:strictly )?(?:less|fewer|smaller) than|under|below) ", re.IGNORECASE), "< "),
)
_REALS = re.compile(r"\\mathbb R|ℝ")
_FLIPPED = {r"\le": r"\ge", r"\ge": r"\le", "<": ">", ">": "<", "=": "=", r"\ne": r"\ne"}


class RealSet(NamedTuple):
    """A set, the variable that the relations name (None for intervals and set-builders), and what it can be besides."""

    members: "Set"
    variable: str | None = None
    is_certain: bool = True
    """False for ``(1,2)``, which can be a point."""


def same_set(answer: str, truth: str, read: Read) -> bool | None:
    """Whether two contents are the same set of reals; None if one is not read as a set, or both may be points."""
    expected = real_set(truth, read)
    if expected is None:
        return None
    given = real_set(answer, read)
    if given is None or not (given.is_certain or expected.is_certain):
        return None
    if given.variable and expected.variable and given.variable != expected.variable:
        return False
    return bool(given.members == expected.members)


def same_relation(answer: str, truth: str) -> bool | None:
    """True if an answer is the chain of relations that the truth is, or that chain read from its end; else None."""
    given, expected = (list(map(str.strip, _RELATION.split(plain_text(text)))) for text in (answer, truth))
    if len(expected) < 3 or len(given) != len(expected) or "" in given[::2] + expected[::2]:
        return None
    flipped = [_FLIPPED[part] if place % 2 else part for place, part in enumerate(given)][::-1]
    for chain in (given, flipped):
        if chain[1::2] == expected[1::2] and list(map(canonical, chain[::2])) == list(map(canonical, expected[::2])):
            return True
    return None


def real_set(content: str, read: Read) -> RealSet | None:
    """The set that a content is; None if it is not read as one."""
    text = _CLOSED_OUTWARDS.sub(")", _OPEN_OUTWARDS.sub("(", plain_text(content)))
    return _alternatives(text, read)


def _alternatives(text: str, read: Read) -> RealSet | None:
    from sympy import Union

    parts = [_conditions(part, read) for part in split_top(text, _OR)]
    if any(part is None for part in parts):
        return None
    names = {part.variable for part in parts if part is not None and part.variable}
    if len(names) > 1:
        return None
    members = Union(*(part.members for part in parts if part is not None))
    if members.is_FiniteSet or members.is_empty:
        return None
    is_certain = len(parts) > 1 or all(part.is_certain for part in parts if part is not None)
    return RealSet(members, names.pop() if names else None, is_certain)


def _conditions(text: str, read: Read) -> RealSet | None:
    """Relations that all hold. Relations with commas between them that cannot all hold are alternatives."""
    from sympy import Intersection, Union

    if builder := _BUILDER.fullmatch(text):
        inner = _alternatives(builder[2].strip(), read)
        return None if inner is None or inner.variable not in (None, builder[1]) else RealSet(inner.members)
    if (found := _set_expression(text, read)) is not None:
        return found
    has_and = len(split_top(text, _AND)) > 1
    parts = [part for clause in split_top(text, _AND) for part in split_top(clause, _COMMA)]
    sets: list[Set] = []
    variable, last_sign = None, ""
    for part in parts:
        relation = _relation(part, read) if _RELATION.search(part) or not last_sign else None
        if relation is None and last_sign == r"\ne" and (number := read(part)) is not None:
            sets.append(_half_line(last_sign, number))  # x ≠ 1, 2
            continue
        if relation is None or (variable is not None and relation[0] != variable):
            return None
        variable, members, last_sign = relation
        sets.append(members)
    together = Intersection(*sets)
    return RealSet(Union(*sets) if together.is_empty and not has_and else together, variable or None)


def _relation(text: str, read: Read) -> "tuple[str, Set, str] | None":
    """Variable, solutions and last sign of ``x<1``, ``1<x\\le 2``, ``\\ge 5``, ``x\\in[0,1]``; None for others."""
    from sympy import Intersection

    if member := _MEMBER.fullmatch(text):
        found = _set_union(member[2], read)
        return None if found is None else (member[1], found, "")
    for pattern, sign in _BOUNDS:
        text = pattern.sub(sign, text, count=1) if pattern.match(text) else text
    operands = list(map(str.strip, _RELATION.split(text)))
    values, signs = operands[::2], operands[1::2]
    if not signs:
        return None
    if (around := _AROUND.fullmatch(values[0])) is not None and len(values) == 2:
        return _within(around, signs[0], values[1], read)
    names = [value for value in values if _LETTER.fullmatch(value)]
    if len(names) > 1 or (not names and values[0]):
        return None
    at = values.index(names[0]) if names else 0
    sets: list[Set] = []
    for position, value in enumerate(values):
        if position == at:
            continue
        number = read(value)
        if number is None or abs(position - at) != 1:
            return None
        sign = signs[min(position, at)]
        sets.append(_half_line(sign if position > at else _FLIPPED[sign], number))
    return (names[0] if names else "", Intersection(*sets), signs[-1])


def _within(around: "re.Match[str]", sign: str, bound: str, read: Read) -> "tuple[str, Set, str] | None":
    """Variable, solutions and sign of ``|x-1|<2``, and of the same with another sign."""
    from sympy import S

    centre, radius = read((around[2] or "+") + (around[3] or "0")), read(bound)
    if centre is None or radius is None or not radius.is_positive:
        return None
    low, high = -centre - radius, -centre + radius
    if sign in ("<", r"\le"):
        return around[1], _half_line(sign, high) & _half_line(_FLIPPED[sign], low), sign
    if sign in (">", r"\ge"):
        return around[1], _half_line(sign, high) | _half_line(_FLIPPED[sign], low), sign
    return around[1], (S.Reals - _half_line("=", low) - _half_line("=", high)), sign if sign == r"\ne" else ""


def _half_line(sign: str, number: Any) -> "Set":
    from sympy import FiniteSet, Interval, S

    if sign == "=":
        return FiniteSet(number)
    if sign == r"\ne":
        return S.Reals - FiniteSet(number)
    if sign in ("<", r"\le"):
        return Interval(S.NegativeInfinity, number, True, sign == "<")
    return Interval(number, S.Infinity, sign == ">", True)


def _set_union(text: str, read: Read) -> "Set | None":
    from sympy import Union

    parts = [_set_expression(part, read) for part in split_top(text, _OR)]
    return None if any(part is None for part in parts) else Union(*(part.members for part in parts if part is not None))


def _set_expression(text: str, read: Read) -> RealSet | None:
    """An interval, ℝ, or one of them without some points."""
    from sympy import FiniteSet, Interval, S

    if excepted := _EXCEPT.fullmatch(text):
        text = rf"\mathbb R \setminus \{{{excepted[1]}\}}"
    whole, *removed = split_top(text, _WITHOUT)
    if removed:
        base = _set_expression(whole, read)
        points = _LIST.fullmatch(removed[0])
        numbers = [read(part) for part in split_top(points[1], _COMMA)] if points else [None]
        if base is None or len(removed) > 1 or any(number is None for number in numbers):
            return None
        return RealSet(base.members - FiniteSet(*numbers))
    if _REALS.fullmatch(text):
        return RealSet(S.Reals)
    if points := _LIST.fullmatch(text):
        numbers = [read(part) for part in split_top(points[1], _COMMA)]
        return None if any(number is None for number in numbers) else RealSet(FiniteSet(*numbers))
    interval = _INTERVAL.fullmatch(text)
    bounds = split_top(interval[2], _COMMA) if interval else []
    if interval is None or len(bounds) != 2:
        return None
    low, high = (read(bound) for bound in bounds)
    if "[" in interval[1] and low is not None and low.is_infinite:
        return None
    if "]" in interval[3] and high is not None and high.is_infinite:
        return None
    if low is None or high is None or not (high - low).is_extended_positive:
        return None
    is_certain = "[" in interval[1] + interval[3].replace("]", "[") and interval[1] + interval[3] != "[]"
    is_certain = is_certain or low.is_infinite or high.is_infinite
    return RealSet(Interval(low, high, interval[1] == "(", interval[3] == ")"), None, bool(is_certain))
