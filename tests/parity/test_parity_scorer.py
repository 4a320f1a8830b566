"""The scorer against a dense forward pass, and the trainer's logprobs against the engine's."""

from typing import Any

import numpy as np
import pytest
import torch
from parity.conftest import dense_logprobs, largest_gap

from kdrl_core.engines.transformers_engines import TransformersScorer
from kdrl_core.errors import EngineError
from kdrl_core.models.loading import load_model
from kdrl_core.types import Rollout, ScoreRequest


def as_requests(rollouts: list[Rollout]) -> list[ScoreRequest]:
    return [ScoreRequest(prompt_token_ids=r.prompt_token_ids, token_ids=r.token_ids) for r in rollouts]


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_scores_are_the_tempered_teachers_logprobs(teacher: Any, rollouts: list[Rollout], temperature: float) -> None:
    scores = TransformersScorer(teacher, temperature=temperature, batch_tokens=512).score(as_requests(rollouts))
    with torch.no_grad():
        expected = [dense_logprobs(teacher, rollout, temperature) for rollout in rollouts]
    assert all(score.dtype == np.float32 for score in scores)
    assert [len(score) for score in scores] == [len(rollout.token_ids) for rollout in rollouts]
    assert largest_gap(scores, expected) < 1e-5


def test_temperature_is_not_a_rescaling_of_logprobs(teacher: Any, rollouts: list[Rollout]) -> None:
    requests = as_requests(rollouts)
    plain = np.concatenate(TransformersScorer(teacher, temperature=1.0, batch_tokens=4096).score(requests))
    tempered = np.concatenate(TransformersScorer(teacher, temperature=0.6, batch_tokens=4096).score(requests))
    assert np.abs(tempered - plain / 0.6).max() > 1e-3


@pytest.mark.parametrize("batch_tokens", [1, 100, 100_000])
def test_scores_do_not_depend_on_batches_or_order(teacher: Any, rollouts: list[Rollout], batch_tokens: int) -> None:
    requests = as_requests(rollouts)
    reference = TransformersScorer(teacher, temperature=0.6, batch_tokens=512).score(requests)
    order = np.random.default_rng(0).permutation(len(requests)).tolist()
    scores = TransformersScorer(teacher, temperature=0.6, batch_tokens=batch_tokens).score(
        [requests[row] for row in order]
    )
    assert largest_gap(scores, [torch.tensor(reference[row]) for row in order]) < 1e-5


def test_student_scores_its_own_tokens_as_it_sampled_them(student: Any, rollouts: list[Rollout]) -> None:
    scores = TransformersScorer(student, temperature=1.0, batch_tokens=512).score(as_requests(rollouts))
    assert (
        largest_gap(scores, [torch.tensor(rollout.logprobs) for rollout in rollouts]) < 2e-5
    )  # in float32 processors differ by up to 1.1e-5


def test_a_broken_teacher_is_named(teacher_dir: Any, rollouts: list[Rollout]) -> None:
    model = load_model(teacher_dir)
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(EngineError, match=r"logprob nan to token 0 of response 0; check that its weights are complete"):
        TransformersScorer(model, temperature=1.0, batch_tokens=512).score(as_requests(rollouts))
