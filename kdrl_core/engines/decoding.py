"""A batch of responses that a transformers model extends token by token, with a key-value cache or without one.

Most models have a cache from which rows can be taken: attention (full, sliding window), convolutions and recurrent
states in any mixture. Others keep a cache of their own kind, or none. For them the whole sequence is computed again for
every token, which is slower and gives the same numbers.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kdrl_core.logprobs.passes import agree, forward, probe_batch

_logger = logging.getLogger("kdrl")


class Decoding:
    """Rows of one batch: each starts with a prompt and gets one token per `append`.

    Args:
        prompts: token ids of each row's prompt. Each distinct prompt is computed once.
        limit: most tokens that a row will get.
        uses_cache: whether the model has a usable cache, from `has_usable_cache`.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, limit: int, uses_cache: bool
    ) -> None:
        self._model = model
        distinct: dict[tuple[int, ...], int] = {}
        for prompt in prompts:
            distinct.setdefault(tuple(prompt), len(distinct))
        self._width = max(len(prompt) for prompt in distinct)
        ids = torch.zeros(len(distinct), self._width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(distinct):
            ids[row, self._width - len(prompt) :] = torch.tensor(prompt)
            mask[row, self._width - len(prompt) :] = 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        self._cache = DynamicCache(config=model.config) if uses_cache else None
        layers = [] if self._cache is None else self._cache.layers
        self._is_plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
        logits = self._forward(ids, mask, (mask.cumsum(1) - 1).clamp(min=0))
        source = torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=model.device)
        if len(distinct) < len(prompts):
            self._select(source)
        self.logits: Tensor = logits[source]
        """[rows, V] of each row's next token."""
        self._ids = ids[source]
        self._lengths = mask[source].sum(1)
        self._mask = torch.cat([mask[source], mask.new_ones(len(source), limit)], dim=1)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch alone. `append` comes next."""
        self._select(rows)
        self._ids, self._lengths, self._mask = self._ids[rows], self._lengths[rows], self._mask[rows]

    def append(self, tokens: Tensor) -> None:
        """Append one token to each row and compute the logits of the next."""
        added = self._ids.shape[1] - self._width
        self._ids = torch.cat([self._ids, tokens[:, None]], dim=1)
        mask = self._mask[:, : self._width + added + 1]
        if self._cache is None:
            self.logits = self._forward(self._ids, mask, (mask.cumsum(1) - 1).clamp(min=0))
        else:
            self.logits = self._forward(tokens[:, None], mask, (self._lengths + added)[:, None])

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """[rows, V] logits of the last position."""
        arguments = {} if self._cache is None else {"past_key_values": self._cache}
        output = forward(
            self._model,
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=self._cache is not None,
            logits_to_keep=1,
            **arguments,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _select(self, rows: Tensor) -> None:
        if self._cache is None:
            return
        if self._is_plain:
            self._cache.batch_select_indices(rows)
        else:  # the only method that takes the rows of recurrent states as well
            self._cache.reorder_cache(rows)


@torch.inference_mode()
def has_usable_cache(model: PreTrainedModel) -> bool:
    """Whether the model gives the same logits with a cache, whose rows are repeated and dropped, as without; tried on a
    few tokens. Logs a warning if it does not.
    """
    try:
        fine = agree(_tried(model, uses_cache=True), _tried(model, uses_cache=False))
        reason = "gives other logits with the cache than without"
    except Exception as error:  # a cache of another kind fails in its own way
        fine, reason = False, f"has no cache that rows can be taken from ({' '.join(str(error).split())[:100]})"
    if not fine:
        _logger.warning(
            "%s %s; every token is computed from the whole sequence, which is slower", type(model).__name__, reason
        )
    return fine


def _tried(model: PreTrainedModel, *, uses_cache: bool) -> Tensor:
    """Logits of every step of a small batch whose rows are repeated, dropped and put in another order."""
    prompts, tokens = probe_batch(model)
    decoding = Decoding(model, prompts, limit=2, uses_cache=uses_cache)
    decoding._is_plain = False  # the method for any cache also takes rows of a plain one
    found = [decoding.logits]
    for rows in ([1, 0, 1], [2, 1]):
        decoding.keep(torch.tensor(rows, device=model.device))
        decoding.append(tokens[: len(rows)])
        tokens = tokens[len(rows) :]
        found.append(decoding.logits)
    return torch.cat(found)
