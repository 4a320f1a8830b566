"""Columns of questions, answers and labels as text and numbers: of Arrow batches, and of rows read from JSON or CSV.

Most columns are text already, and stay in Arrow. Values of any other kind are read one by one, with the rules of
:mod:`kdrl_core.verify.values`.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from kdrl_core.config.shapes import IMAGES, Shape
from kdrl_core.data.chunk import Chunk, arrow_labels, as_text, wrong_type
from kdrl_core.data.text import is_unicode
from kdrl_core.verify.values import (
    MISSING,
    RowError,
    has_box,
    kind_of,
    number_text,
    question_text,
    truth_text,
    value_at,
)

_INSTRUCTION = (
    r"\s*(Let's think step by step and output the final answer (within \\boxed\{\}|after \"####\")\."
    r"|Please reason step by step, and put your final answer within \\boxed\{\}\."
    r"|Remember to put your answer on its own line after \"Answer:\"\.)\s*$"
)
_OPENING = (
    r"^Solve the following math problem step by step\. The last line of your response should be of the form "
    r"Answer: \$Answer \(without quotes\) where \$Answer is the answer to the problem\.\s*"
)
"""The instructions of the paper, Skywork-OR1, verl's GSM8K and DAPO. They are cut off: kdrl adds its own template's."""
_ENDINGS = ("\\boxed{}.", '"####".', '"Answer:".')

_PLAIN_LIST = r'^\["[^"\\\x00-\x1f]*"\]$'
"""A JSON list of one string without escapes. Most of Skywork's answers are; they need no JSON parser."""
_NOT_PLAIN = r'^\s*(\[|\{")|####|\\(boxed|fbox)'
"""What may be in a text that is not the truth itself."""
_NO_BOX = r"no \boxed{} in the solution, so no answer"
_SYSTEM_NOTE = "system messages left out"

Values = pa.Array | list[Any]
"""A column: of a batch, or the values of rows, MISSING where a row lacks the field."""


def batch_columns(chunk: Chunk, batch: pa.RecordBatch, shape: Shape) -> None:
    """Read the columns of a batch into `chunk`. Raises DataError if one has an impossible type."""
    found = set(batch.schema.names)
    chunk.label_prefix = shape.labels
    for column, names in _columns_of(shape):
        name = next((name for name in names if name in found or name.split(".")[0] in found), None)
        if name is not None:
            chunk.names[column] = name
            values = _at(chunk, batch, name)
            if column == "answer" and shape.needs_box and not _is_list(values):
                is_boxed = pc.match_substring_regex(as_text(chunk, values, name), r"\\(boxed|fbox)")
                chunk.reject_where(pc.invert(is_boxed), name, _NO_BOX)
            chunk.columns[column] = _READERS[column](chunk, values, name)
    top, *members = shape.labels.split(".")
    labels = batch.column(top) if top in found else None
    for member in members:
        is_there = labels is not None and pa.types.is_struct(labels.type) and labels.type.get_field_index(member) >= 0
        labels = pc.struct_field(labels, member) if is_there else None
    if labels is not None:
        chunk.labels = arrow_labels(chunk, labels)
    for name in found.intersection(IMAGES):
        _refuse_images(chunk, name, _is_filled(batch.column(name)))


def row_columns(chunk: Chunk, rows: Sequence[Any], shape: Shape) -> None:
    """Read rows of JSON or CSV into `chunk`. Row by row: what a row gives must not depend on its neighbours."""
    for position, row in enumerate(rows):
        if not isinstance(row, dict):
            chunk.reject(position, "row", f"an object is expected, found {kind_of(row)}")
    objects: list[dict[str, Any]] = [row if isinstance(row, dict) else {} for row in rows]
    chunk.label_prefix = shape.labels
    for column, names in _columns_of(shape):
        if not names:
            continue
        needed = column in ("question", "answer")
        chunk.names[column] = names[-1]
        found = [_first(row, names) for row in objects]
        for position, (name, value) in enumerate(found):
            if value is MISSING and needed:
                chunk.reject(position, name, "missing")
            if column == "answer" and shape.needs_box and isinstance(value, str) and not has_box(value):
                chunk.reject(position, name, _NO_BOX)
        texts = [
            _one_text(chunk, position, column, *each) if each[1] is not MISSING else None
            for position, each in enumerate(found)
        ]
        chunk.columns[column] = pa.array(texts, pa.string())
        if needed:  # so that each fault names the field that its row has
            for position, text in enumerate(texts):
                if text is not None and not text.strip():
                    chunk.reject(position, found[position][0], "empty")
    chunk.labels = _row_labels(chunk, [value_at(row, shape.labels) for row in objects])
    for name in IMAGES:
        _refuse_images(chunk, name, pa.array([bool(row.get(name)) for row in objects], pa.bool_()))


