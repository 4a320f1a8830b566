"""Repetition and a step's metrics: the arithmetic by hand, and bounds for any response."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdrl_core.sampling.responses import REPETITION_NGRAM, repetition_rate, response_metrics


@pytest.mark.parametrize(
    ("tokens", "n", "expected"),
    [
        ([1, 2, 1, 2, 1, 2], 2, 3 / 5),  # 12 21 12 21 12: three of five came before
        ([1, 2, 3, 4], 2, 0.0),
        ([7, 7, 7, 7], 1, 3 / 4),
        ([7, 7, 7, 7], 4, 0.0),  # one 4-gram alone
        ([7, 7, 7, 7, 7], 4, 1 / 2),
        ([], 8, 0.0),
        ([1] * 8, 8, 0.0),
        ([1] * 100, 8, 92 / 93),
    ],
)
def test_repetition_golden(tokens: list[int], n: int, expected: float) -> None:
    assert repetition_rate(tokens, n=n) == pytest.approx(expected)


def test_repetition_counts_8_grams() -> None:
    assert REPETITION_NGRAM == 8
    once = [*range(20)]
    assert repetition_rate(once) == 0.0
    assert repetition_rate(once + once) == pytest.approx(13 / 33)  # of 33 8-grams the last 13 came before


@given(st.lists(st.integers(0, 3) | st.sampled_from([256, 151_935, 2**31 - 1]), max_size=60), st.integers(1, 9))
def test_repetition_is_a_share_and_grows_with_repeating(tokens: list[int], n: int) -> None:
    rate = repetition_rate(tokens, n=n)
    assert 0.0 <= rate < 1.0
    total = len(tokens) - n + 1
    if total > 1:  # the definition, n-gram by n-gram
        assert rate == 1.0 - len({tuple(tokens[start : start + n]) for start in range(total)}) / total
    assert repetition_rate(np.array(tokens, np.int32), n=n) == rate
    if len(tokens) >= n:
        assert repetition_rate(tokens * 2, n=n) >= rate


def tables(**changed: list[Any]) -> tuple[pa.Table, pa.Table]:
    rollouts = {
        "length": [10, 20, 40, 40],
        "finish_reason": ["stop", "stop", "length", "length"],
        "repetition_rate": [0.9, 0.0, 0.2, 0.4],
    }
    rewards = {
        "reward": [1.0, 0.0, 0.0, 0.0],
        "format_reward": [1.0, 1.0, 0.0, 0.0],
        "accuracy_reward": [1.0, 0.0, 1.0, 0.0],
        "verdict": ["correct", "wrong", "malformed", "timeout"],
    }
    return (
        pa.table({name: changed.get(name, values) for name, values in rollouts.items()}),
        pa.table({name: changed.get(name, values) for name, values in rewards.items()}),
    )


def test_metrics_golden() -> None:
    assert response_metrics(*tables()) == pytest.approx(
        {
            "reward/mean": 0.25,
            "reward/format": 0.5,
            "reward/accuracy": 0.5,
            "response/length_mean": 27.5,
            "response/length_max": 40.0,
            "response/clip_ratio": 0.5,
            "response/repetition_overlong": 0.3,  # (0.2 + 0.4) / 2, the finished ones left out
            "verdict/correct": 0.25,
            "verdict/wrong": 0.25,
            "verdict/malformed": 0.25,
            "verdict/no_answer": 0.0,
            "verdict/timeout": 0.25,
            "verdict/error": 0.0,
        }
    )


def test_metrics_without_truncated_responses() -> None:
    metrics = response_metrics(*tables(finish_reason=["stop"] * 4))
    assert metrics["response/clip_ratio"] == metrics["response/repetition_overlong"] == 0.0


def test_metrics_are_plain_floats_that_json_takes() -> None:
    assert {type(value) for value in response_metrics(*tables()).values()} == {float}
