"""Raw rows → PROBLEM_SCHEMA, column-wise, with one fault per malformed row.

A fault names row, field and remedy; rows count from 1. Columns that a format cannot do without, or that have an
impossible type, stop at once: no row of such a file could be used.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kdrl_core.data.schema import PROBLEM_SCHEMA
from kdrl_core.data.text import normalize_questions, question_hashes, question_ids
from kdrl_core.data.unicode import is_unicode
from kdrl_core.errors import DataError

Format = Literal["problems", "skywork", "deepscaler"]

_QUESTION_NAMES = ("question", "problem")
_ID_NAMES = ("problem_id", "id")
_INSTRUCTION = (
    r"\s*(Let's think step by step and output the final answer within"
    r"|Please reason step by step, and put your final answer within) \\boxed\{\}\.\s*$"
)
"""The paper's two instructions: kdrl adds its own template, so one that a file carries already is cut off."""

_PLAIN_LIST = r'^\["[^"\\\x00-\x1f]*"\]$'
"""A JSON list of one string without escapes: most answers, decoded without a JSON parser."""


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


class Normalized(NamedTuple):
    """Some consecutive rows, read."""

    problems: pa.Table
    """The usable rows, in PROBLEM_SCHEMA."""
    hashes: npt.NDArray[np.uint64]
    """[usable rows] of each question's normal form: equal for duplicates."""
    faults: list[RowFault]
    """One for each of the other rows, by row."""

    @classmethod
    def nothing(cls) -> "Normalized":
        return cls(PROBLEM_SCHEMA.empty_table(), np.zeros(0, dtype=np.uint64), [])


@dataclass(slots=True)
class _Chunk:
    """Columns of some consecutive rows, and what is wrong with them (the first fault of each row)."""

    origin: str
    row_numbers: Sequence[int]
    columns: dict[str, pa.Array] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    """Column → the field's name in the file."""
    labels: dict[str, pa.Array] = field(default_factory=dict)
    label_prefix: str = "failures"
    faults: dict[int, RowFault] = field(default_factory=dict)

    def reject(self, position: int, name: str, problem: str) -> None:
        if position not in self.faults:
            row = self.row_numbers[position]
            self.faults[position] = RowFault(origin=self.origin, row=row, field=name, problem=problem)

    def reject_where(self, mask: pa.Array, name: str, problem: str | Callable[[int], str]) -> None:
        for position in pc.indices_nonzero(pc.fill_null(mask, False)).to_pylist():
            self.reject(position, name, problem if isinstance(problem, str) else problem(position))


