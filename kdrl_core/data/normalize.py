"""Raw rows → PROBLEM_SCHEMA, column-wise, with one fault per malformed row.

A fault names row, field and remedy; rows count from 1. A needed column that is missing or has an impossible type is an
error at once, since no row of such a file could be used.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kdrl_core.config.shapes import Shape
from kdrl_core.data.chunk import Chunk
from kdrl_core.data.columns import read_columns
from kdrl_core.data.schema import PROBLEM_SCHEMA
from kdrl_core.data.text import normalize_questions, question_hashes, question_ids
from kdrl_core.verify.faults import Fault

_NO_ANSWER = ["proof", "notfound"]
"""NuminaMath writes these where a problem has no answer."""
_IMAGE = "<image>"
"""Where a prompt has an image, in the sets of most multimodal models."""


class Normalized(NamedTuple):
    """Consecutive rows that have been read."""

    problems: pa.Table
    """The usable rows, in PROBLEM_SCHEMA."""
    hashes: npt.NDArray[np.uint64]
    """[usable rows] hash of each question's normal form: equal for duplicates."""
    origin: str
    """The file."""
    rows: npt.NDArray[np.int64]
    """[usable rows] their numbers in the file, from 1."""
    faults: list[Fault]
    """One fault for each of the other rows, in their order."""
    notes: dict[str, list[int]]
    """What else is to be told → numbers of the usable rows that it is true of."""


def normalize(
    rows: pa.RecordBatch | Sequence[Any],
    row_numbers: Sequence[int],
    shape: Shape,
    *,
    origin: str,
    source: str,
    num_samples: int,
) -> Normalized:
    """Normalise raw rows of Arrow, or rows read from JSON or CSV; a row of these that is not an object is a fault.

    Args:
        row_numbers: [rows] of each row in its file.
        origin: names the file in errors.
        source: value of the column `source` for rows without one.
        num_samples: labels must lie in 0..num_samples.

    Raises:
        DataError: a needed column has an impossible type.
    """
    chunk = Chunk(origin, row_numbers)
    read_columns(chunk, rows, shape)
    return _finish(chunk, source=source, num_samples=num_samples)


def _finish(chunk: Chunk, *, source: str, num_samples: int) -> Normalized:
    """The checks that every shape shares, then the table of the rows that pass them."""
    columns = {name: pc.utf8_trim_whitespace(column) for name, column in chunk.columns.items()}
    questions = columns["question"]
    content = questions.buffers()[2]
    if content is not None and _IMAGE.encode() in content.to_pybytes():  # 20 times as fast as asking each question
        has_image = pc.match_substring(questions, _IMAGE)
        chunk.reject_where(has_image, "question", f"has {_IMAGE}; kdrl reads problems of text alone")
    for name in ("question", "answer"):
        chunk.reject_where(pc.is_null(columns[name]), name, "missing")
        chunk.reject_where(pc.equal(columns[name], ""), name, "empty")
    for label, counts in chunk.labels.items():
        _check_range(chunk, counts, label, num_samples)
    for position in pc.indices_nonzero(pc.is_in(columns["answer"], pa.array(_NO_ANSWER))).to_pylist():
        problem = f"{columns['answer'][position].as_py()!r} stands for a problem without an answer"
        chunk.reject(position, chunk.names["answer"][position], problem, is_answer_missing=True)
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
    numbers = np.asarray(chunk.row_numbers, dtype=np.int64)
    notes = {what: [int(numbers[place]) for place in places if is_good[place]] for what, places in chunk.notes.items()}
    notes = {what: rows for what, rows in notes.items() if rows}
    return Normalized(
        table, hashes, chunk.origin, numbers[is_good], [chunk.faults[position] for position in bad], notes
    )


def _check_range(chunk: Chunk, counts: pa.Array, label: str, num_samples: int) -> None:
    outside = pc.or_(pc.less(counts, 0), pc.greater(counts, num_samples))
    chunk.reject_where(outside, "failures", lambda i: f"{counts[i]} is outside 0..{num_samples}", of=f".{label}")


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
