"""Rows that cannot be used: why each of them, how many for which reason, and when they are too many."""

import re
from dataclasses import dataclass, field

from kdrl_core.errors import DataError

_VALUES = re.compile(r"'(?:[^'\\]|\\.){0,200}+'|\"(?:[^\"\\]|\\.){0,200}+\"|\([^()]{0,200}+\)|[+-]?\d[\d.]*+")
"""What differs from row to row in one reason: quoted texts, values in brackets, numbers."""
_TOLD = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why a row cannot be used."""

    where: str
    """File and row."""
    row: int
    field: str | None
    """The field that has the fault; None: the whole row has it."""
    problem: str
    is_answer_missing: bool = False
    """The row is not malformed; its set says that the problem has no answer."""

    def __str__(self) -> str:
        place = self.where if self.field is None else f"{self.where}, field '{self.field}'"
        return f"{place}: {self.problem}"


@dataclass(slots=True)
class Reasons:
    """Rows counted by reason."""

    found: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Reason → how many rows, and the first of them in words."""

    @property
    def total(self) -> int:
        """Number of rows."""
        return sum(count for count, _ in self.found.values())

    @property
    def first(self) -> str | None:
        """The first of all rows, in words."""
        return next((first for _, first in self.found.values()), None)

    def add(self, reason: str, first: str, count: int = 1) -> None:
        """Count rows; `first` names the first of them in words."""
        before, known = self.found.get(reason, (0, first))
        self.found[reason] = before + count, known

    def add_fault(self, fault: Fault) -> None:
        """Count a row by field and problem, whatever the value was."""
        self.add(f"{fault.field}: {_VALUES.sub('…', fault.problem)}", str(fault))

    def commonest(self) -> str:
        """The three commonest reasons, each with its number of rows and its first row."""
        found = sorted(self.found.values(), key=lambda reason: -reason[0])
        told = [f"{count:,} × {first}" for count, first in found[:_TOLD]]
        rest = sum(count for count, _ in found[_TOLD:])
        return "; ".join([*told, *([f"{rest:,} for other reasons"] if rest else [])])

    def refuse_above(self, share: float, num_rows: int, *, where: str, remedy: str) -> None:
        """Raise DataError if these are more than this share of `num_rows` rows in all."""
        if self.total > share * num_rows:
            raise DataError(
                f"{where}: {self.total:,} of {num_rows:,} rows are malformed, which is "
                f"{100 * self.total / num_rows:.1f} %; at most {100 * share:g} % are dropped. The commonest reasons: "
                f"{self.commonest()}; {remedy}"
            )