def cut_instructions(questions: pa.Array) -> pa.Array:
    """The questions without the usual instructions around them."""
    trimmed = pc.utf8_rtrim_whitespace(questions)
    if any(pc.any(pc.ends_with(trimmed, ending)).as_py() for ending in _ENDINGS):
        questions = pc.replace_substring_regex(questions, pattern=_INSTRUCTION, replacement="")
    if pc.any(pc.starts_with(questions, "Solve the following math problem step by step.")).as_py():
        questions = pc.replace_substring_regex(questions, pattern=_OPENING, replacement="")
    return questions


def _columns_of(shape: Shape) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return (("question", shape.question), ("answer", shape.answer), ("problem_id", shape.ids), ("source", shape.source))


def _at(chunk: Chunk, batch: pa.RecordBatch, name: str) -> pa.Array:
    """The column, or the field of a nested one. Raises DataError if a column on the way has no such field."""
    if name in batch.schema.names:
        return batch.column(name)
    top, *members = name.split(".")
    column = batch.column(top)
    for member in members:
        if not pa.types.is_struct(column.type) or column.type.get_field_index(member) < 0:
            raise wrong_type(chunk, top, column, f"a struct with '{member}'")
        column = pc.struct_field(column, member)
        top = f"{top}.{member}"
    return column


def _questions(chunk: Chunk, column: pa.Array, name: str) -> pa.Array:
    if _is_list(column):
        quick = _only_messages(column)
        return quick if quick is not None else _one_by_one(chunk, "question", column, name)
    texts = as_text(chunk, column, name)
    coded = pc.fill_null(pc.starts_with(texts, "[{"), False)
    if pc.any(coded).as_py():
        return _one_by_one(chunk, "question", texts, name)
    return texts


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


def _answers(chunk: Chunk, column: pa.Array, name: str) -> pa.Array:
    if _is_list(column):
        return _one_by_one(chunk, "answer", column, name)
    texts = _numbers(chunk, column, name)
    doubtful = pc.fill_null(pc.match_substring_regex(texts, _NOT_PLAIN), False)
    if not pc.any(doubtful).as_py():
        return texts
    is_plain_list = pc.fill_null(pc.match_substring_regex(texts, _PLAIN_LIST), False)
    texts = pc.if_else(is_plain_list, pc.utf8_slice_codeunits(texts, 2, -2), texts)
    others = pc.and_(doubtful, pc.invert(is_plain_list))
    encoded = texts.filter(others).to_pylist()
    if (read := _lists_of_one(encoded)) is None:
        positions = pc.indices_nonzero(others).to_pylist()
        read = [
            _one_text(chunk, position, "answer", name, text) for position, text in zip(positions, encoded, strict=True)
        ]
    return pc.replace_with_mask(texts, others, pa.array(read, pa.string()))


def _lists_of_one(texts: list[str]) -> list[str | None] | None:
    """The string in each text, if each is a JSON list with one; else None. All are decoded at once, which is much
    faster. No value can span two texts: a JSON string cannot hold the line break between them, and the comma would make
    a list of two elements, but each of these lists must have one."""
    try:
        values = json.loads("[" + ",\n".join(texts) + "]")
    except (ValueError, RecursionError):
        return None
    is_usual = len(values) == len(texts) and all(
        type(value) is list and len(value) == 1 and type(value[0]) is str for value in values
    )
    found = [value[0] for value in values] if is_usual else []
    return found if is_usual and is_unicode("".join(found)) else None


