"""Between Parquet columns and records, and the numbers computed from them: repetition, the metrics of a step
(Figures 2–5). Per-token columns become numpy arrays, never Python objects.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdrl_core.types import ScoreRequest, Verdict

REPETITION_NGRAM = 8


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


def repetition_rate(token_ids: Sequence[int], *, n: int = REPETITION_NGRAM) -> float:
    """Share of the response's n-grams that occurred before in it; 0 for responses shorter than n + 1 tokens."""
    total = len(token_ids) - n + 1
    if total < 2:
        return 0.0
    distinct = len({tuple(token_ids[start : start + n]) for start in range(total)})
    return 1.0 - distinct / total


def response_metrics(rollouts: pa.Table, rewards: pa.Table) -> dict[str, float]:
    """Metrics of a step's responses and verdicts.

    `response/clip_ratio` is the share cut at the limit, `response/repetition_overlong` the mean repetition rate among
    those, 0 if there are none; `verdict/<kind>` are shares.
    """
    length = rollouts["length"].to_numpy()
    clipped = np.asarray(rollouts["finish_reason"].to_pylist()) == "length"
    repetition = rollouts["repetition_rate"].to_numpy()
    verdicts = np.asarray(rewards["verdict"].to_pylist())
    metrics = {
        "reward/mean": float(rewards["reward"].to_numpy().mean()),
        "reward/format": float(rewards["format_reward"].to_numpy().mean()),
        "reward/accuracy": float(rewards["accuracy_reward"].to_numpy().mean()),
        "response/length_mean": float(length.mean()),
        "response/length_max": float(length.max()),
        "response/clip_ratio": float(clipped.mean()),
        "response/repetition_overlong": float(repetition[clipped].mean()) if clipped.any() else 0.0,
    }
    kinds = ("correct", "wrong", "malformed", "no_answer", "timeout", "error")
    return metrics | {f"verdict/{kind}": float((verdicts == kind).mean()) for kind in kinds}
