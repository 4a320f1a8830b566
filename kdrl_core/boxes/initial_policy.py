"""The policy that a stage began with, scored by the trainer that changes it.

With an adapter, the trainer holds the base and both adapters, of now and of the beginning. So the penalty to the
initial policy (`ref_beta`) takes no second copy of the model.
"""

from collections.abc import Sequence

import numpy as np

from kdrl_core.engines.protocols import TopKScore
from kdrl_core.engines.transformers_engines import refuse_not_finite
from kdrl_core.logprobs.model import batches_of
from kdrl_core.training.protocols import Float32s, Trainer
from kdrl_core.types import ScoreRequest


class InitialPolicy:
    """`TeacherScorer` by a trainer with an adapter.

    Args:
        batch_tokens: padded tokens that the trainer gets at a time; None: all at once, as ranks cut them themselves.
    """

    def __init__(self, trainer: Trainer, *, batch_tokens: int | None) -> None:
        self._trainer = trainer
        self._batch_tokens = batch_tokens

    def score(self, requests: Sequence[ScoreRequest]) -> list[Float32s]:
        """Raises EngineError if a logprob is not finite."""
        scores: list[Float32s] = [np.empty(0, np.float32)] * len(requests)
        tokens = self._batch_tokens
        for rows in [range(len(requests))] if tokens is None else batches_of(requests, max_tokens=tokens):
            found = self._trainer.score_initial([requests[row] for row in rows])
            for row, values in zip(rows, found, strict=True):
                scores[row] = values
        refuse_not_finite(scores)
        return scores

    def score_topk(self, requests: Sequence[ScoreRequest], k: int) -> list[TopKScore]:
        """Not supported: no objective asks the initial policy for its best tokens."""
        raise NotImplementedError

    def sleep(self) -> None:
        """Nothing: the model is the trainer's."""

    def close(self) -> None:
        """Nothing: the model is the trainer's."""
