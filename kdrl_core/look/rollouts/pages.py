"""Pages of rollouts from the index: first the keys of a page's rows, then those rows alone.

When sorted by step, the rows of each step are counted, and only the steps of the page are sorted. So the last page of
ten million rollouts takes no more memory than the first.
"""

from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from kdrl_core.look.rollouts.filters import RolloutFilter, order_by
from kdrl_core.look.rollouts.index_rows import INDEX
from kdrl_core.look.rollouts.step_summary import finite
from kdrl_core.look.rollouts.views import identifier

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
    """The steps of a page, in order, and the number of rows of the first step that come before it."""
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
