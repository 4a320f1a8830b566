"""Teacher scoring by transformers in process: the logprobs of given tokens under softmax(logits / T)."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from kdrl_core.engines.protocols import TopKScore
from kdrl_core.errors import EngineError
from kdrl_core.training.batch import PaddedBatch, pad_sequences, token_budget_batches
from kdrl_core.training.logprobs import response_logits, response_logprobs
from kdrl_core.types import ScoreRequest


class TransformersScorer:
    """`TeacherScorer` over a frozen transformers model.

    Args:
        model: in eval mode.
        temperature: the student's sampling temperature; the teacher's logits are divided by it.
        batch_tokens: padded tokens per forward pass.
        num_tokens: ids from here on are padding of the embedding, never among the top-K; None: none are.
    """

    def __init__(
        self, model: PreTrainedModel, *, temperature: float, batch_tokens: int, num_tokens: int | None = None
    ) -> None:
        self._model = model
        self._temperature = temperature
        self._batch_tokens = batch_tokens
        size: int = model.config.vocab_size
        self._num_tokens = size if num_tokens is None else min(num_tokens, size)

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest]) -> list[NDArray[np.float32]]:
        """Logprobs [len(token_ids)] per request, in order. Raises EngineError for a logprob that is not finite."""
        scores: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(requests)
        for rows, batch, logits in self._forward(requests):
            for row, values in zip(rows, _own_logprobs(logits, batch), strict=True):
                scores[row] = values
        _refuse_not_finite(scores)
        return scores

    @torch.inference_mode()
    def score_topk(self, requests: Sequence[ScoreRequest], k: int) -> list[TopKScore]:
        """Logprobs and the k likeliest tokens per request, in order.

        Raises:
            EngineError: a logprob is not finite.
            ValueError: k is above the number of tokens.
        """
        if not 1 <= k <= self._num_tokens:
            raise ValueError(f"k: expected 1 to {self._num_tokens}, the tokens of the vocabulary, given {k}")
        scores: dict[int, TopKScore] = {}
        for rows, batch, logits in self._forward(requests):
            best = logits.log_softmax(-1)[..., : self._num_tokens].topk(k, dim=-1)
            ids, values = best.indices.to(torch.int32).cpu().numpy(), best.values.cpu().numpy()
            for index, (row, own) in enumerate(zip(rows, _own_logprobs(logits, batch), strict=True)):
                length = len(own)
                scores[row] = TopKScore(
                    logprobs=own, topk_ids=ids[index, :length], topk_logprobs=values[index, :length]
                )
        found = [scores[row] for row in range(len(requests))]
        _refuse_not_finite([score.logprobs for score in found])
        return found

    def _forward(self, requests: Sequence[ScoreRequest]) -> Iterator[tuple[list[int], PaddedBatch, torch.Tensor]]:
        """Rows, their padded batch and logits / T [b, T, V], batch by batch."""
        lengths = [(len(r.prompt_token_ids), len(r.token_ids)) for r in requests]
        for rows in token_budget_batches(lengths, max_tokens=self._batch_tokens):
            batch = pad_sequences([requests[row] for row in rows], device=self._model.device)
            yield rows, batch, response_logits(self._model, batch, temperature=self._temperature)


def _own_logprobs(logits: torch.Tensor, batch: PaddedBatch) -> list[NDArray[np.float32]]:
    logprobs, _ = response_logprobs(logits, batch)
    masks = batch.response_mask.bool().cpu().numpy()
    return [row[mask].astype(np.float32) for row, mask in zip(logprobs.cpu().numpy(), masks, strict=True)]


def _refuse_not_finite(scores: Sequence[NDArray[np.float32]]) -> None:
    for row, values in enumerate(scores):
        if not np.isfinite(values).all():
            token = int(np.flatnonzero(~np.isfinite(values))[0])
            raise EngineError(
                f"the scoring model gives logprob {values[token]} to token {token} of response {row}; "
                "check that its weights are complete and its dtype has the range (bfloat16, not float16)"
            )
