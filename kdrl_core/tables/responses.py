"""Numbers computed from responses: repetition, and the metrics of a step (Figures 2–5)."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

REPETITION_NGRAM = 8


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
