r"""Forms that a right answer cannot have, although math-verify may accept them: it ignores units, bounds and logic.

Each objection compares a normalised answer with a normalised ground truth. Tests:
``FOOLED`` and ``STILL_RIGHT`` in tests/unit/verify/test_verify_accuracy.py.
"""

import re

from kdrl_core.verify.normalise import ANNOUNCEMENT, MAX_CHARS

_SENTENCE_CHARS = 200
_RELATION = re.compile(r"\\(?:n?leq?|n?geq?|neq?|lt|gt|not|leqslant|geqslant)(?![A-Za-z])|[<>]|!=")
_ALTERNATIVES_IN_BRACKETS = re.compile(r"[(\[](?:(?!\bor\b)[^()\[\],])*+or\b[^()\[\],]*+[)\]]")
_UNIT = re.compile(
    r"\d[\d.,{}\\,\s]{0,20}?(?:\\(?:text|mathrm|rm)\w*\s*\{)?\s*([A-Za-z]++)\s*+\}?(?:\s*+\^\s*+\{?(\d)\}?)?+\s*+\}?\.?$"
    r"|(\^\s*+(?:\{\s*+)?\\circ\s*+\}?)$"
)
_DOLLAR = re.compile(r"\\?\$")
_CHANGING = re.compile(
    r"(?<![\\A-Za-z])(?:hundred|thousand|million|billion|trillion|dozen|times|squared|cubed|half|twice|double|"
    r"less|more|not|wrong|incorrect|false|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)"
    r"(?![A-Za-z])",
    re.IGNORECASE,
)
_LOGIC = re.compile(
    r"\\(?:lor|vee|land|wedge|to|rightarrow|Rightarrow|implies|iff|Leftrightarrow|Leftarrow|mid|equiv|sim)(?![A-Za-z])"
    r"|(?<=\S)\s*\\approx(?![A-Za-z])|\\neg(?![A-Za-z])|\\[lc]?dots(?![A-Za-z])"
)
_UNION = re.compile(r"\\cup(?![A-Za-z])")
_ROW_BREAK = re.compile(r"\\\\(?![A-Za-z])")
_BRACKET = re.compile(r"[(\[{]")
_ANY_LETTER = re.compile(r"[A-Za-z]")
_OPERATOR = re.compile(r"[+\-*/]")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_NO_DIGIT = re.compile(r"\D+")
_QUANTITY = re.compile(r"[-+]?(?:\d|\\(?:d?frac|sqrt|pi)(?![A-Za-z]))")
_WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}|[^\x00-\x7f]|\\lim(?![A-Za-z])")
_LETTER = re.compile(r"(?<![\\A-Za-z])[A-Za-z]")
_UNITS = {
    name: number
    for number, names in enumerate(
        (
            ("s", "sec", "second", "seconds"), ("min", "minute", "minutes"), ("h", "hr", "hrs", "hour", "hours"),
            ("day", "days"), ("week", "weeks"), ("month", "months"), ("year", "years"),
            ("mm", "millimeter", "millimeters"), ("cm", "centimeter", "centimeters"), ("km", "kilometer", "kilometers"),
            ("m", "meter", "meters", "metre", "metres"), ("in", "inch", "inches"), ("ft", "foot", "feet"),
            ("yd", "yard", "yards"), ("mi", "mile", "miles"), ("mg", "milligram", "milligrams"),
            ("g", "gram", "grams"), ("kg", "kilogram", "kilograms"), ("lb", "lbs", "pound", "pounds"),
            ("oz", "ounce", "ounces"), ("ml", "milliliter", "milliliters"), ("l", "liter", "liters"),
            ("dollar", "dollars", "usd"), ("cent", "cents"), ("degree", "degrees", "circ"),
            ("rad", "radian", "radians"),
        )
    )
    for name in names
}  # fmt: skip
"""Each spelling of a unit, with the number of the unit. Different units are different quantities."""

_UNIT_POWER = re.compile(r"(?<=[A-Za-z}])\s*\^\s*+(?:\{\s*+)?-?\d\s*\}?", re.ASCII)


def objection(answer: str, truth: str) -> str | None:
    r"""Why an answer cannot be right, although math-verify may find it equal; None if nothing is against it.

    A bound is not a value (``\leq 5``, ``\neq 7``), nor is a chain of logic (``5 \lor 6``). Alternatives are not a pair
    (``(3 or 4)``), a value is not an equation (2 for ``x+y=2``), minutes are not hours, and 5 million are not 5.
    """
    if _RELATION.match(answer) and not _RELATION.search(truth):
        return "a bound where the ground truth is a value"
    if _ALTERNATIVES_IN_BRACKETS.search(answer) and not _ALTERNATIVES_IN_BRACKETS.search(truth):
        return "alternatives where the ground truth has one"
    if len(answer) <= _SENTENCE_CHARS and ANNOUNCEMENT.search(answer) and not ANNOUNCEMENT.search(truth):
        return "a sentence that does not announce one answer"
    is_formula = not _WORDS.search(answer)
    if is_formula and _LOGIC.search(answer) and not _LOGIC.search(truth):
        return "a chain of logic where the ground truth is a value"
    if is_formula and _UNION.search(answer) and not _BRACKET.search(answer):
        return "a union of what are no sets"
    if is_formula and _ROW_BREAK.search(answer) and r"\begin" not in answer and not _ROW_BREAK.search(truth):
        return "several lines where the ground truth has one"
    if _is_sum_of_symbols(truth[:MAX_CHARS]) and "=" not in answer and not _LETTER.search(answer):
        return "a value where the ground truth is an equation"
    changing = {word.lower() for word in _CHANGING.findall(answer)} - {w.lower() for w in _CHANGING.findall(truth)}
    if changing and _QUANTITY.match(answer):
        return f"'{min(changing)}' changes the answer"
    given, expected = _unit(answer), _unit(truth)
    if given is not None and expected is not None and given != expected:
        return "another unit than the ground truth's"
    return None


def _is_sum_of_symbols(truth: str) -> bool:
    """Whether the truth is one equation with a letter and an operator on its left side: ``x + y = 2``."""
    left, equals, right = truth.partition("=")
    return bool(equals and "=" not in right and _ANY_LETTER.search(left) and _OPERATOR.search(left))


def _unit(content: str) -> tuple[int, str] | None:
    """The unit and its power; None if there is no known unit."""
    match = _UNIT.search(content[-60:])
    if match is None:
        return (_UNITS["dollar"], "") if _DOLLAR.match(content) else None
    unit = _UNITS.get("degree" if match[3] else match[1].lower())
    return None if unit is None else (unit, match[2] or "")


def constants_of(content: str) -> list[str]:
    """The sides without letters in a chain of equalities, if there are several: each must be the answer."""
    if _WORDS.search(content):
        return []
    sides = [side.strip() for side in content.strip("()").split("=")]
    constants = [side for side in sides if side and not _ANY_LETTER.search(_COMMAND.sub("", side))]
    return constants if len(constants) > 1 else []


def lost_digits(content: str, read: str) -> bool:
    r"""Whether math-verify has read fewer digits than the answer has.

    It drops what it takes for a unit: of ``3 \text{ or so, or } 4 \text{ m}`` it reads 3. Powers of units do not count.
    """
    written, understood = (_NO_DIGIT.sub("", _UNIT_POWER.sub("", text)) for text in (content, read))
    return written != understood
