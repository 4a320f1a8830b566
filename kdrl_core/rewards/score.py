"""What a reward function returns, and the one form that it is brought into."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NamedTuple

from kdrl_core.types import VerdictKind

Scored = tuple[str, str, dict[str, Any]]
"""Response, answer and problem, as functions take them."""
MAX_REASON_CHARS = 1_000
_MAX_SHOWN = 60


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
    """What a function returned, checked; None if it does not apply.

    Raises TypeError or ValueError if it is no number, None, dictionary of numbers, or Score; the text says what it is.
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
        raise TypeError(f"it returned a Score whose reason is {described(score.reason)}; give text")
    if not isinstance(score.extracted, str | None):
        raise TypeError(f"it returned a Score whose extracted is {described(score.extracted)}; give text or None")
    if not isinstance(score.parts, Mapping):
        raise TypeError(f"it returned a Score whose parts are {described(score.parts)}; give a dictionary of numbers")
    parts = _numbers(score.parts, "a Score") if score.parts else None
    return Found(
        _number(score.value, "it returned a Score whose value is"),
        score.reason[:MAX_REASON_CHARS],
        parts,
        score.extracted,
    )


def _numbers(values: Mapping[Any, Any], what: str) -> dict[str, float]:
    if not values:
        raise ValueError(f"it returned {what} without values; return None if the function does not apply")
    for name in values:
        if not isinstance(name, str):
            raise TypeError(f"it returned {what} with the key {described(name)}; name its values with text")
    return {
        name: _number(value, f"it returned {what} in which {name[:_MAX_SHOWN]!r} is") for name, value in values.items()
    }


def _number(value: Any, what: str) -> float:
    if type(value) is not float:
        if not isinstance(value, Real):
            raise TypeError(f"{what} {described(value)}; return a number, None, a dictionary of numbers, or a Score")
        value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"{what} {value}; return a finite number, or None if the function does not apply")
    return float(value)


def described(value: Any) -> str:
    """Type and beginning of a value, for error texts."""
    try:
        text = repr(value)
    except Exception:
        text = "…"
    return f"{type(value).__name__} {text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + '…'}"
