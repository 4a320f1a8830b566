"""Raw rows → PROBLEM_SCHEMA, column-wise, with one fault per malformed row.

A fault names row, field and remedy; rows count from 1. A needed column that is missing or has an impossible type is an
error at once, since no row of such a file could be used.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kdrl_core.data.chunk import Chunk, RowFault, arrow_labels, as_text, kind_of, listed
from kdrl_core.data.schema import PROBLEM_SCHEMA
from kdrl_core.data.skywork import skywork_columns
from kdrl_core.data.text import is_unicode, normalize_questions, question_hashes, question_ids
from kdrl_core.errors import DataError

Format = Literal["problems", "skywork", "deepscaler"]

_QUESTION_NAMES = ("question", "problem")
_ID_NAMES = ("problem_id", "id")


class Normalized(NamedTuple):
    """Consecutive rows that have been read."""

    problems: pa.Table
    """The usable rows, in PROBLEM_SCHEMA."""
    hashes: npt.NDArray[np.uint64]
    """[usable rows] hash of each question's normal form: equal for duplicates."""
    faults: list[RowFault]
    """One fault for each of the other rows, in their order."""

    @classmethod
    def nothing(cls) -> "Normalized":
        return cls(PROBLEM_SCHEMA.empty_table(), np.zeros(0, dtype=np.uint64), [])


def detect_format(names: Iterable[str], *, origin: str) -> Format:
    """The format that has columns of these names. Raises DataError if there is none."""
    found = set(names)
    if {"prompt", "reward_model"} <= found:
        return "skywork"
    if found.isdisjoint(_QUESTION_NAMES) or "answer" not in found:
        raise DataError(
            f"{origin}: columns {listed(found)} are of no known format; "
            "needed: problem (or question) and answer, or Skywork's prompt and reward_model; rename the columns"
        )
    own = {"question", "source", "failures", *_ID_NAMES}
    return "deepscaler" if found.isdisjoint(own) else "problems"


def normalize_batch(
    batch: pa.RecordBatch, data_format: Format, *, origin: str, source: str, first_row: int, num_samples: int
) -> Normalized:
    """Normalise raw Arrow rows.

    Args:
        origin: names the file in errors.
        source: value of the column `source` for rows without one.
        first_row: number of the batch's first row, counted from 1.
        num_samples: labels must lie in 0..num_samples.

    Raises:
        DataError: a needed column is missing or has an impossible type.
    """
    chunk = Chunk(origin, range(first_row, first_row + batch.num_rows))
    if data_format == "skywork":
        skywork_columns(chunk, batch)
    else:
        _plain_columns(chunk, batch, data_format)
    return _finish(chunk, source=source, num_samples=num_samples)


def normalize_rows(
    rows: Sequence[Any], row_numbers: Sequence[int], data_format: Format, *, origin: str, source: str, num_samples: int
) -> Normalized:
    """Normalise rows read from JSON, as `normalize_batch` does. A row that is not an object is a fault."""
    if data_format == "skywork":
        raise DataError(f"{origin}: format skywork is read from Parquet; save the set with .to_parquet()")
    chunk = Chunk(origin, row_numbers)
    for position, row in enumerate(rows):
        if not isinstance(row, dict):
            chunk.reject(position, "row", f"an object is expected, found {kind_of(row)}")
    objects = [row if isinstance(row, dict) else {} for row in rows]
    # Row by row: the result for a row must not depend on the fields of other rows.
    chunk.columns["question"] = _json_text(chunk, objects, _QUESTION_NAMES, is_needed=True)
    chunk.columns["answer"] = _json_text(chunk, objects, ("answer",), is_needed=True, integers=True)
    chunk.columns["problem_id"] = _json_text(chunk, objects, _ID_NAMES, integers=True)
    chunk.columns["source"] = _json_text(chunk, objects, ("source",))
    chunk.names = {"question": "problem", "answer": "answer"}
    chunk.labels = _json_labels(chunk, [row.get("failures") for row in objects])
    return _finish(chunk, source=source, num_samples=num_samples)


def check_columns(found: set[str], data_format: Format, *, origin: str) -> None:
    """Raise DataError if a file with these columns cannot have the format."""
    if data_format != "skywork":
        _plain_names(found, data_format, origin=origin)


def _plain_names(found: set[str], data_format: Format, *, origin: str) -> dict[str, str]:
    """Column → its name in the file, for the formats `problems` and `deepscaler`."""
    question = next((name for name in _QUESTION_NAMES if name in found), None)
    missing = [name for name, there in (("problem", question), ("answer", "answer" in found)) if not there]
    if question is None or missing:
        raise DataError(
            f"{origin}: no column {' and no column '.join(map(repr, missing))}, which format {data_format} needs "
            f"(found: {listed(found)}); rename the columns or set <stage>.data.format"
        )
    names = {"question": question, "answer": "answer"}
    identifier = next((name for name in _ID_NAMES if name in found), None)
    if identifier is not None:
        names["problem_id"] = identifier
    if "source" in found:
        names["source"] = "source"
    return names


