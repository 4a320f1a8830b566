"""What a reward function returns, and the one form that it is brought into."""

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Real
from typing import Any, NamedTuple

from kdrl_core.types import VerdictKind

Scored = tuple[str, str, dict[str, Any]]
"""Response, answer and problem, as functions take them."""
MAX_REASON_CHARS = 1_000
MAX_VALUE = 1e9
"""Beyond it the spread of a group would not be finite in float32."""
_MAX_PARTS = 32
_MAX_SHOWN = 60
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,59}")


class BadReturnError(ValueError):
    """What a function returned, or did to its arguments, is against the contract."""


@dataclass(frozen=True, slots=True)
class Score:
    """A value with the reason for it. `parts` are recorded beside the value, and are no part of the reward."""

    value: float
    reason: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
    extracted: str | None = None
    """The answer that was found in the response; evaluations vote over it (maj@k)."""


class Found(NamedTuple):
    """What one function found on one response."""

    value: float
    reason: str = ""
    parts: dict[str, float] | None = None
    extracted: str | None = None
    failed: VerdictKind | None = None
    """TIMEOUT or ERROR if the function gave no value. Then `value` is 0, and `reason` says what failed and where."""


def as_found(returned: Any) -> Found | None:
    """What a function returned, checked, as plain values; None if it does not apply.

    Raises BadReturnError if it is no number, None, dictionary of numbers, or Score; the text says what it is.
    """
    if returned is None:
        return None
    if isinstance(returned, Score):
        return _of_score(returned)
    if isinstance(returned, Mapping):
        parts = _numbers(returned, "a dictionary")
        return Found(_number(math.fsum(parts.values()), "the sum of the values that it returned is"), parts=parts)
    return Found(_number(returned, "it returned"))


def _of_score(score: Score) -> Found:
    if not isinstance(score.reason, str):
        raise BadReturnError(f"it returned a Score whose reason is {described(score.reason)}; give text")
    if not isinstance(score.extracted, str | None):
        raise BadReturnError(f"it returned a Score whose extracted is {described(score.extracted)}; give text or None")
    if not isinstance(score.parts, Mapping):
        raise BadReturnError(
            f"it returned a Score whose parts are {described(score.parts)}; give a dictionary of numbers"
        )
    parts = _numbers(score.parts, "a Score") if score.parts else None
    value = _number(score.value, "it returned a Score whose value is")
    return Found(value, _plain(score.reason), parts, None if score.extracted is None else _plain(score.extracted))


def _plain(text: str) -> str:
    """As `str` itself: a class of the user's module could not be read outside of the worker."""
    return str.__str__(text)[:MAX_REASON_CHARS]


def _numbers(values: Mapping[Any, Any], what: str) -> dict[str, float]:
    if not values:
        raise BadReturnError(f"it returned {what} without values; return None if the function does not apply")
    if len(values) > _MAX_PARTS:
        raise BadReturnError(f"it returned {what} with {len(values)} values; {_MAX_PARTS} are recorded at most")
    for name in values:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise BadReturnError(
                f"it returned {what} with the key {described(name)}; name its values with letters, digits, _ and -"
            )
    return {_plain(name): _number(value, f"it returned {what} in which {name!r} is") for name, value in values.items()}


def _number(value: Any, what: str) -> float:
    if type(value) is not float:
        if isinstance(value, Decimal):
            value = float(value)
        elif not isinstance(value, Real) and hasattr(value, "item"):  # a bool of NumPy, a tensor of one number
            with suppress(Exception):
                value = value.item()
        if not isinstance(value, Real):
            raise BadReturnError(
                f"{what} {described(value)}; return a number, None, a dictionary of numbers, or a Score"
            )
        value = float(value)
    if not math.isfinite(value):
        raise BadReturnError(f"{what} {value}; return a finite number, or None if the function does not apply")
    if abs(value) > MAX_VALUE:
        raise BadReturnError(f"{what} {value:.4g}; return a number between -{MAX_VALUE:g} and {MAX_VALUE:g}")
    return float(value)


def described(value: Any) -> str:
    """Type and beginning of a value, for error texts."""
    try:
        text = repr(value)
    except BaseException:  # the user's own class may raise anything
        text = "…"
    return f"{type(value).__name__} {text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + '…'}"
