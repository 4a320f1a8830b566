r"""Numbers in other notations: ``4.5e33``, ``12 345``, ``3 1/2``, ``0.\dot3\dot6``, ``12th``, ``5 million``.

Except for a bare point (``.5``), a number must be the whole content, or all of it before a unit.
"""

import itertools
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from kdrl_core.verify.latex import Equal, unwrapped

_BARE_POINT = re.compile(r"(?<![\d.])\.(?=\d)")
_FLIPPED = re.compile(r"([+-]?[\d./]+)\s*=\s*([A-Za-z])", re.ASCII)
_PERCENT = re.compile(r"(?<=[\d}])\s*(?:\\text\s*\{\s*)?percent\s*\}?$")
_DOTTED = re.compile(r"\\dot\s*+(?:\{(\d)\}|(\d))(?:(\d*+)\\dot\s*+(?:\{(\d)\}|(\d)))?+", re.ASCII)
_REPEATING = re.compile(
    r"([+-]?)(\d{1,9})\.(\d{0,9})(?:\\(?:overline|dot|bar)\s*\{(\d{1,9})\}|\((\d{1,9})\))", re.ASCII
)
_REMAINDER = re.compile(
    r"(?:^|(?<==)|(?<== ))(\d{1,18})\s*+"
    r"(?:(?:\\equiv|=)\s*+(\d{1,18})\s*+(?:\\pmod|\(\s*+\\?(?:mod|bmod))|\\[bm]?mod(?![A-Za-z]))"
    r"\s*+\{?\s*+(\d{1,18})\s*+\}?\s*+\)?",
    re.ASCII,
)
_ENDLESS = re.compile(r"([+-]?\d{1,9})\.(\d{2,18})\s*+(?:\.\.\.+|\\[lc]?dots)", re.ASCII)
_SCIENTIFIC = re.compile(r"([+-]?\d+(?:\.\d+)?)[eE]([+-]?\d{1,4})(?=\s|\\text|\\math|$)", re.ASCII)
_TIMES_TEN = re.compile(r"(?<=\d)\s*[xX*]\s*(?=10\s*\^)")
_SPACED_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:(?: |\\[,;: ]|~)\d{3})+(?:\.\d+)?", re.ASCII)
_MIXED = re.compile(r"([+-]?\d{1,12}) (\d{1,12})/(\d{1,12})", re.ASCII)
_NOT_DIGIT = re.compile(r"[^\d.+-]+", re.ASCII)
_ORDINAL = re.compile(
    r"(\d{1,12})\s*+(?:\^\s*+)?+\{?\s*+(?:\\(?:text|mathrm|textrm|rm|textsuperscript)\s*+\{?\s*+)?"
    r"(?:st|nd|rd|th)\s*+\}*",
    re.ASCII,
)
_POWER_OF_TEN = re.compile(
    r"((?:\\\$\s*+)?[+-]?\d[\d.,]*+(?:\\frac\{\d++\}\{\d++\})?+)\s*+(?:\\text\s*+\{\s*+)?"
    r"(hundred|thousand|million|billion|trillion)(?![A-Za-z])(\s*+\})?"
)
_TENS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_NAMES = {
    name: str(number)
    for number, name in enumerate(
        (
            "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
            "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
        )
    )
}  # fmt: skip
_WHOLE = (
    (_FLIPPED, r"\2=\1"),
    (_MIXED, r"\1\\frac{\2}{\3}"),
    (_ORDINAL, r"\1"),
)
"""Patterns of numbers that are the whole content, and their replacements."""

_TIME = re.compile(r"(\d{1,2})(?=:| ?[ap]m):?([0-5]\d)?(?::([0-5]\d))?(?: ?([ap])m)?", re.ASCII | re.IGNORECASE)
_APPROXIMATELY = re.compile(r"\\(?:approx(?:eq)?|doteq|simeq)(?![A-Za-z])")
_DECIMAL = re.compile(r"[+-]?\d+(?:\.(\d*))?", re.ASCII)
_DECIMAL_COMMA = re.compile(r"([+-]?\d+),(\d{1,2}|\d{4,})|([+-]?\d{4,}),(\d+)", re.ASCII)
_BASED = re.compile(r"\(?([0-9A-Za-z]+)\)?\s*_\s*(?:\{\s*(?:\\text\{)?(\d{1,2}|[a-z]{3,9})\}?\s*\}|(\d))", re.ASCII)
_BASE_IN_WORDS = re.compile(r"([0-9A-Za-z]+) ?\(? ?(?:in )?base (\d{1,2}|[a-z]{3,9}) ?\)?", re.ASCII)
_BASE_NAMES = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "twelve": 12
}  # fmt: skip


def plain_number(content: str) -> str:
    """A content with its number in the notation that math-verify reads."""
    content = _BARE_POINT.sub("0.", content)
    if name := _NAMES.get(unwrapped(content).lower()):
        return name
    if match := _REPEATING.fullmatch(_DOTTED.sub(_overlined, content)):  # 0.1\overline{6} is 1/6
        sign, whole, fixed, *periods = match.groups()
        period = periods[0] or periods[1]
        below = (10 ** len(period) - 1) * 10 ** len(fixed)
        return rf"{sign}\frac{{{int(whole + fixed + period) - int(whole + fixed)}}}{{{below}}}"
    if match := _ENDLESS.fullmatch(content):
        content = _with_period(*match.groups()) or content
    if match := _SCIENTIFIC.match(content):
        content = match.expand(r"\1 \\cdot 10^{\2}") + content[match.end() :]
    content = _REMAINDER.sub(_computed, content)
    content = _POWER_OF_TEN.sub(_written_out, content, count=1)
    content = _TIMES_TEN.sub(r" \\times ", _PERCENT.sub(r"\\%", content))
    if _SPACED_THOUSANDS.fullmatch(content):
        return _NOT_DIGIT.sub("", content)
    for pattern, replacement in _WHOLE:
        if match := pattern.fullmatch(content):
            return match.expand(replacement)
    return content


