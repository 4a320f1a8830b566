"""Rows with responses: which columns are read, and how each row is checked.

:mod:`kdrl_core.verify.row_files` reads and writes the files.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kdrl_core.config.shapes import has
from kdrl_core.errors import DataError
from kdrl_core.verify.faults import Fault
from kdrl_core.verify.values import MISSING, RowError, kind_of, response_text, truth_text, value_at

RESPONSE_NAMES = ("response", "completion", "prediction", "output", "generation", "text")
TRUTH_NAMES = ("ground_truth", "gold", "answer", "solution", "target", "reward_model.ground_truth")

_MAX_LISTED = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Names of the columns to read; `a.b` is a field of column a. `expected` says whether a response is right; `by`
    groups the summary."""

    response: str
    truth: str
    expected: str | None = None
    by: str | None = None

    @property
    def used(self) -> list[str]:
        """The columns, each of them once."""
        return list(dict.fromkeys(name for name in (self.response, self.truth, self.expected, self.by) if name))


def choose_columns(
    names: Sequence[str],
    *,
    origin: str,
    response: str | None = None,
    truth: str | None = None,
    expected: str | None = None,
    by: str | None = None,
) -> Columns:
    """The columns to read: the given ones; for responses and truths, if not given, the one with a usual name.

    Raises DataError if a given column is missing, or if no column or several have a usual name.
    """
    for option, name in (("response", response), ("truth", truth), ("expected", expected), ("by", by)):
        if name is not None and not has(names, name):
            raise DataError(f"{origin} has no column '{name}' (--{option}); it has {_listed(names)}")
    response = response or _the_one(names, RESPONSE_NAMES, "response", origin=origin, but=truth)
    truth = truth or _the_one(names, TRUTH_NAMES, "truth", origin=origin, but=response)
    if response == truth:
        raise DataError(f"{origin}: column '{response}' cannot be response and ground truth; set --response or --truth")
    return Columns(response=response, truth=truth, expected=expected, by=by)


def _the_one(names: Sequence[str], usual: Sequence[str], option: str, *, origin: str, but: str | None) -> str:
    found = [name for name in usual if has(names, name) and name != but]
    what = {"response": "the responses", "truth": "the ground truths"}[option]
    if not found:
        raise DataError(
            f"{origin}: no column for {what} ({', '.join(usual)}); it has {_listed(names)}; set --{option} COL"
        )
    if len(found) > 1:
        raise DataError(f"{origin}: {' and '.join(found)} may each be {what}; choose with --{option} COL")
    return found[0]


@dataclass(slots=True, kw_only=True)
class Batch:
    """Consecutive rows. Each list but `faults` has one entry for each row that can be judged."""

    rows: Any = None
    """These rows as they are in the file, for `RowFile.write`."""
    items: list[tuple[str, str]] = field(default_factory=list)
    """(response, ground truth)."""
    numbers: list[int] = field(default_factory=list)
    """Number of the row in the file, from 1; for JSON Lines, of the line."""
    expected: list[bool | None] = field(default_factory=list)
    groups: list[str | None] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    """The rows that cannot be judged."""

    def add(self, row: Mapping[str, object], number: int, columns: Columns) -> None:
        """Append a row. If it cannot be judged, raises RowError and appends nothing."""
        item = _read(row, columns.response, response_text), _read(row, columns.truth, truth_text)
        if not item[1].strip():
            raise RowError("empty", columns.truth)
        expected = None if columns.expected is None else _flag(row, columns.expected)
        self.items.append(item)
        self.numbers.append(number)
        self.expected.append(expected)
        self.groups.append(None if columns.by is None else _group(value_at(row, columns.by)))


def _read(row: Mapping[str, object], name: str, read: Callable[[object], str]) -> str:
    """The text that `read` finds in a field. Raises RowError that names the field."""
    value = value_at(row, name)
    if value is MISSING:
        raise RowError("missing", name)
    if value is None:
        raise RowError("null", name)
    try:
        return read(value)
    except RowError as fault:
        raise RowError(str(fault), f"{name}{fault.name or ''}") from fault


def _flag(row: Mapping[str, object], name: str) -> bool:
    value = value_at(row, name)
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    if value is MISSING:
        raise RowError("missing", name)
    shown = value if isinstance(value, (int, float)) else "null" if value is None else kind_of(value)
    raise RowError(f"true, false, 1 or 0 is expected, found {shown}", name)


def _group(value: object) -> str:
    """The value as the summary shows it; `null` also if the row lacks the column."""
    value = None if value is MISSING else value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return "".join(char if char.isprintable() else "\ufffd" for char in text)  # it goes to a terminal


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return f"{', '.join(names[:_MAX_LISTED])}{more}" if names else "none"
