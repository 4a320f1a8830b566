"""Conditions on rollouts, as users give them, and as SQL over the index; pages of the rollouts that meet them.

A page is read in two turns: first the keys of its rows, then those rows alone. When sorted by step, the rows of each
step are counted, and only the steps of the page are sorted. So the last page of ten million rollouts takes no more
memory than the first.
"""

from dataclasses import dataclass, fields
from typing import Any

import duckdb
import pyarrow as pa

from kdrl_core.config import did_you_mean
from kdrl_core.errors import DataError
from kdrl_core.look.rollouts.index_rows import INDEX, finite
from kdrl_core.look.rollouts.record import RECORD
from kdrl_core.look.rollouts.views import identifier
from kdrl_core.types import FinishReason, VerdictKind


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutFilter:
    """Conditions on rollouts. A rollout must meet all that are given; None is no condition."""

    run: str | None = None
    stage: str | None = None
    step_min: int | None = None
    step_max: int | None = None
    prompt_id: str | None = None
    sample: int | None = None
    verdicts: tuple[str, ...] | None = None
    finish_reason: str | None = None
    reward_min: float | None = None
    reward_max: float | None = None
    length_min: float | None = None
    length_max: float | None = None
    kl_min: float | None = None
    kl_max: float | None = None
    """Limits of `kl_mean`, the mean over the response's tokens."""
    text: str | None = None
    """Part of the prompt or the response; upper and lower case are the same."""

    def __post_init__(self) -> None:
        """Raise DataError for an unknown verdict or finish reason, an impossible number or broken text."""
        for name in ("step_min", "step_max", "sample"):
            require_int(name, getattr(self, name))
        for field in fields(self):
            if (value := getattr(self, field.name)) != value:
                raise DataError(f"{field.name} is not a number; give one, or leave it out")
        for name in ("run", "stage", "prompt_id", "text"):
            require_text(name, getattr(self, name))
        for name, given, known in (
            ("verdict", self.verdicts or (), [kind.value for kind in VerdictKind]),
            ("finish reason", (self.finish_reason,) if self.finish_reason else (), [one.value for one in FinishReason]),
        ):
            for word in given:
                if word not in known:
                    raise DataError(f"no {name} {word!r}{did_you_mean(word, known)}; there are {', '.join(known)}")

    def conditions(self) -> tuple[str, list[Any]]:
        """SQL over the index's columns, and its parameters. Without `text`: texts are not in the index."""
        parts, parameters = ["true"], []
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or field.name == "text":
                continue
            if field.name == "verdicts":
                parts.append(f"verdict in ({', '.join('?' * len(value))})" if value else "false")
                parameters.extend(value)
                continue
            column, operator = _CONDITIONS.get(field.name, (field.name, "="))
            parts.append(f"{column} {operator} ?")
            parameters.append(value)
        return " and ".join(parts), parameters


MOST = 2**31 - 1
"""The greatest step, sample, limit or offset."""


def require_int(name: str, value: int | None) -> None:
    """Raise DataError for a number that no column holds."""
    if value is not None and not 0 <= value <= MOST:
        fault = "must not be negative" if value < 0 else "is too large"
        raise DataError(f"{name} {fault}: give a whole number from 0 to {MOST:,}")


def require_text(name: str, value: str | None) -> None:
    """Raise DataError for a text that is not Unicode, such as bytes of another encoding on the command line."""
    try:
        (value or "").encode()
    except UnicodeEncodeError:
        raise DataError(f"{name} {value!r} is not valid UTF-8; give it in UTF-8") from None


_CONDITIONS = {
    f"{name}_{end}": (column, operator)
    for name, column in (("step", "step"), ("reward", "reward"), ("length", "length"), ("kl", "kl_mean"))
    for end, operator in (("min", ">="), ("max", "<="))
}

SORTABLE = ("run", *(name for name in INDEX.names if name not in ("row", "response_preview")))


def order_by(sort: str, *, descending: bool) -> str:
    """`order by` of a sort column. Equal rollouts are sorted by run, stage, step and row. Raises DataError if there is
    no such column; the message names the nearest."""
    if sort not in SORTABLE:
        # A known column that cannot be sorted by is not a typo.
        near = "" if sort in RECORD.names else did_you_mean(sort, SORTABLE)
        raise DataError(f"cannot sort by {sort!r}{near}; columns: {', '.join(SORTABLE)}")
    direction = "desc" if descending else "asc"
    if sort == "step":
        return f"order by run, stage {direction}, step {direction}, row"
    return f"order by {sort} {direction} nulls last, run, stage, step, row"


_COLUMNS = ("run", *INDEX.names)


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Some of the rollouts that meet a filter."""

    total: int
    """Rollouts that meet it."""
    rows: list[dict[str, Any]]
    """Their single values, and `response_preview`."""


def find_page(
    cursor: duckdb.DuckDBPyConnection,
    source: str,
    where: RolloutFilter,
    *,
    sort: str,
    descending: bool,
    limit: int,
    offset: int,
) -> Page:
    """The page of `source`, which is the index or a part of it. Raises DataError if the sort column is unknown."""
    order = order_by(sort, descending=descending)
    condition, parameters = where.conditions()
    counted = cursor.execute(
        f"select run, stage, step, count(*) from {source} where {condition} group by all", parameters
    ).fetchall()
    total = sum(count for *_, count in counted)
    if sort == "step" and limit:
        steps, offset = _steps_of_page(counted, descending, limit, offset)
        places = ", ".join(["(?, ?, ?)"] * len(steps))
        condition += f" and (run, stage, step) in ({places})" if steps else " and false"
        parameters += [value for step in steps for value in step]
    asked = f"select run, stage, step, row from {source} where {condition} {order} limit {limit} offset {offset}"
    keys = cursor.sql(asked, params=parameters).to_arrow_table()
    return Page(total=total, rows=_rows_of(cursor, keys))


def _steps_of_page(
    counted: list[tuple[Any, ...]], descending: bool, limit: int, offset: int
) -> tuple[list[tuple[Any, ...]], int]:
    """The steps of a page, in order, and the number of rows of the first step that come before the page."""
    ordered = sorted(counted, key=lambda one: one[1:3], reverse=descending)
    ordered.sort(key=lambda one: str(one[0]))
    chosen: list[tuple[Any, ...]] = []
    left = limit
    for *step, count in ordered:
        if not chosen and offset >= count:
            offset -= count
            continue
        left -= count if chosen else count - offset
        chosen.append(tuple(step))
        if left <= 0:
            break
    return chosen, offset if chosen else 0


def _rows_of(cursor: duckdb.DuckDBPyConnection, keys: pa.Table) -> list[dict[str, Any]]:
    """The rows of some keys, in their order. Reads only the parts of the index that hold their steps, because previews
    make the index large."""
    if not len(keys):
        return []
    cursor.register("wanted", keys)
    steps = ", ".join(map(str, sorted(set(keys["step"].to_pylist()))))
    columns = ", ".join(map(identifier, _COLUMNS))
    query = f"select {columns} from indexed join wanted using (run, stage, step, row) where step in ({steps})"
    of_key = {_key(row): row for row in cursor.sql(query).to_arrow_table().to_pylist()}
    rows = [of_key[_key(key)] for key in keys.to_pylist()]
    return [{name: finite(value) for name, value in row.items() if name != "row"} for row in rows]


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["run"], row["stage"], row["step"], row["row"]
