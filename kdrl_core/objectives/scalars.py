"""Checks of plain values: a `ValueError` names the argument, what was expected and what was given. Imports no torch."""

import math
from collections.abc import Iterable
from numbers import Integral
from typing import SupportsFloat


def check_choice(argument: str, name: str, choices: Iterable[str]) -> None:
    """`name` is one of the variants."""
    choices = tuple(choices)
    if name not in choices:
        raise ValueError(f"{argument}: expected one of {', '.join(choices)}, given {name!r}")


def check_not_negative(argument: str, value: object) -> None:
    """`value` is a finite number of at least 0, or a tensor of one without dimensions."""
    if not 0.0 <= as_number(value) < math.inf:
        raise ValueError(f"{argument}: expected a finite number of at least 0, given {value!r:.50}")


def check_positive(argument: str, value: object) -> None:
    """`value` is a finite number above 0, or a tensor of one without dimensions."""
    if not 0.0 < as_number(value) < math.inf:
        raise ValueError(f"{argument}: expected a finite number above 0, given {value!r:.50}")


def check_log_probability(argument: str, value: object) -> None:
    """`value` is a finite number of at most 0."""
    if not -math.inf < as_number(value) <= 0.0:
        raise ValueError(f"{argument}: expected a finite log-probability, at most 0, given {value!r:.50}")


def as_number(value: object) -> float:
    """`value` as a float; NaN for what is no single number: None, text, a truth value, a vector."""
    if isinstance(value, bool) or not isinstance(value, SupportsFloat) or getattr(value, "ndim", 0) != 0:
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


def check_group_size(group_size: object, num_rows: int | None = None) -> None:
    """`group_size` is an integer of at least 2 and, where `num_rows` is given, divides it."""
    if isinstance(group_size, bool) or not isinstance(group_size, Integral) or group_size < 2:
        raise ValueError(f"group_size: expected an integer of at least 2, given {group_size!r}")
    if num_rows is not None and num_rows % int(group_size):
        raise ValueError(
            f"group_size: expected a divisor of the number of responses {num_rows}, given {group_size}; "
            "pass whole groups, contiguously"
        )
