"""Rows in the format of Skywork-OR1-RL-Data: chat messages, JSON-encoded ground truths, labels in a struct."""

import json
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from kdrl_core.data.chunk import Chunk, arrow_labels, as_text, listed, wrong_type
from kdrl_core.data.text import is_unicode
from kdrl_core.errors import DataError

_INSTRUCTION = (
    r"\s*(Let's think step by step and output the final answer within"
    r"|Please reason step by step, and put your final answer within) \\boxed\{\}\.\s*$"
)
"""The paper's two instructions. They are cut off, since kdrl adds the instruction of its own template."""

_PLAIN_LIST = r'^\["[^"\\\x00-\x1f]*"\]$'
"""A JSON list of one string without escapes. Most answers are; they are decoded without a JSON parser."""


def skywork_columns(chunk: Chunk, batch: pa.RecordBatch) -> None:
    """Read the columns of a batch into `chunk`. Raises DataError if one is missing or has an impossible type."""
    found = set(batch.schema.names)
    if missing := sorted({"prompt", "reward_model"} - found):
        raise DataError(
            f"{chunk.origin}: no column {' and no column '.join(map(repr, missing))}, which format skywork needs "
            f"(found: {listed(found)}); set <stage>.data.format to the file's own format"
        )
    chunk.names = {"question": "prompt[0].content", "answer": "reward_model.ground_truth", "source": "data_source"}
    content = as_text(chunk, _only_message(chunk, batch.column("prompt")), "prompt[0].content")
    if pc.any(pc.ends_with(pc.utf8_rtrim_whitespace(content), pattern="\\boxed{}.")).as_py():
        content = pc.replace_substring_regex(content, pattern=_INSTRUCTION, replacement="")
    chunk.columns["question"] = content
    chunk.columns["answer"] = _ground_truths(
        chunk, _member(chunk, batch.column("reward_model"), "reward_model", "ground_truth")
    )
    if "data_source" in found:
        chunk.columns["source"] = as_text(chunk, batch.column("data_source"), "data_source")
    chunk.label_prefix = "extra_info.model_difficulty"
    extra = batch.column("extra_info") if "extra_info" in found else None
    if extra is not None and pa.types.is_struct(extra.type) and extra.type.get_field_index("model_difficulty") >= 0:
        chunk.labels = arrow_labels(chunk, pc.struct_field(extra, "model_difficulty"))


def _only_message(chunk: Chunk, prompt: pa.Array) -> pa.Array:
    """Content of each row's only message; null where the row is rejected."""
    is_list = pa.types.is_list(prompt.type) or pa.types.is_large_list(prompt.type)
    if not is_list or not pa.types.is_struct(prompt.type.value_type):
        raise wrong_type(chunk, "prompt", prompt, "a list of {content, role}")
    lengths = pc.list_value_length(prompt)
    chunk.reject_where(pc.is_null(lengths), "prompt", "missing")
    chunk.reject_where(pc.not_equal(lengths, 1), "prompt", lambda i: f"{lengths[i]} messages, one is expected")
    is_one = pc.fill_null(pc.equal(lengths, 1), False)
    first = pc.if_else(is_one, prompt.offsets.slice(0, len(prompt)), None)
    messages = prompt.values
    role = as_text(chunk, _member(chunk, messages, "prompt[0]", "role"), "prompt[0].role").take(first)
    chunk.reject_where(
        pc.and_(is_one, pc.fill_null(pc.not_equal(role, "user"), True)),
        "prompt[0].role",
        lambda i: f"{role[i].as_py()!r}, 'user' is expected",
    )
    return _member(chunk, messages, "prompt[0]", "content").take(first)


def _member(chunk: Chunk, struct: pa.Array, name: str, member: str) -> pa.Array:
    if not pa.types.is_struct(struct.type) or struct.type.get_field_index(member) < 0:
        raise wrong_type(chunk, name, struct, f"a struct with '{member}'")
    return pc.struct_field(struct, member)


def _ground_truths(chunk: Chunk, encoded: pa.Array) -> pa.Array:
    """Answers out of JSON-encoded lists of one string."""
    name = chunk.names["answer"]
    texts = as_text(chunk, encoded, name)
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
    """The JSON value of each text; None where it is not JSON."""
    try:
        # All at once, which is much faster. No value can span two texts: a JSON string cannot hold the line break
        # between them, and the comma would make a list of two elements, but each of these lists must have one.
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