def detect_format(names: Iterable[str], *, origin: str) -> Format:
    """The format whose columns `names` are. Raises DataError if there is none."""
    found = set(names)
    if {"prompt", "reward_model"} <= found:
        return "skywork"
    if found.isdisjoint(_QUESTION_NAMES) or "answer" not in found:
        raise DataError(
            f"{origin}: columns {_listed(found)} are of no known format; "
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
        source: stands in the column `source` where the rows have none.
        first_row: number of the batch's first row, counted from 1.
        num_samples: labels must lie in 0..num_samples.

    Raises:
        DataError: a needed column is missing or has a type that no row can be read from.
    """
    chunk = _Chunk(origin, range(first_row, first_row + batch.num_rows))
    if data_format == "skywork":
        _skywork_columns(chunk, batch)
    else:
        _plain_columns(chunk, batch, data_format)
    return _finish(chunk, source=source, num_samples=num_samples)


def normalize_rows(
    rows: Sequence[Any], row_numbers: Sequence[int], data_format: Format, *, origin: str, source: str, num_samples: int
) -> Normalized:
    """Normalise rows read from JSON; as `normalize_batch`. A row that is no object is a fault of its own."""
    if data_format == "skywork":
        raise DataError(f"{origin}: format skywork is read from Parquet; save the set with .to_parquet()")
    chunk = _Chunk(origin, row_numbers)
    for position, row in enumerate(rows):
        if not isinstance(row, dict):
            chunk.reject(position, "row", f"an object is expected, found {_kind(row)}")
    objects = [row if isinstance(row, dict) else {} for row in rows]
    # Row by row: what its neighbours are called must not matter to a row.
    chunk.columns["question"] = _json_text(chunk, objects, _QUESTION_NAMES, is_needed=True)
    chunk.columns["answer"] = _json_text(chunk, objects, ("answer",), is_needed=True, integers=True)
    chunk.columns["problem_id"] = _json_text(chunk, objects, _ID_NAMES, integers=True)
    chunk.columns["source"] = _json_text(chunk, objects, ("source",))
    chunk.names = {"question": "problem", "answer": "answer"}
    chunk.labels = _json_labels(chunk, [row.get("failures") for row in objects])
    return _finish(chunk, source=source, num_samples=num_samples)


def check_columns(found: set[str], data_format: Format, *, origin: str) -> None:
    """Raise DataError if a file of these columns cannot be of the format."""
    if data_format != "skywork":
        _plain_names(found, data_format, origin=origin)


def _plain_names(found: set[str], data_format: Format, *, origin: str) -> dict[str, str]:
    """Column → its name in the file, for the formats `problems` and `deepscaler`."""
    question = next((name for name in _QUESTION_NAMES if name in found), None)
    missing = [name for name, there in (("problem", question), ("answer", "answer" in found)) if not there]
    if question is None or missing:
        raise DataError(
            f"{origin}: no column {' and no column '.join(map(repr, missing))}, which format {data_format} needs "
            f"(found: {_listed(found)}); rename the columns or set <stage>.data.format"
        )
    names = {"question": question, "answer": "answer"}
    identifier = next((name for name in _ID_NAMES if name in found), None)
    if identifier is not None:
        names["problem_id"] = identifier
    if "source" in found:
        names["source"] = "source"
    return names


def _plain_columns(chunk: _Chunk, batch: pa.RecordBatch, data_format: Format) -> None:
    chunk.names = _plain_names(set(batch.schema.names), data_format, origin=chunk.origin)
    for column, name in chunk.names.items():
        chunk.columns[column] = _as_text(chunk, batch.column(name), name, integers=column in ("problem_id", "answer"))
    if "failures" in batch.schema.names:
        chunk.labels = _arrow_labels(chunk, batch.column("failures"))


def _skywork_columns(chunk: _Chunk, batch: pa.RecordBatch) -> None:
    found = set(batch.schema.names)
    if missing := sorted({"prompt", "reward_model"} - found):
        raise DataError(
            f"{chunk.origin}: no column {' and no column '.join(map(repr, missing))}, which format skywork needs "
            f"(found: {_listed(found)}); set <stage>.data.format to the file's own format"
        )
    chunk.names = {"question": "prompt[0].content", "answer": "reward_model.ground_truth", "source": "data_source"}
    content = _as_text(chunk, _only_message(chunk, batch.column("prompt")), "prompt[0].content")
    if pc.any(pc.ends_with(pc.utf8_rtrim_whitespace(content), pattern="\\boxed{}.")).as_py():
        content = pc.replace_substring_regex(content, pattern=_INSTRUCTION, replacement="")
    chunk.columns["question"] = content
    chunk.columns["answer"] = _ground_truths(
        chunk, _member(chunk, batch.column("reward_model"), "reward_model", "ground_truth")
    )
    if "data_source" in found:
        chunk.columns["source"] = _as_text(chunk, batch.column("data_source"), "data_source")
    chunk.label_prefix = "extra_info.model_difficulty"
    extra = batch.column("extra_info") if "extra_info" in found else None
    if extra is not None and pa.types.is_struct(extra.type) and extra.type.get_field_index("model_difficulty") >= 0:
        chunk.labels = _arrow_labels(chunk, pc.struct_field(extra, "model_difficulty"))


def _only_message(chunk: _Chunk, prompt: pa.Array) -> pa.Array:
    """Content of each row's one message, null where the row is refused."""
    is_list = pa.types.is_list(prompt.type) or pa.types.is_large_list(prompt.type)
    if not is_list or not pa.types.is_struct(prompt.type.value_type):
        raise _wrong_type(chunk, "prompt", prompt, "a list of {content, role}")
    lengths = pc.list_value_length(prompt)
    chunk.reject_where(pc.is_null(lengths), "prompt", "missing")
    chunk.reject_where(pc.not_equal(lengths, 1), "prompt", lambda i: f"{lengths[i]} messages, one is expected")
    is_one = pc.fill_null(pc.equal(lengths, 1), False)
    first = pc.if_else(is_one, prompt.offsets.slice(0, len(prompt)), None)
    messages = prompt.values
    role = _as_text(chunk, _member(chunk, messages, "prompt[0]", "role"), "prompt[0].role").take(first)
    chunk.reject_where(
        pc.and_(is_one, pc.fill_null(pc.not_equal(role, "user"), True)),
        "prompt[0].role",
        lambda i: f"{role[i].as_py()!r}, 'user' is expected",
    )
    return _member(chunk, messages, "prompt[0]", "content").take(first)


def _member(chunk: _Chunk, struct: pa.Array, name: str, member: str) -> pa.Array:
    if not pa.types.is_struct(struct.type) or struct.type.get_field_index(member) < 0:
        raise _wrong_type(chunk, name, struct, f"a struct with '{member}'")
    return pc.struct_field(struct, member)


def _ground_truths(chunk: _Chunk, encoded: pa.Array) -> pa.Array:
    """Skywork's answers: JSON-encoded lists that hold one string."""
    name = chunk.names["answer"]
    texts = _as_text(chunk, encoded, name)
    is_plain = pc.fill_null(pc.match_substring_regex(texts, _PLAIN_LIST), False)
    answers = pc.if_else(is_plain, pc.utf8_slice_codeunits(texts, 2, -2), None)
    others = pc.and_(pc.invert(is_plain), pc.is_valid(texts))
    positions = pc.indices_nonzero(others).to_pylist()
    encoded_others = texts.filter(others).to_pylist()
    decoded: list[str | None] = []
    for position, text, value in zip(positions, encoded_others, _json_values(encoded_others), strict=True):
        if _is_list_of_one_string(value) and is_unicode(value[0]):
            decoded.append(value[0])
        else:
            shown = text if len(text) <= 40 else f"{text[:40]}…"
            chunk.reject(position, name, f'{shown!r} is not a JSON list with one string such as ["204"]')
            decoded.append(None)
    return pc.replace_with_mask(answers, others, pa.array(decoded, pa.string()))


def _is_list_of_one_string(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 1 and isinstance(value[0], str)


def _json_values(texts: list[str]) -> list[Any]:
    """Each text's JSON value, None where it is not JSON."""
    try:
        # All at once, which is much faster. Were a value to span two texts, the comma and line break between them would
        # stand in a string, which JSON forbids, or between two elements, of which none of these lists has two.
        values: list[Any] = json.loads("[" + ",\n".join(texts) + "]")
        if len(values) == len(texts) and all(_is_list_of_one_string(value) for value in values):
            return values
    except (ValueError, RecursionError):
        pass
    return [_json_value(text) for text in texts]


def _json_value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _as_text(chunk: _Chunk, column: pa.Array, name: str, *, integers: bool = False) -> pa.Array:
    arrow_type = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    is_text = (
        pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type) or pa.types.is_string_view(arrow_type)
    )
    if not (is_text or pa.types.is_null(arrow_type) or (integers and pa.types.is_integer(arrow_type))):
        raise _wrong_type(chunk, name, column, "text")
    return column.cast(pa.string())


def _json_text(
    chunk: _Chunk, rows: list[dict[str, Any]], names: Sequence[str], *, is_needed: bool = False, integers: bool = False
) -> pa.Array:
    """Of each row the text under the first of the names that it has."""
    texts: list[str | None] = []
    for position, row in enumerate(rows):
        name = next((name for name in names if row.get(name) is not None), None)
        value = None if name is None else row[name]
        text = str(value) if integers and type(value) is int else value
        if name is None:
            if is_needed:
                chunk.reject(position, next((name for name in names if name in row), names[-1]), "missing")
        elif not isinstance(text, str):
            chunk.reject(position, name, f"text is expected, found {_kind(value)}")
            text = None
        elif not is_unicode(text):
            chunk.reject(position, name, "holds half of a surrogate pair, which is not Unicode text")
            text = None
        elif is_needed and not text.strip():
            chunk.reject(position, name, "empty")
        texts.append(text)
    return pa.array(texts, pa.string())


def _arrow_labels(chunk: _Chunk, labels: pa.Array) -> dict[str, pa.Array]:
    """Label name → int64 column, from a struct or a map of numbers."""
    if pa.types.is_null(labels.type):
        return {}
    if pa.types.is_struct(labels.type):
        columns = {member.name: pc.struct_field(labels, member.name) for member in labels.type}
    elif pa.types.is_map(labels.type):
        names = sorted(name for name in pc.unique(labels.keys).to_pylist())
        columns = {name: pc.map_lookup(labels, pa.scalar(name, labels.type.key_type), "first") for name in names}
    else:
        raise _wrong_type(chunk, chunk.label_prefix, labels, "a struct or map of whole numbers")
    return {name: _whole_numbers(chunk, column, f"{chunk.label_prefix}.{name}") for name, column in columns.items()}


def _whole_numbers(chunk: _Chunk, column: pa.Array, name: str) -> pa.Array:
    """int64; floats are let through where they are whole, since pandas turns integers with gaps into floats."""
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column.cast(pa.float64()))
        is_whole = pc.and_(pc.equal(pc.floor(column), column), pc.less(pc.abs(column), 2.0**31))
        chunk.reject_where(pc.invert(is_whole), name, lambda i: f"{column[i]} is not a whole number of failures")
        column = pc.if_else(is_whole, column, None)
    elif not (pa.types.is_integer(column.type) or pa.types.is_null(column.type)):
        raise _wrong_type(chunk, name, column, "whole numbers")
    return column.cast(pa.int64())


