"""Between Parquet columns and records. Per-token columns become numpy arrays, never Python objects."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdrl_core.types import ScoreRequest, Verdict


def ragged(column: pa.ChunkedArray) -> list[NDArray[np.float32]]:
    """A column of lists as one float32 array [T_i] a row."""
    array = column.combine_chunks()
    values, offsets = array.flatten().to_numpy(), array.offsets.to_numpy()
    offsets = offsets - offsets[0]
    return [np.array(values[a:b], np.float32) for a, b in itertools.pairwise(offsets)]


def matrices(column: pa.ChunkedArray) -> list[NDArray[Any]]:
    """A column of lists of equally long lists as one array [T_i, K] a row, in the type of its values."""
    array = column.combine_chunks()
    inner = array.flatten()
    values, offsets = inner.flatten().to_numpy(), array.offsets.to_numpy()
    offsets = offsets - offsets[0]
    table = values.reshape(len(inner), -1)
    return [np.array(table[a:b]) for a, b in itertools.pairwise(offsets)]


def from_matrices(rows: Sequence[NDArray[Any]]) -> pa.ListArray:
    """Arrays [T_i, K] as a column of lists of lists."""
    table = np.concatenate(rows)
    inner_offsets = np.arange(len(table) + 1, dtype=np.int32) * table.shape[1]
    outer_offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int32)
    inner = pa.ListArray.from_arrays(pa.array(inner_offsets), pa.array(table.reshape(-1)))
    return pa.ListArray.from_arrays(pa.array(outer_offsets), inner)


def score_requests(table: pa.Table) -> list[ScoreRequest]:
    """The sequences of a table with `prompt_token_ids` and `token_ids`."""
    columns = (table[name].to_pylist() for name in ("prompt_token_ids", "token_ids"))
    return [ScoreRequest(prompt_token_ids=prompt, token_ids=tokens) for prompt, tokens in zip(*columns, strict=True)]


def verdict_columns(verdicts: Sequence[Verdict]) -> dict[str, list[Any]]:
    """Every field of the verdicts by its column; a table's schema takes those that it has."""
    return {
        "reward": [v.reward for v in verdicts],
        "format_reward": [v.format_reward for v in verdicts],
        "accuracy_reward": [v.accuracy_reward for v in verdicts],
        "verdict": [v.kind.value for v in verdicts],
        "extracted": [v.extracted for v in verdicts],
        "reason": [v.reason for v in verdicts],
    }
