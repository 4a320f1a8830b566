"""Consecutive rows while they are read: their columns, and the fault of each row that cannot be used."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from kdrl_core.errors import DataError
from kdrl_core.verify.faults import Fault


@dataclass(slots=True)
class Chunk:
    """Columns of consecutive rows, and the first fault of each row that cannot be used."""

    origin: str
    row_numbers: Sequence[int]
    columns: dict[str, pa.Array] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    """Column → name of its field in each row of the file."""
    labels: dict[str, pa.Array] = field(default_factory=dict)
    faults: dict[int, Fault] = field(default_factory=dict)
    notes: dict[str, list[int]] = field(default_factory=dict)
    """What is to be told of rows that can be used → their positions."""

    def reject(self, position: int, name: str, problem: str, *, is_answer_missing: bool = False) -> None:
        """Note a fault of the row at `position`, unless it has one already."""
        if position not in self.faults:
            row = self.row_numbers[position]
            self.faults[position] = Fault(
                where=f"{self.origin} row {row}",
                row=row,
                field=name,
                problem=problem,
                is_answer_missing=is_answer_missing,
            )

    def reject_where(self, mask: pa.Array, column: str, problem: str | Callable[[int], str], *, of: str = "") -> None:
        """Note a fault of every row where `mask` is true; `problem` may depend on the position. `of` follows the
        name of the column's field: `.label`."""
        for position in pc.indices_nonzero(pc.fill_null(mask, False)).to_pylist():
            name = f"{self.names[column][position]}{of}"
            self.reject(position, name, problem if isinstance(problem, str) else problem(position))


def arrow_labels(chunk: Chunk, labels: pa.Array) -> dict[str, pa.Array]:
    """Label name → int64 column, from a struct or a map of numbers."""
    if pa.types.is_null(labels.type):
        return {}
    if pa.types.is_struct(labels.type):
        columns = {member.name: pc.struct_field(labels, member.name) for member in labels.type}
    elif pa.types.is_map(labels.type):
        names = sorted(name for name in pc.unique(labels.keys).to_pylist())
        columns = {name: pc.map_lookup(labels, pa.scalar(name, labels.type.key_type), "first") for name in names}
    else:
        raise wrong_type(chunk, chunk.names["failures"][0], labels, "a struct or map of whole numbers")
    return {name: _whole_numbers(chunk, column, name) for name, column in columns.items()}


def _whole_numbers(chunk: Chunk, column: pa.Array, label: str) -> pa.Array:
    """The column as int64. Whole floats are allowed, since pandas turns integers with gaps into floats."""
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column.cast(pa.float64()))
        is_whole = pc.and_(pc.equal(pc.floor(column), column), pc.less(pc.abs(column), 2.0**31))
        problem = "{} is not a whole number of failures"
        chunk.reject_where(pc.invert(is_whole), "failures", lambda i: problem.format(column[i]), of=f".{label}")
        column = pc.if_else(is_whole, column, None)
    elif not (pa.types.is_integer(column.type) or pa.types.is_null(column.type)):
        raise wrong_type(chunk, f"{chunk.names['failures'][0]}.{label}", column, "whole numbers")
    return column.cast(pa.int64())


def wrong_type(chunk: Chunk, name: str, column: pa.Array, expected: str) -> DataError:
    """The error for a column from which no row can be read."""
    return DataError(
        f"{chunk.origin}: column '{name}' has type {column.type}, {expected} is expected; "
        "convert the column or set <stage>.data.format"
    )