def _json_labels(chunk: _Chunk, values: list[Any]) -> dict[str, pa.Array]:
    labels: dict[str, list[int | None]] = {}
    for position, value in enumerate(values):
        if value is None:
            continue
        if not isinstance(value, dict):
            chunk.reject(position, "failures", f"an object of label: failures is expected, found {_kind(value)}")
            continue
        for name, count in value.items():
            if count is None:
                continue
            if type(count) is not int or abs(count) >= 2**31 or not is_unicode(name):
                chunk.reject(position, f"failures.{name}", f"{count!r} is not a whole number of failures")
                continue
            labels.setdefault(name, [None] * len(values))[position] = count
    return {name: pa.array(column, pa.int64()) for name, column in sorted(labels.items())}


def _finish(chunk: _Chunk, *, source: str, num_samples: int) -> Normalized:
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


def _check_range(chunk: _Chunk, counts: pa.Array, name: str, num_samples: int) -> None:
    outside = pc.or_(pc.less(counts, 0), pc.greater(counts, num_samples))
    chunk.reject_where(outside, name, lambda i: f"{counts[i]} is outside 0..{num_samples}")


def _filled(column: pa.Array | None, default: Callable[[], pa.Array]) -> pa.Array:
    """The column with nulls and empty texts replaced by the default."""
    if column is None:
        return default()
    gap = pc.fill_null(pc.equal(column, ""), True)
    return pc.if_else(gap, default(), column) if pc.any(gap).as_py() else column


