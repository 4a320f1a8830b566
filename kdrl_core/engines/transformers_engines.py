"""Engines that run transformers in this process: for a laptop, and as the reference for the other engines.

Rollouts: in each batch a distinct prompt is prefilled once, and its key-value cache is repeated for its samples.
Finished responses leave the batch, several at a time (kdrl_core.engines.decoding).

A token is drawn by inverting the distribution function of softmax(logits / T) at a number that depends only on (seed,
position), so a response is a function of its request and the weights. Ids that the tokenizer does not have, padding of
the embedding, are left out of that distribution; logprobs are those of the whole softmax, as the trainer's.

Scores: the logprobs of given tokens under softmax(logits / T).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from kdrl_core.engines.decoding import Decoding, share_key_values, usable_cache
from kdrl_core.engines.protocols import OnFinished, TopKScore
from kdrl_core.errors import EngineError
from kdrl_core.ledger.names import uniforms
from kdrl_core.logprobs.chunked import use_float32_logits
from kdrl_core.logprobs.model import LogprobModel, PaddedBatch, padded_batches
from kdrl_core.logprobs.trial import refuse_padding_fault
from kdrl_core.models.loading import free_cached_memory, load_weights_into
from kdrl_core.models.tokenizer import num_token_ids
from kdrl_core.types import FinishReason, Rollout, RolloutRequest, ScoreRequest

_COMPACT_BELOW = 0.75
"""The batch is compacted once fewer than this share of its rows still generate, since copying the cache has a cost."""


class TransformersRolloutEngine:
    """`RolloutEngine` over a transformers model in eval mode, which `load_weights` changes in place. `batch_size`
    responses are generated together."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        stop_ids: Sequence[int],
        temperature: float,
        max_response_tokens: int,
        batch_size: int,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._stop_ids = torch.tensor(list(stop_ids), device=model.device)
        self._temperature = temperature
        self._max_response_tokens = max_response_tokens
        self._batch_size = batch_size
        self._num_tokens = num_token_ids(tokenizer)
        refuse_padding_fault(model)
        use_float32_logits(model)
        share_key_values(model)
        self._cache_method = usable_cache(model)

    def load_weights(self, checkpoint_dir: Path) -> None:
        load_weights_into(self._model, checkpoint_dir)

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        *,
        on_finished: OnFinished | None = None,
        max_response_tokens: int | None = None,
    ) -> list[Rollout]:
        """Raises EngineError if the model's logits are not finite."""
        limit = min(max_response_tokens or self._max_response_tokens, self._max_response_tokens)
        rollouts: list[Rollout] = []
        for start in range(0, len(requests), self._batch_size):
            rollouts += self._generate_batch(requests[start : start + self._batch_size], on_finished, limit)
        return rollouts

    def sleep(self) -> None:
        """Free what torch keeps for later; the model stays where it is."""
        free_cached_memory(self._model.device)

    def close(self) -> None:
        """Nothing: the model is freed with the engine."""

    @torch.inference_mode()
    def _generate_batch(
        self, requests: Sequence[RolloutRequest], on_finished: OnFinished | None, limit: int
    ) -> list[Rollout]:
        device = self._model.device
        prompts = [request.prompt_token_ids for request in requests]
        decoding = Decoding(self._model, prompts, limit=limit, cache_method=self._cache_method)
        draws = torch.from_numpy(np.stack([uniforms(request.seed, limit) for request in requests])).to(device)
        tokens = torch.zeros(len(requests), limit, dtype=torch.long, device=device)
        logprobs = torch.zeros(len(requests), limit, device=device)
        counts = torch.full((len(requests),), limit, device=device)
        stopped = torch.zeros(len(requests), dtype=torch.bool, device=device)
        rollouts: dict[int, Rollout] = {}

        def finish(which: list[int]) -> None:
            new = self._rollouts(requests, which, tokens, logprobs, counts, stopped)
            rollouts.update(zip(which, new, strict=True))
            if on_finished is not None and new:
                on_finished(new)

        rows = torch.arange(len(requests), device=device)  # original row of each row still in the batch
        for position in range(limit):
            chosen, chosen_logprobs = self._sample(decoding.logits, draws[rows, position])
            active = ~stopped[rows]
            tokens[rows[active], position] = chosen[active]
            logprobs[rows[active], position] = chosen_logprobs[active]
            ended = active & torch.isin(chosen, self._stop_ids)
            stopped[rows[ended]] = True
            counts[rows[ended]] = position + 1
            remaining = ~stopped[rows]
            num_remaining = int(remaining.sum())
            if num_remaining == 0 or position + 1 == limit:
                break
            if num_remaining < _COMPACT_BELOW * len(rows):
                finish(rows[~remaining].tolist())
                keep = remaining.nonzero().squeeze(1)
                decoding.keep(keep)
                rows, chosen = rows[keep], chosen[keep]
            decoding.append(chosen)

        finish([row for row in range(len(requests)) if row not in rollouts])
        return [rollouts[row] for row in range(len(requests))]

    def _rollouts(
        self,
        requests: Sequence[RolloutRequest],
        which: list[int],
        tokens: Tensor,
        logprobs: Tensor,
        counts: Tensor,
        stopped: Tensor,
    ) -> list[Rollout]:
        sizes = counts[which].tolist()
        token_ids = [row[:size] for row, size in zip(tokens[which].tolist(), sizes, strict=True)]
        texts = self._tokenizer.batch_decode(token_ids, skip_special_tokens=True) if which else []
        return [
            Rollout(
                prompt_id=requests[row].prompt_id,
                sample=requests[row].sample,
                prompt_token_ids=requests[row].prompt_token_ids,
                token_ids=ids,
                logprobs=values[:size],
                text=text,
                finish_reason=FinishReason.STOP if has_stopped else FinishReason.LENGTH,
            )
            for row, ids, values, size, text, has_stopped in zip(
                which, token_ids, logprobs[which].tolist(), sizes, texts, stopped[which].tolist(), strict=True
            )
        ]

    def _sample(self, logits: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B] and their logprobs [B] from logits [B, V] and draws [B] in [0, 1)."""
        logits = logits.float()
        if not torch.isfinite(logits).all():
            raise EngineError("the policy's logits are not finite: training has diverged; lower learning_rate")
        if self._temperature == 0.0:
            chosen = logits[:, : self._num_tokens].argmax(-1)
            log_probabilities = logits.log_softmax(-1)
        else:
            log_probabilities = (logits / self._temperature).log_softmax(-1)
            distribution = log_probabilities[:, : self._num_tokens].double().exp().cumsum(-1)
            chosen = torch.searchsorted(distribution, (draws * distribution[:, -1])[:, None], right=True).squeeze(1)
            chosen = chosen.clamp(max=distribution.shape[1] - 1)
        return chosen, log_probabilities.gather(-1, chosen[:, None]).squeeze(1)


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
        """Free what torch keeps for later; the model stays where it is."""
        free_cached_memory(self._model.device)

    def close(self) -> None:
        """Nothing: the model is freed with the scorer."""

    def _batches(self, requests: Sequence[ScoreRequest]) -> Iterator[tuple[list[int], PaddedBatch]]:
        refuse_unknown_tokens(requests, self._model.get_input_embeddings())
        return padded_batches(requests, max_tokens=self._batch_tokens, device=self._model.device)


def refuse_unknown_tokens(requests: Sequence[ScoreRequest], embedding: Any) -> None:
    """Raise EngineError at the first token that the embedding has no row for."""
    size = getattr(embedding, "num_embeddings", None)
    for row, request in enumerate(requests):
        highest = max([*request.prompt_token_ids, *request.token_ids], default=0)
        if size is not None and highest >= size:
            raise EngineError(
                f"request {row} has the token id {highest}, but the scoring model's embedding has {size} rows; an "
                "earlier kdrl could sample padding of the student's embedding: start the run anew"
            )


def refuse_not_finite(scores: Sequence[NDArray[np.float32]]) -> None:
    """Raise EngineError at the first logprob that is not finite."""
    for row, values in enumerate(scores):
        if not np.isfinite(values).all():
            token = int(np.flatnonzero(~np.isfinite(values))[0])
            raise EngineError(
                f"the scoring model gives logprob {values[token]} to token {token} of response {row}; "
                "check that its weights are complete and its dtype has the range (bfloat16, not float16)"
            )