def _with_period(whole: str, digits: str) -> str | None:
    """``0.4545…`` as a fraction. The period must stand there twice, one of a single digit three times; else None."""
    for length in range(1, len(digits) // 2 + 1):
        times = max(2, 3 // length)
        if digits.endswith(digits[-length:] * times) and len(digits) >= length * times:
            period = digits[-length:]
            while digits.endswith(period):
                digits = digits[:-length]
            return plain_number(rf"{whole}.{digits}\overline{{{period}}}")
    return None


def _computed(match: "re.Match[str]") -> str:
    """``17 \\bmod 5`` as 2, and ``17 \\equiv 2 \\pmod 5`` as 2, if that is true."""
    number, residue, modulus = match[1], match[2], int(match[3])
    if not modulus or (residue and (int(number) - int(residue)) % modulus):
        return match[0]
    return residue or str(int(number) % modulus)


def _overlined(dots: "re.Match[str]") -> str:
    return rf"\overline{{{dots[1] or dots[2]}{dots[3] or ''}{dots[4] or dots[5] or ''}}}"


def _written_out(match: "re.Match[str]") -> str:
    is_closed = r"\text" in match[0] and not match[3]
    return rf"{match[1]} \cdot 10^{{{_TENS[match[2]]}}}" + (r"\text{" if is_closed else "")


def decimal_comma(content: str, *, is_truth: bool = False) -> str | None:
    """``1,22`` or ``1000,99`` as a decimal; None if the comma can part thousands (``1,000``), or there is no comma.

    A ground truth with one digit after the comma (``2,5``) is more likely a list than a decimal, so it gives None too.
    """
    match = _DECIMAL_COMMA.fullmatch(content)
    if match is None or (is_truth and len(match[2] or match[4]) == 1):
        return None
    return content.replace(",", ".")


def as_based_integer(content: str) -> tuple[str, int] | None:
    """Digits and base of ``1011_2`` or ``1011_{two}``; None for anything else."""
    match = _BASED.fullmatch(content) or _BASE_IN_WORDS.fullmatch(unwrapped(content))
    if match is None:
        return None
    name = match[match.lastindex or 2]
    base = int(name) if name.isdigit() else _BASE_NAMES.get(name, 0)
    digits = match[1].upper().lstrip("0") or "0"
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in digits):
        return None
    return digits, base


def same_based_integer(answer: str, truth: str) -> bool | None:
    """Whether two integers in a given base are the same digits in the same base; None if one of them is none."""
    given, expected = as_based_integer(answer), as_based_integer(truth)
    if expected is None or (given is None and "_" not in answer):
        return None
    return given == expected


def same_time(answer: str, truth: str) -> bool | None:
    """Whether two times of day are the same: ``4:30 pm``, ``16:30``, ``16:30:00``. None if one of them is no time.

    Without "am" or "pm" the text may be a ratio as well, so unequal ones give None too.
    """
    given, expected = _TIME.fullmatch(unwrapped(answer)), _TIME.fullmatch(unwrapped(truth))
    if given is None or expected is None:
        return False if expected is not None and expected[4] else None
    halves = {match[4].lower() for match in (given, expected) if match[4]}
    seconds = [_seconds(match) for match in (given, expected)]
    if len(halves) == 1 and not (given[4] and expected[4]):
        seconds = [second % 43_200 for second in seconds] if max(int(given[1]), int(expected[1])) <= 12 else seconds
    return seconds[0] == seconds[1] or (False if halves else None)


def _seconds(time: "re.Match[str]") -> int:
    hours = int(time[1]) % 12 + 12 * (time[4].lower() == "p") if time[4] else int(time[1])
    return 3_600 * hours + 60 * int(time[2] or 0) + int(time[3] or 0)


def same_approximation(answer: str, truth: str, equal: Equal, read: Callable[[str], Any]) -> bool | None:
    r"""Whether an exact value followed by its approximation is the truth; None without ``\approx``.

    The approximation must be rounded, or cut off, to its last digit.
    """
    sides, expected = (list(map(str.strip, _APPROXIMATELY.split(text))) for text in (answer, truth))
    if len(sides) == 1 and len(expected) == 1:
        return None
    for exact, rounded in itertools.pairwise(sides):
        decimal = _DECIMAL.fullmatch(rounded)
        value, figure = read(exact.rpartition("=")[2]), read(rounded)
        if decimal is None or value is None or figure is None:
            return None
        unit = Fraction(1, 10 ** len(decimal[1] or ""))
        is_cut_off = unit < 1 and 0 <= value - figure < unit
        if abs(value - figure) > 0.500001 * unit and not is_cut_off:
            return False
    if len(expected) == 1 and "." not in truth:
        sides = sides[:1]  # only a decimal may be what the others are rounded to
    return any(side and own and equal(side, own) for side in sides for own in expected)
