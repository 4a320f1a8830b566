"""Teacher scoring by transformers in this process: the logprobs of given tokens under softmax(logits / T)."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from kdrl_core.engines.protocols import TopKScore
from kdrl_core.errors import EngineError
from kdrl_core.logprobs.model import LogprobModel, PaddedBatch, pad_sequences, token_budget_batches
from kdrl_core.types import ScoreRequest


class TransformersScorer:
    """`TeacherScorer` over a frozen transformers model.

    Args:
        model: in eval mode.
        temperature: the student's sampling temperature; the teacher's logits are divided by it.
        batch_tokens: padded tokens per forward pass.
        num_tokens: ids from this number on are padding of the embedding, never among the top-K; None: no padding.
    """

    def __init__(
        self, model: PreTrainedModel, *, temperature: float, batch_tokens: int, num_tokens: int | None = None
    ) -> None:
        self._model = model
        self._logprobs = LogprobModel(model, temperature=temperature)
        self._batch_tokens = batch_tokens
        size: int = model.config.vocab_size
        self._num_tokens = size if num_tokens is None else min(num_tokens, size)

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest]) -> list[NDArray[np.float32]]:
        """Raises EngineError if a logprob is not finite."""
        scores: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(requests)
        for rows, batch in self._batches(requests):
            logprobs = self._logprobs(batch).logprobs.cpu().numpy()
            for row, values in zip(rows, logprobs, strict=True):
                scores[row] = values[: len(requests[row].token_ids)].astype(np.float32)
        refuse_not_finite(scores)
        return scores

    @torch.inference_mode()
    def score_topk(self, requests: Sequence[ScoreRequest], k: int) -> list[TopKScore]:
        """Raises as `score`, and ValueError if k is above the number of tokens."""
        if not 1 <= k <= self._num_tokens:
            raise ValueError(f"k: expected 1 to {self._num_tokens}, the tokens of the vocabulary, given {k}")
        scores: dict[int, TopKScore] = {}
        for rows, batch in self._batches(requests):
            found = self._logprobs.best_tokens(batch, k, num_tokens=self._num_tokens)
            logprobs, ids, values = found.logprobs, found.ids.to(torch.int32), found.values
            arrays = (tensor.cpu().numpy() for tensor in (logprobs, ids, values))
            for row, own, best_ids, best in zip(rows, *arrays, strict=True):
                length = len(requests[row].token_ids)
                scores[row] = TopKScore(
                    logprobs=own[:length].astype(np.float32), topk_ids=best_ids[:length], topk_logprobs=best[:length]
                )
        ordered = [scores[row] for row in range(len(requests))]
        refuse_not_finite([score.logprobs for score in ordered])
        return ordered

    def sleep(self) -> None:
        """Nothing: the model stays where it is."""

    def close(self) -> None:
        """Nothing: the model goes with the scorer."""

    def _batches(self, requests: Sequence[ScoreRequest]) -> Iterator[tuple[list[int], PaddedBatch]]:
        lengths = [(len(r.prompt_token_ids), len(r.token_ids)) for r in requests]
        for rows in token_budget_batches(lengths, max_tokens=self._batch_tokens):
            yield rows, pad_sequences([requests[row] for row in rows], device=self._model.device)


def refuse_not_finite(scores: Sequence[NDArray[np.float32]]) -> None:
    """Raise EngineError at the first logprob that is not finite."""
    for row, values in enumerate(scores):
        if not np.isfinite(values).all():
            token = int(np.flatnonzero(~np.isfinite(values))[0])
            raise EngineError(
                f"the scoring model gives logprob {values[token]} to token {token} of response {row}; "
                "check that its weights are complete and its dtype has the range (bfloat16, not float16)"
            )
