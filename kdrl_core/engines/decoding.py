"""Decoding in this process: rows of a batch, each with one more token per step, over the model's own cache.

Most models have a cache from which rows can be taken: attention (full, sliding window), convolutions and recurrent
states in any mixture. For others the whole sequence is computed again for every token, which is slower and gives the
same numbers.

transformers copies the whole cache of full attention for every token, and on a CPU once more for every query head that
shares its keys and values. Here neither is copied; the numbers are the same to the last bit.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kdrl_core.logprobs.model import forward
from kdrl_core.logprobs.trial import agree, probe_ids

_ROOM = 64
"""Tokens by which the memory of a cache grows at a time."""
_ATTENTION = "kdrl_sdpa"
_logger = logging.getLogger("kdrl")


class Decoding:
    """Rows of one batch: each starts with a prompt and gets one token per `append`.

    Args:
        limit: most tokens that a row will get.
        cache_method: takes rows of the model's cache, from `usable_cache`; None: work without a cache.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, limit: int, cache_method: str | None
    ) -> None:
        self._model = model
        self._cache = None if cache_method is None else _roomy_cache(model)
        self._take_rows = None if cache_method is None else getattr(self._cache, cache_method)
        distinct = {tuple(prompt): row for row, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        self._width = width = max(map(len, distinct))
        ids = [[0] * (width - len(prompt)) + list(prompt) + [0] * limit for prompt in distinct]
        self._ids = torch.tensor(ids, device=model.device)  # [rows, width + tokens to come]
        self._padding = torch.tensor([[width - len(prompt)] for prompt in distinct], device=model.device)
        self._mask = (torch.arange(width + limit, device=model.device) >= self._padding).long()
        self.logits = self._forward(width)
        """[rows, V] of each row's next token."""
        source = torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=model.device)
        self.logits = self.logits[source]
        self.keep(source)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch. `append` comes next."""
        if self._take_rows is not None:
            self._take_rows(rows)
        self._ids, self._padding, self._mask = self._ids[rows], self._padding[rows], self._mask[rows]

    def append(self, tokens: Tensor) -> None:
        """Append one token to each row and compute the logits of the next."""
        self._ids[:, self._width] = tokens
        self._width += 1
        self.logits = self._forward(self._width if self._cache is None else 1)

    def _forward(self, num_tokens: int) -> Tensor:
        """[rows, V] logits of the last position. The model gets the last `num_tokens` tokens of each row."""
        new = slice(self._width - num_tokens, self._width)
        positions = torch.arange(new.start, new.stop, device=self._ids.device) - self._padding
        output = forward(
            self._model,
            input_ids=self._ids[:, new],
            attention_mask=self._mask[:, : self._width],
            position_ids=positions.clamp(min=0),
            use_cache=self._cache is not None,
            logits_to_keep=1,
            **({} if self._cache is None else {"past_key_values": self._cache}),
        )
        logits: Tensor = output.logits[:, -1]
        return logits


@torch.inference_mode()
def usable_cache(model: PreTrainedModel) -> str | None:
    """The method that takes rows of the model's cache, if the model gives the same logits with the cache, whose rows
    are repeated, dropped and reordered, as without; tried on a few tokens. Else None, with a warning in the log.
    """
    try:
        fine = agree(_tried(model, "reorder_cache"), _tried(model, None), dtype=model.dtype)
        reason = "gives other logits with the cache than without"
    except Exception as error:  # a cache of another kind fails in its own way
        fine, reason = False, f"has no cache that rows can be taken from ({' '.join(str(error).split())[:100]})"
    if fine:  # recurrent states can only be reordered
        kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
        return "batch_select_indices" if kinds <= {DynamicLayer, DynamicSlidingWindowLayer} else "reorder_cache"
    _logger.warning(
        "%s %s; every token is computed from the whole sequence, which is slower", type(model).__name__, reason
    )
    return None


def _tried(model: PreTrainedModel, cache_method: str | None) -> Tensor:
    """Logits of every step of a small batch."""
    ids = probe_ids(model)
    decoding = Decoding(model, [ids[1:3], ids[2:6]], limit=2, cache_method=cache_method)
    found = [decoding.logits]
    for rows, tokens in (([1, 0, 1], ids[6:9]), ([2, 1], ids[9:11])):
        decoding.keep(torch.tensor(rows, device=model.device))
        decoding.append(torch.tensor(tokens, device=model.device))
        found.append(decoding.logits)
    return torch.cat(found)


class _RoomyLayer(DynamicLayer):
    """Keys and values of full attention, in memory with room for further tokens."""

    keys: Any
    values: Any
    _memory: tuple[Tensor, Tensor] | None = None
    """[B, H, at least L, D] each; `keys` and `values` are its first L tokens. None after rows were taken."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As `DynamicLayer.update`, which copies everything into new memory for each token."""
        held = self.get_seq_length()
        size = held + key_states.shape[-2]
        if self._memory is None or self._memory[0].shape[-2] < size:
            self._memory = _with_room(key_states, size), _with_room(value_states, size)
            if held:
                self._memory[0][..., :held, :] = self.keys
                self._memory[1][..., :held, :] = self.values
            self.is_initialized = True
        for memory, new in zip(self._memory, (key_states, value_states), strict=True):
            memory[..., held:size, :] = new
        self.keys, self.values = (memory[..., :size, :] for memory in self._memory)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._memory = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._memory = None


def _with_room(like: Tensor, size: int) -> Tensor:
    """Memory for `size` tokens or a few more, of a kind with [B, H, N, D]."""
    return like.new_empty((*like.shape[:-2], -(-size // _ROOM) * _ROOM, like.shape[-1]))


def _roomy_cache(model: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def share_key_values(model: PreTrainedModel) -> None:
    """Let query heads on a CPU read the keys and values that they share, in place of a copy for each. Models with
    another attention than torch's stay as they are."""
    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(_ATTENTION, _shared_attention)
        AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
        model.set_attn_implementation(_ATTENTION)


def _shared_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' own, but the heads of `key` and `value` [B, H, L, D] are not repeated either if there is a mask."""
    is_shared = getattr(module, "num_key_value_groups", 1) > 1
    if not is_shared or attention_mask is None or options.get("position_bias") is not None:
        found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return found
    attended = scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=options.get("scaling"), enable_gqa=True
    )
    return attended.transpose(1, 2).contiguous(), None
