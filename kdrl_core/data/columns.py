"""Columns of questions, answers and labels as text and numbers: of Arrow batches, and of rows read from JSON or CSV.

Most columns of Arrow are text already, and stay in Arrow. All other values are read one by one, with the rules of
:mod:`kdrl_core.verify.values`.
"""

from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from kdrl_core.config.shapes import IMAGES, LABELS, Shape, has
from kdrl_core.data.chunk import Chunk, arrow_labels, wrong_type
from kdrl_core.data.text import is_unicode
from kdrl_core.verify.values import (
    MISSING,
    RowError,
    exact_floats,
    has_box,
    kind_of,
    number_text,
    question_text,
    truth_text,
    value_at,
)

_INSTRUCTIONS = (  # one by one, which is faster
    r"\s*(Let's think step by step and output the final answer (within \\boxed\{\}|after \"####\")\."
    r"|Please reason step by step, and put your final answer within \\boxed\{\}\."
    r"|Remember to put your answer on its own line after \"Answer:\"\.)\s*$",
    r"^Solve the following math problem step by step\. The last line of your response should be of the form "
    r"Answer: \$Answer \(without quotes\) where \$Answer is the answer to the problem\.\s*",
)
"""Those of the paper, Skywork-OR1, verl's GSM8K and DAPO. They are cut off, since kdrl adds its own template's."""

_CODED = {"question": r"^\[\{", "answer": r'^\s*(\[|\{")|####|\\(boxed|fbox)'}
"""What may be in a text that is not the question or the truth itself."""
_PLAIN_LIST = r'^\["[^"\\\x00-\x1f]*"\]$'
"""A JSON list of one string without escapes. Most of Skywork's answers are; they need no JSON parser."""


def read_columns(chunk: Chunk, rows: pa.RecordBatch | Sequence[Any], shape: Shape) -> None:
    """Read the columns of raw rows into `chunk`. Rows of JSON are read one by one: what a row gives must not depend on
    its neighbours. Raises DataError if a column of Arrow has an impossible type."""
    columns = _of_batch if isinstance(rows, pa.RecordBatch) else _of_rows
    if not isinstance(rows, pa.RecordBatch):
        for position, row in enumerate(rows):
            if not isinstance(row, dict):
                chunk.reject(position, "row", f"an object is expected, found {kind_of(row)}")
        rows = [row if isinstance(row, dict) else {} for row in rows]
    readers = {**_READERS, "answer": _solution} if shape.needs_box else _READERS
    for column, names in shape.columns.items():
        chunk.names[column], values = columns(chunk, rows, names)
        if values is not None:
            chunk.columns[column] = _texts(chunk, column, values, readers[column])
    for instruction in _INSTRUCTIONS:
        chunk.columns["question"] = pc.replace_substring_regex(chunk.columns["question"], instruction, "")
    _read_labels(chunk, rows)
    for name in IMAGES:
        held = columns(chunk, rows, (name,))[1]
        for position, image in enumerate([] if held is None else _listed(held)):
            if image:
                chunk.reject(position, name, "holds an image; kdrl reads problems of text alone")


def _of_batch(
    chunk: Chunk, batch: pa.RecordBatch, names: Sequence[str]
) -> tuple[list[str], pa.Array | list[Any] | None]:
    """For each row the name of the column that is read; and the values, None if the batch has no such column."""
    present = [name for name in names if has(batch.schema.names, name)]
    if not present:
        return [], None
    if len(present) > 1:
        return _of_rows(chunk, batch.select([name.split(".")[0] for name in present]).to_pylist(), present)
    name = present[0]
    values = _nested(batch, name)
    if values is None:
        top, _, inner = name.partition(".")
        raise wrong_type(chunk, top, batch.column(top), f"a struct with '{inner}'")
    return [name] * batch.num_rows, values


def _nested(batch: pa.RecordBatch, name: str) -> pa.Array | None:
    """The column, or the field of a nested one; None if there is none."""
    if name in batch.schema.names:
        return batch.column(name)
    top, *members = name.split(".")
    column = batch.column(top) if top in batch.schema.names else None
    for member in members:
        is_there = column is not None and pa.types.is_struct(column.type) and column.type.get_field_index(member) >= 0
        column = pc.struct_field(column, member) if is_there else None
    return column


