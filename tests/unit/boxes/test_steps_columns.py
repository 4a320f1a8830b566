"""Columns of a step's tables as arrays and back: the same values, to the bit, as row by row."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from kdrl_core.boxes.step import kl_columns
from kdrl_core.objectives import recorded_kl
from kdrl_core.tables.files import ragged, score_requests, views

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_sums_are_those_of_all_responses_padded_at_once(estimator: str) -> None:
    lengths = [1, 900, *RNG.integers(1, 300, 75)]
    rows = [-RNG.exponential(0.5, (2, length)).astype(np.float32) for length in lengths]
    student, teacher, mask = torch.zeros(3, len(rows), 900)
    for index, (own, theirs) in enumerate(rows):
        student[index, : len(own)] = torch.from_numpy(own)
        teacher[index, : len(own)] = torch.from_numpy(theirs)
        mask[index, : len(own)] = 1
    found = kl_columns([own for own, _ in rows], [theirs for _, theirs in rows], estimator)
    kl_sum = (recorded_kl(student, teacher, estimator) * mask).sum(1)
    assert np.array_equal(found["kl_sum"], kl_sum.numpy())
    assert np.array_equal(found["kl_mean"], (kl_sum / mask.sum(1)).numpy())
    assert np.array_equal(found["log_ratio_sum"], (teacher - student).sum(1).numpy())
    assert {column.dtype for column in found.values()} == {np.dtype(np.float32)}


def test_columns_of_lists_become_arrays_also_from_slices_and_several_chunks() -> None:
    lists = [[3, 1], [], [2**31 - 1], [5, 6, 7], [0]]
    ids = pa.array(lists, pa.list_(pa.int32()))
    assert [row.tolist() for row in views(ids[1:4])] == lists[1:4]
    floats = pa.chunked_array([[[0.5], [], [0.25]], [[0.125, -1.0], [2.0]]], pa.list_(pa.float32()))
    assert [row.tolist() for row in ragged(floats.slice(1, 3))] == [[], [0.25], [0.125, -1.0]]

    table = pa.table({"prompt_token_ids": pa.chunked_array([ids[:3], ids[3:]]), "token_ids": ids})
    for rows in (slice(0, 5), slice(1, 4)):
        sequences = score_requests(table[rows])
        assert [list(each.token_ids) for each in sequences] == lists[rows]
        assert [list(each.prompt_token_ids) for each in sequences] == lists[rows]
        assert sequences == score_requests(table[rows])
    joined = [*sequences[1].prompt_token_ids, *sequences[2].token_ids]
    assert json.loads(json.dumps(joined)) == [2**31 - 1, 5, 6, 7]  # as servers get them: no numpy numbers