def _numbers(chunk: Chunk, column: pa.Array, name: str) -> pa.Array:
    """Text, or numbers as text; NaN is a gap, since pandas has no other in a column of numbers."""
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
        # By way of text, where 5.1 of single precision is 5.1.
        return _each(chunk, column.cast(pa.string()).to_pylist(), name, lambda text: number_text(float(text)))
    if pa.types.is_decimal(column.type):
        return _each(chunk, column.to_pylist(), name, number_text)
    return as_text(chunk, column, name, integers=True)


def _each(chunk: Chunk, values: list[Any], name: str, read: Callable[[Any], str]) -> pa.Array:
    texts: list[str | None] = []
    for position, value in enumerate(values):
        try:
            texts.append(None if value is None else read(value))
        except RowError as fault:
            chunk.reject(position, name, str(fault))
            texts.append(None)
    return pa.array(texts, pa.string())


_READERS: dict[str, Callable[[Chunk, pa.Array, str], pa.Array]] = {
    "question": _questions,
    "answer": _answers,
    "problem_id": _numbers,
    "source": as_text,
}


def _one_by_one(chunk: Chunk, column: str, values: pa.Array, name: str) -> pa.Array:
    texts = [
        None if value is None else _one_text(chunk, position, column, name, value)
        for position, value in enumerate(values.to_pylist())
    ]
    return pa.array(texts, pa.string())


def _one_text(chunk: Chunk, position: int, column: str, name: str, value: object) -> str | None:
    """The text that a value means in a column; None if its row is rejected for it."""
    try:
        if column == "question":
            text, has_system = question_text(value)
            if has_system:
                chunk.note(position, _SYSTEM_NOTE)
        elif column == "answer":
            text = truth_text(value)
        elif column == "problem_id" and type(value) in (int, float):
            text = number_text(value)
        elif isinstance(value, str):
            text = value
        else:
            raise RowError(f"text is expected, found {kind_of(value)}")
        if not is_unicode(text):
            raise RowError("holds half of a surrogate pair, which is not Unicode text")
    except RowError as fault:
        chunk.reject(position, f"{name}{fault.name or ''}", str(fault))
        return None
    return text


def _first(row: dict[str, Any], names: Sequence[str]) -> tuple[str, object]:
    """The first of the fields that a row has with a value; else the first that it has at all, or the usual one."""
    values = [(name, value_at(row, name)) for name in names]
    filled = next(((name, value) for name, value in values if value is not MISSING and value is not None), None)
    if filled is not None:
        return filled
    return next((name for name, value in values if value is not MISSING), names[-1]), MISSING


def _row_labels(chunk: Chunk, values: list[Any]) -> dict[str, pa.Array]:
    labels: dict[str, list[int | None]] = {}
    for position, value in enumerate(values):
        if value is None or value is MISSING:
            continue
        if not isinstance(value, dict):
            problem = f"an object of label: failures is expected, found {kind_of(value)}"
            chunk.reject(position, chunk.label_prefix, problem)
            continue
        for name, count in value.items():
            if count is None:
                continue
            if type(count) is not int or abs(count) >= 2**31 or not is_unicode(name):
                chunk.reject(position, f"{chunk.label_prefix}.{name}", f"{count!r} is not a whole number of failures")
                continue
            labels.setdefault(name, [None] * len(values))[position] = count
    return {name: pa.array(column, pa.int64()) for name, column in sorted(labels.items())}


def _is_list(column: pa.Array) -> bool:
    return pa.types.is_list(column.type) or pa.types.is_large_list(column.type)


def _is_filled(column: pa.Array) -> pa.Array:
    """Whether each row has an image: a value that is not null, an empty text or an empty list."""
    filled = column.is_valid()
    if _is_list(column):
        return pc.and_(filled, pc.fill_null(pc.greater(pc.list_value_length(column), 0), False))
    if pa.types.is_string(column.type) or pa.types.is_binary(column.type):
        return pc.and_(filled, pc.fill_null(pc.greater(pc.binary_length(column), 0), False))
    return filled


def _refuse_images(chunk: Chunk, name: str, is_there: pa.Array) -> None:
    chunk.reject_where(is_there, name, "holds an image; kdrl reads problems of text alone")