def _plain_columns(chunk: Chunk, batch: pa.RecordBatch, data_format: Format) -> None:
    chunk.names = _plain_names(set(batch.schema.names), data_format, origin=chunk.origin)
    for column, name in chunk.names.items():
        chunk.columns[column] = as_text(chunk, batch.column(name), name, integers=column in ("problem_id", "answer"))
    if "failures" in batch.schema.names:
        chunk.labels = arrow_labels(chunk, batch.column("failures"))


def _json_text(
    chunk: Chunk, rows: list[dict[str, Any]], names: Sequence[str], *, is_needed: bool = False, integers: bool = False
) -> pa.Array:
    """The text of each row: of the first field among `names` that the row has."""
    texts: list[str | None] = []
    for position, row in enumerate(rows):
        name = next((name for name in names if row.get(name) is not None), None)
        value = None if name is None else row[name]
        text = str(value) if integers and type(value) is int else value
        if name is None:
            if is_needed:
                chunk.reject(position, next((name for name in names if name in row), names[-1]), "missing")
        elif not isinstance(text, str):
            chunk.reject(position, name, f"text is expected, found {kind_of(value)}")
            text = None
        elif not is_unicode(text):
            chunk.reject(position, name, "holds half of a surrogate pair, which is not Unicode text")
            text = None
        elif is_needed and not text.strip():
            chunk.reject(position, name, "empty")
        texts.append(text)
    return pa.array(texts, pa.string())


def _json_labels(chunk: Chunk, values: list[Any]) -> dict[str, pa.Array]:
    labels: dict[str, list[int | None]] = {}
    for position, value in enumerate(values):
        if value is None:
            continue
        if not isinstance(value, dict):
            chunk.reject(position, "failures", f"an object of label: failures is expected, found {kind_of(value)}")
            continue
        for name, count in value.items():
            if count is None:
                continue
            if type(count) is not int or abs(count) >= 2**31 or not is_unicode(name):
                chunk.reject(position, f"failures.{name}", f"{count!r} is not a whole number of failures")
                continue
            labels.setdefault(name, [None] * len(values))[position] = count
    return {name: pa.array(column, pa.int64()) for name, column in sorted(labels.items())}


def _finish(chunk: Chunk, *, source: str, num_samples: int) -> Normalized:
    """The checks that every format shares, then the table of the rows that pass them."""
    columns = {name: pc.utf8_trim_whitespace(column) for name, column in chunk.columns.items()}
    for name in ("question", "answer"):
        chunk.reject_where(pc.is_null(columns[name]), chunk.names[name], "missing")
        chunk.reject_where(pc.equal(columns[name], ""), chunk.names[name], "empty")
    for name, column in chunk.labels.items():
        _check_range(chunk, column, f"{chunk.label_prefix}.{name}", num_samples)
    bad = sorted(chunk.faults)
    is_good = np.ones(len(chunk.row_numbers), dtype=bool)
    is_good[bad] = False
    good = pa.array(is_good)
    kept = {name: column.filter(good) for name, column in columns.items()}
    labels = {name: column.filter(good) for name, column in chunk.labels.items()}
    num_rows = int(is_good.sum())
    hashes = question_hashes(normalize_questions(kept["question"]))
    kept["problem_id"] = _filled(kept.get("problem_id"), lambda: question_ids(hashes))
    kept["source"] = _filled(kept.get("source"), lambda: pa.array([source] * num_rows, pa.string()))
    kept["failures"] = _label_map(labels, num_rows)
    table = pa.table([kept[name] for name in PROBLEM_SCHEMA.names], schema=PROBLEM_SCHEMA)
    return Normalized(table, hashes, [chunk.faults[position] for position in bad])


def _check_range(chunk: Chunk, counts: pa.Array, name: str, num_samples: int) -> None:
    outside = pc.or_(pc.less(counts, 0), pc.greater(counts, num_samples))
    chunk.reject_where(outside, name, lambda i: f"{counts[i]} is outside 0..{num_samples}")


def _filled(column: pa.Array | None, default: Callable[[], pa.Array]) -> pa.Array:
    """The column with nulls and empty texts replaced by the default."""
    if column is None:
        return default()
    gap = pc.fill_null(pc.equal(column, ""), True)
    return pc.if_else(gap, default(), column) if pc.any(gap).as_py() else column


def _label_map(labels: dict[str, pa.Array], num_rows: int) -> pa.Array:
    """Columns of labels as one map a row. A missing label has no entry; a row without labels is null."""
    names = sorted(labels)
    map_type = PROBLEM_SCHEMA.field("failures").type
    if not names or num_rows == 0:
        return pa.nulls(num_rows, map_type)
    is_there = np.stack([labels[name].is_valid().to_numpy(zero_copy_only=False) for name in names], axis=1)
    counts = np.stack([pc.fill_null(labels[name], 0).to_numpy() for name in names], axis=1)
    ends = np.cumsum(is_there.sum(axis=1)).astype(np.int32)
    # A null offset makes a row without labels null; an empty map would not be.
    offsets = pa.array(np.concatenate([[0], ends]).astype(np.int32), mask=np.append(~is_there.any(axis=1), False))
    keys = pa.DictionaryArray.from_arrays(np.nonzero(is_there)[1].astype(np.int32), names).cast(pa.string())
    return pa.MapArray.from_arrays(offsets, keys, pa.array(counts[is_there].astype(np.int32)))
