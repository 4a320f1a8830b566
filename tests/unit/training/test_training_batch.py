"""From ragged lists to padded tensors, and into batches by token budget."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdrl_core.logprobs.model import pad_sequences, token_budget_batches
from kdrl_core.types import ScoreRequest


def test_padding_golden() -> None:
    batch = pad_sequences(
        [
            ScoreRequest(prompt_token_ids=[5, 6, 7], token_ids=[8]),
            ScoreRequest(prompt_token_ids=[9], token_ids=[10, 11]),
        ]
    )
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 0], [0, 0, 9, 10, 11]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 3], [0, 0, 0, 1, 2]]
    assert batch.response_ids.tolist() == [[8, 0], [10, 11]]
    assert batch.response_mask.tolist() == [[1.0, 0.0], [1.0, 1.0]]
    assert batch.response_mask.dtype == torch.float32


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 60)), min_size=1, max_size=40),
    st.integers(1, 400),
)
def test_batches_hold_each_row_once_within_the_budget(lengths: list[tuple[int, int]], max_tokens: int) -> None:
    batches = token_budget_batches(lengths, max_tokens=max_tokens)
    assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
    for rows in batches:
        width = max(lengths[row][0] for row in rows) + max(lengths[row][1] for row in rows)
        assert rows
        assert len(rows) == 1 or len(rows) * width <= max_tokens


def test_batches_golden() -> None:
    # sorted by length: rows 1 (3), 2 (4), 0 (9); 2 × (2 + 2) = 8 fits, 3 × (4 + 5) = 27 does not
    assert token_budget_batches([(4, 5), (2, 1), (2, 2)], max_tokens=10) == [[1, 2], [0]]
    assert token_budget_batches([(4, 5), (2, 1), (2, 2)], max_tokens=27) == [[1, 2, 0]]


def test_no_rows_are_no_batches() -> None:
    assert token_budget_batches([], max_tokens=10) == []


@pytest.mark.parametrize("max_tokens", [1, 10_000])
def test_order_of_equal_rows_is_kept(max_tokens: int) -> None:
    rows = [row for batch in token_budget_batches([(3, 3)] * 5, max_tokens=max_tokens) for row in batch]
    assert rows == [0, 1, 2, 3, 4]
