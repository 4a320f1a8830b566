"""Consecutive rows while they are read: their columns, and the fault of each row that cannot be used."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from kdrl_core.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFault:
    """Why a row cannot be used."""

    origin: str
    row: int
    field: str
    problem: str

    @property
    def what(self) -> str:
        return f"{self.origin} row {self.row}, field '{self.field}': {self.problem}"

    def __str__(self) -> str:
        return f"{self.what}; drop the row or set <stage>.data.on_error=drop"


@dataclass(slots=True)
class Chunk:
    """Columns of consecutive rows, and the first fault of each malformed row."""

    origin: str
    row_numbers: Sequence[int]
    columns: dict[str, pa.Array] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    """Column → name of the field in the file."""
    labels: dict[str, pa.Array] = field(default_factory=dict)
    label_prefix: str = "failures"
    faults: dict[int, RowFault] = field(default_factory=dict)
    notes: dict[str, list[int]] = field(default_factory=dict)
    """What is to be told of rows that can be used → their positions."""

    def reject(self, position: int, name: str, problem: str) -> None:
        """Note a fault of the row at `position`, unless it has one already."""
        if position not in self.faults:
            row = self.row_numbers[position]
            self.faults[position] = RowFault(origin=self.origin, row=row, field=name, problem=problem)

    def note(self, position: int, what: str) -> None:
        """Note something that is no fault of the row at `position`."""
        self.notes.setdefault(what, []).append(position)

    def reject_where(self, mask: pa.Array, name: str, problem: str | Callable[[int], str]) -> None:
        """Note a fault of every row where `mask` is true; `problem` may depend on the position."""
        for position in pc.indices_nonzero(pc.fill_null(mask, False)).to_pylist():
            self.reject(position, name, problem if isinstance(problem, str) else problem(position))


def as_text(chunk: Chunk, column: pa.Array, name: str, *, integers: bool = False) -> pa.Array:
    """A column of text, or of whole numbers if `integers`, as strings. Raises DataError for any other type."""
    arrow_type = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    is_text = (
        pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type) or pa.types.is_string_view(arrow_type)
    )
    if not (is_text or pa.types.is_null(arrow_type) or (integers and pa.types.is_integer(arrow_type))):
        raise wrong_type(chunk, name, column, "text")
    return column.cast(pa.string())


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
        raise wrong_type(chunk, chunk.label_prefix, labels, "a struct or map of whole numbers")
    return {name: _whole_numbers(chunk, column, f"{chunk.label_prefix}.{name}") for name, column in columns.items()}


def _whole_numbers(chunk: Chunk, column: pa.Array, name: str) -> pa.Array:
    """The column as int64. Whole floats are allowed, since pandas turns integers with gaps into floats."""
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column.cast(pa.float64()))
        is_whole = pc.and_(pc.equal(pc.floor(column), column), pc.less(pc.abs(column), 2.0**31))
        chunk.reject_where(pc.invert(is_whole), name, lambda i: f"{column[i]} is not a whole number of failures")
        column = pc.if_else(is_whole, column, None)
    elif not (pa.types.is_integer(column.type) or pa.types.is_null(column.type)):
        raise wrong_type(chunk, name, column, "whole numbers")
    return column.cast(pa.int64())


def wrong_type(chunk: Chunk, name: str, column: pa.Array, expected: str) -> DataError:
    """The error for a column from which no row can be read."""
    return DataError(
        f"{chunk.origin}: column '{name}' has type {column.type}, {expected} is expected; "
        "convert the column or set <stage>.data.format"
    )
