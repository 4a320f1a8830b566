"""Frozen models that a trainer with an adapter can score with, without another copy of the weights.

It holds the base and both adapters, of now and of the beginning. So the penalty to the stage's initial policy
(`ref_beta`) takes no second model, nor does a teacher that is the base.
"""

from collections.abc import Sequence

import numpy as np

from kdrl_core.engines.protocols import TopKScore
from kdrl_core.engines.transformers_engines import refuse_not_finite
from kdrl_core.logprobs.model import batches_of
from kdrl_core.models.lora import FrozenAdapter
from kdrl_core.training.protocols import Float32s, Trainer
from kdrl_core.types import ScoreRequest


class FrozenPolicy:
    """`TeacherScorer` by a trainer with an adapter.

    Args:
        adapter: with which adapter it scores.
        batch_tokens: padded tokens that the trainer gets at a time; None: all at once, as ranks cut them themselves.
    """

    def __init__(self, trainer: Trainer, adapter: FrozenAdapter, *, batch_tokens: int | None) -> None:
        self._trainer = trainer
        self._adapter = adapter
        self._batch_tokens = batch_tokens

    def score(self, requests: Sequence[ScoreRequest]) -> list[Float32s]:
        """Raises EngineError if a logprob is not finite."""
        scores: list[Float32s] = [np.empty(0, np.float32)] * len(requests)
        tokens = self._batch_tokens
        for rows in [range(len(requests))] if tokens is None else batches_of(requests, max_tokens=tokens):
            found = self._trainer.score_frozen([requests[row] for row in rows], self._adapter)
            for row, values in zip(rows, found, strict=True):
                scores[row] = values
        refuse_not_finite(scores)
        return scores

    def score_topk(self, requests: Sequence[ScoreRequest], k: int) -> list[TopKScore]:
        """Not supported: a teacher whose best tokens are asked for is loaded (`Recipe.trainer_scores`)."""
        raise NotImplementedError

    def sleep(self) -> None:
        """Nothing: the model is the trainer's."""

    def close(self) -> None:
        """Nothing: the model is the trainer's."""
