"""Malformed rows that are dropped: how many, for which reasons, and when they are too many."""

import re
from collections.abc import Mapping
from typing import Any

from kdrl_core.errors import DataError

_VALUES = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\(.*\)|[+-]?\d[\d.]*")
"""What differs from row to row in one reason: quoted texts, values in brackets, numbers."""
_MOST_REASONS = 1_000
_TOLD = 3


class Dropped:
    """Counts of malformed rows by reason: the field and the problem, whatever the value was."""

    def __init__(self) -> None:
        self.total = 0
        self.reasons: dict[str, tuple[int, str]] = {}
        """Reason → how many rows, and the first of them in words: place, field and problem."""

    def add(self, field: str | None, problem: str, what: str) -> None:
        """Count one row; `what` names it in words."""
        self.total += 1
        reason = f"{field}: {_VALUES.sub('…', problem)}"
        if reason not in self.reasons and len(self.reasons) == _MOST_REASONS:
            reason = "other reasons"
        count, first = self.reasons.get(reason, (0, what))
        self.reasons[reason] = count + 1, first

    @property
    def first(self) -> str | None:
        """The first of all rows that were dropped, in words."""
        return next(iter(self.reasons.values()))[1] if self.reasons else None

    def commonest(self) -> str:
        """The three commonest reasons, each with its number of rows and its first row."""
        found = sorted(self.reasons.values(), key=lambda reason: -reason[0])
        told = "; ".join(f"{count:,} × {first}" for count, first in found[:_TOLD])
        rest = sum(count for count, _ in found[_TOLD:])
        return f"{told}; {rest:,} for other reasons" if rest else told

    def refuse_above(self, share: float, num_rows: int, *, where: str, remedy: str) -> None:
        """Raise DataError if more than this share of `num_rows` rows, in all, were dropped."""
        if self.total > share * num_rows:
            found = 100 * self.total / num_rows
            raise DataError(
                f"{where}: {self.total:,} of {num_rows:,} rows are malformed, which is {found:.1f} %; at most "
                f"{100 * share:g} % are dropped. The commonest reasons: {self.commonest()}; {remedy}"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values for `from_json`."""
        return {reason: list(counted) for reason, counted in self.reasons.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Dropped":
        """What `to_json` wrote."""
        found = cls()
        found.reasons = {reason: (count, first) for reason, (count, first) in values.items()}
        found.total = sum(count for count, _ in found.reasons.values())
        return found