def _of_rows(chunk: Chunk, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> tuple[list[str], list[Any]]:
    """For each row the first of the fields that has a value, and the value; else the first field that it has at all."""
    found = []
    for row in rows:
        own = [(name, value) for name in names if (value := value_at(row, name)) is not MISSING] or [(names[-1], None)]
        found.append(next((one for one in own if one[1] is not None), own[0]))
    return [name for name, _ in found], [value for _, value in found]


def _texts(chunk: Chunk, column: str, values: pa.Array | list[Any], read: Callable[[Chunk, int, Any], str]) -> pa.Array:
    """The values as text; null where a row has none, or is rejected. A list has a value, or None, for each row."""
    if not isinstance(values, pa.Array):
        return _one_by_one(chunk, column, dict(enumerate(values)), read)
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if (is_list and column in ("question", "answer")) or (is_number and column in ("answer", "problem_id")):
        quick = _only_messages(values) if is_list and column == "question" else None
        return quick if quick is not None else _one_by_one(chunk, column, dict(enumerate(_listed(values))), read)
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        if pa.types.is_null(kind):
            return pa.nulls(len(values), pa.string())
        raise wrong_type(chunk, chunk.names[column][0], values, "text")
    texts = values.cast(pa.string())
    if column not in _CODED:
        return texts
    coded = pc.is_valid(texts) if read is _solution else pc.match_substring_regex(texts, _CODED[column])
    coded = pc.fill_null(coded, False)
    if column == "answer":
        is_plain = pc.fill_null(pc.match_substring_regex(texts, _PLAIN_LIST), False)
        texts = pc.if_else(is_plain, pc.utf8_slice_codeunits(texts, 2, -2), texts)
        coded = pc.and_not(coded, is_plain)
    positions = pc.indices_nonzero(coded).to_pylist()
    others = dict(zip(positions, texts.filter(coded).to_pylist(), strict=True))
    return pc.replace_with_mask(texts, coded, _one_by_one(chunk, column, others, read)) if others else texts


def _only_messages(prompt: pa.Array) -> pa.Array | None:
    """Content of each row's only message, if every row has one, of a user, with text; else None."""
    kind = prompt.type.value_type
    if not pa.types.is_struct(kind) or {"role", "content"} - {field.name for field in kind}:
        return None
    messages = prompt.flatten()
    role, content = pc.struct_field(messages, "role"), pc.struct_field(messages, "content")
    is_text = pa.types.is_string(content.type) or pa.types.is_large_string(content.type)
    if prompt.null_count or content.null_count or not is_text or len(messages) != len(prompt):
        return None
    is_plain = pc.and_(pc.equal(pc.list_value_length(prompt), 1), pc.fill_null(pc.equal(role, "user"), False))
    return content.cast(pa.string()) if pc.all(is_plain).as_py() else None


def _listed(values: pa.Array | list[Any]) -> list[Any]:
    """The values of a column, None for NaN: pandas has no other gap in a column of numbers."""
    if isinstance(values, pa.Array) and pa.types.is_floating(values.type):
        values = exact_floats(values)
        values = pc.if_else(pc.is_nan(values), None, values)
    return values.to_pylist() if isinstance(values, pa.Array) else values


def _one_by_one(chunk: Chunk, column: str, values: dict[int, Any], read: Callable[[Chunk, int, Any], str]) -> pa.Array:
    """The text that each value means; null where its row is rejected. `values` has the positions of the rows."""
    texts: list[str | None] = []
    for position, value in values.items():
        text = None
        if value is not None:
            try:
                text = read(chunk, position, value)
                if not is_unicode(text):
                    text = None
                    raise RowError("holds half of a surrogate pair, which is not Unicode text")
            except RowError as fault:
                chunk.reject(position, f"{chunk.names[column][position]}{fault.name or ''}", str(fault))
        texts.append(text)
    return pa.array(texts, pa.string())


def _question(chunk: Chunk, position: int, value: Any) -> str:
    text, has_system = question_text(value)
    if has_system:
        chunk.notes.setdefault("system messages left out", []).append(position)
    return text


def _answer(chunk: Chunk, position: int, value: Any) -> str:
    return truth_text(value)


def _solution(chunk: Chunk, position: int, value: Any) -> str:
    if isinstance(value, str) and not has_box(value):
        raise RowError(r"no \boxed{} in the solution, so no answer")
    return truth_text(value)


def _name(chunk: Chunk, position: int, value: Any) -> str:
    return number_text(value) if type(value) in (int, float, Decimal) else _source(chunk, position, value)


def _source(chunk: Chunk, position: int, value: Any) -> str:
    if not isinstance(value, str):
        raise RowError(f"text is expected, found {kind_of(value)}")
    return value


_READERS: dict[str, Callable[[Chunk, int, Any], str]] = {
    "question": _question,
    "answer": _answer,
    "problem_id": _name,
    "source": _source,
}


def _read_labels(chunk: Chunk, rows: pa.RecordBatch | Sequence[dict[str, Any]]) -> None:
    """The difficulty labels: a column that maps label → failures."""
    if isinstance(rows, pa.RecordBatch):
        if found := [(name, column) for name in LABELS if (column := _nested(rows, name)) is not None]:
            chunk.names["failures"] = [found[0][0]] * rows.num_rows
            chunk.labels = arrow_labels(chunk, found[0][1])
        return
    chunk.names["failures"], values = _of_rows(chunk, rows, LABELS)
    labels: dict[str, list[int | None]] = {}
    for position, (name, value) in enumerate(zip(chunk.names["failures"], values, strict=True)):
        if value is not None and not isinstance(value, dict):
            chunk.reject(position, name, f"an object of label: failures is expected, found {kind_of(value)}")
            continue
        for label, count in (value or {}).items():
            if count is None:
                continue
            if isinstance(count, float) and count.is_integer():  # pandas turns integers with gaps into floats
                count = int(count)
            if type(count) is not int or abs(count) >= 2**31 or not is_unicode(label):
                chunk.reject(position, f"{name}.{label}", f"{count!r} is not a whole number of failures")
                continue
            labels.setdefault(label, [None] * len(values))[position] = count
    chunk.labels = {label: pa.array(column, pa.int64()) for label, column in sorted(labels.items())}