def _label_map(labels: dict[str, pa.Array], num_rows: int) -> pa.Array:
    """Columns of labels as one map a row; missing labels have no entry, rows without any are null."""
    names = sorted(labels)
    map_type = PROBLEM_SCHEMA.field("failures").type
    if not names or num_rows == 0:
        return pa.nulls(num_rows, map_type)
    is_there = np.stack([labels[name].is_valid().to_numpy(zero_copy_only=False) for name in names], axis=1)
    counts = np.stack([pc.fill_null(labels[name], 0).to_numpy() for name in names], axis=1)
    ends = np.cumsum(is_there.sum(axis=1)).astype(np.int32)
    # A null offset marks a row without labels as null, which an empty map is not.
    offsets = pa.array(np.concatenate([[0], ends]).astype(np.int32), mask=np.append(~is_there.any(axis=1), False))
    keys = pa.DictionaryArray.from_arrays(np.nonzero(is_there)[1].astype(np.int32), names).cast(pa.string())
    return pa.MapArray.from_arrays(offsets, keys, pa.array(counts[is_there].astype(np.int32)))


def _wrong_type(chunk: _Chunk, name: str, column: pa.Array, expected: str) -> DataError:
    return DataError(
        f"{chunk.origin}: column '{name}' has type {column.type}, {expected} is expected; "
        "convert the column or set <stage>.data.format"
    )


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {bool: "true/false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    shown = repr(value)
    return f"{kinds.get(type(value), type(value).__name__)} ({shown if len(shown) <= 40 else shown[:40] + '…'})"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
