"""Logprobs, entropy and Top-K KL of tokens from hidden states, without their logits [N, V].

    z = (h Wᵀ + b) / T,  log π = z − log Σ_v e^z,  H = −Σ_v π log π,
    KL = Σ_v π (log π − log π'_T),  log π'_T as in `kdrl_core.objectives.topk`

The forward pass goes through the vocabulary in chunks of columns and keeps three running sums per token, relative to
the highest logit so far (Σ e^z, Σ e^z z, and the same outside the Top-K). The backward pass computes each chunk's
logits again: with l = log π_v and the gradients g, g_H, g_K of the three results,

    ∂/∂z_v = g (1[v = target] − π_v) − g_H π_v (l + H) + g_K π_v (l − log π'_T(v) − KL)

The chunks are of columns, not of tokens: so each row of ∂/∂W is one matmul over all tokens, written once to its place.
It is never read back and added to, so it needs no float32 copy when the weight is bfloat16.

Shapes: N tokens (response tokens only, packed), H hidden size, V vocabulary, K teacher tokens.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdrl_core.logprobs.chunked_function import (
    ChunkedStatistics,
    ChunkSettings,
    Float32Linear,
    RunningSums,
    gather_into,
    logit_chunks,
    sum_dtype,
)

CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 128 * 2**20}
"""Default size of one chunk's logits by kind of device; about three tensors of this size live at a time. docs/memory.md
has what is measured; a GPU must have work for longer than the chunk's kernels take to start."""


class OutputLayer(NamedTuple):
    """Turns hidden states into logits: (hidden Wᵀ + bias) / temperature."""

    weight: Tensor
    """[V, H]."""
    bias: Tensor | None
    """[V]."""
    temperature: float
    """T > 0."""


class TopKTeacher(NamedTuple):
    """The teacher's K best tokens, for the Top-K KL. No gradient."""

    ids: Tensor
    """[N, K] distinct integers in [0, V)."""
    logits: Tensor
    """[N, K] logits (or logprobs) / T, finite."""
    floor: float
    """Log-probability of every other token, finite and ≤ 0."""


class TokenStatistics(NamedTuple):
    """Per token [N], in float32 (float64 for float64 inputs), with gradient."""

    logprobs: Tensor
    """log π of the target."""
    entropy: Tensor | None
    """In nats."""
    topk_kl: Tensor | None
    """KL(π ‖ π'_T) against the Top-K teacher."""


class BestTokens(NamedTuple):
    """Logprobs of targets and the likeliest tokens, without gradient."""

    logprobs: Tensor
    """[N] log π of the target."""
    ids: Tensor
    """[N, K] int64, the likeliest first."""
    values: Tensor
    """[N, K] their log π."""


def token_statistics(
    hidden: Tensor,
    layer: OutputLayer,
    target_ids: Tensor,
    *,
    with_entropy: bool = False,
    topk: TopKTeacher | None = None,
    compute_dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
) -> TokenStatistics:
    """Logprobs of `target_ids` under the softmax of the layer's logits, on request entropy and Top-K KL.

    Memory beyond inputs and gradients is a few chunks and a few numbers per token, for any V. The gradient flows to
    `hidden`, weight and bias if they require it, in the dtype of each. It can be taken once.

    Args:
        hidden: [N, H] last hidden states, those that predict the targets.
        layer: the output layer.
        target_ids: [N] integers in [0, V).
        with_entropy: compute the entropy as well.
        topk: compute the KL to this teacher as well.
        compute_dtype: of the matmuls' operands; weights are cast chunk by chunk. None: the dtype of autocast if it is
            on, else of `hidden`. Logits, and everything after them, are float32 at least.
        chunk_bytes: bound on one chunk's float32 logits (256 columns at least); None: `CHUNK_BYTES` of the device.

    Returns:
        [N] per token; `entropy` or `topk_kl` is None where not asked for.

    Raises:
        ValueError: shapes do not match, a target or a Top-K id is outside [0, V), a Top-K id is repeated, or its logit
            is not finite.
    """
    _check(hidden, layer, target_ids)
    topk_ids = teacher = None
    if topk is not None:
        _check_topk(topk, len(hidden), len(layer.weight))
        topk_ids = topk.ids.long()
        teacher = topk.logits.detach().to(sum_dtype(hidden)).log_softmax(-1)
    dtype, floor = _compute_dtype(hidden, compute_dtype), 0.0 if topk is None else topk.floor
    settings = ChunkSettings(1.0 / layer.temperature, dtype, _chunk_bytes(hidden, chunk_bytes), with_entropy, floor)
    with torch.autocast(hidden.device.type, enabled=False):  # autocast would round the sums as well
        found = ChunkedStatistics.apply(
            hidden, layer.weight, layer.bias, target_ids.long(), topk_ids, teacher, settings
        )
    logprobs, entropy, kl = found
    return TokenStatistics(logprobs, entropy if with_entropy else None, None if teacher is None else kl)


@torch.no_grad()
def best_tokens(
    hidden: Tensor,
    layer: OutputLayer,
    target_ids: Tensor,
    k: int,
    *,
    num_tokens: int | None = None,
    compute_dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
) -> BestTokens:
    """Logprobs of `target_ids` and of the `k` likeliest tokens, the softmax taken over the whole vocabulary.

    Arguments as in `token_statistics`; ids from `num_tokens` on are padding of the embedding and never among the best.

    Raises:
        ValueError: shapes do not match, a target is outside [0, V), or `k` is above the number of tokens.
    """
    _check(hidden, layer, target_ids)
    vocabulary = len(layer.weight)
    last = vocabulary if num_tokens is None else min(num_tokens, vocabulary)
    if not 1 <= k <= last:
        raise ValueError(f"k: expected 1 to {last}, the tokens of the vocabulary, given {k}")
    dtype = _compute_dtype(hidden, compute_dtype)
    settings = ChunkSettings(1.0 / layer.temperature, dtype, _chunk_bytes(hidden, chunk_bytes), False, 0.0)
    targets = target_ids.long()[:, None]
    sums = RunningSums(len(hidden), hidden.device, sum_dtype(hidden), with_entropy=False)
    logit = sums.highest.new_zeros(len(hidden), 1)
    values, ids = logit.new_empty(len(hidden), 0), targets.new_empty(len(hidden), 0)
    with torch.autocast(hidden.device.type, enabled=False):
        for start, logits in logit_chunks(hidden, layer.weight, layer.bias, settings):
            gather_into(logit, logits, targets, start)
            own = logits[:, : max(0, last - start)]
            best = own.topk(min(k, own.shape[1]), dim=-1)
            values, ids = torch.cat([values, best.values], 1), torch.cat([ids, best.indices + start], 1)
            if values.shape[1] > k:
                values, order = values.topk(k, dim=-1)
                ids = ids.gather(1, order)
            sums.add(logits)
    log_sum = sums.log_sum()
    return BestTokens(logit[:, 0] - log_sum, ids, values - log_sum[:, None])


class LogprobHead(torch.nn.Module):
    """The output layer [V, H] as a function from hidden states to statistics of tokens.

    It is a module of its own, so that sharded training (ZeRO-3) gathers the weight before its forward pass and again
    before its backward pass.
    """

    def __init__(self, output_layer: torch.nn.Linear, *, temperature: float) -> None:
        super().__init__()
        self.output_layer = output_layer
        self.temperature = temperature

    def forward(
        self,
        hidden: Tensor,
        target_ids: Tensor,
        topk_ids: Tensor | None = None,
        topk_logits: Tensor | None = None,
        *,
        with_entropy: bool = False,
        floor: float = 0.0,
    ) -> TokenStatistics:
        """`token_statistics` of hidden states [N, H]."""
        if (topk_ids is None) != (topk_logits is None):
            raise ValueError("topk_ids and topk_logits: expected both or neither")
        topk = None if topk_ids is None or topk_logits is None else TopKTeacher(topk_ids, topk_logits, floor)
        return token_statistics(hidden, self.layer, target_ids, with_entropy=with_entropy, topk=topk)

    @property
    def layer(self) -> OutputLayer:
        """The layer as a record."""
        return OutputLayer(self.output_layer.weight, self.output_layer.bias, self.temperature)


def use_float32_logits(model: Any) -> None:
    """Have the output layer of a transformers model give float32 logits where it computes in bfloat16 or float16,
    because of its weights or of autocast. An output layer that is no `nn.Linear` is left as it is."""
    layer = model.get_output_embeddings()
    if type(layer) is torch.nn.Linear:
        layer.forward = partial(_float32_logits, layer)  # type: ignore[method-assign]


def _float32_logits(layer: torch.nn.Linear, hidden: Tensor) -> Tensor:
    """[..., V] from hidden states [..., H]."""
    dtype = _compute_dtype(hidden, None)
    if dtype.itemsize >= 4:
        return torch.nn.functional.linear(hidden, layer.weight, layer.bias)
    with torch.autocast(hidden.device.type, enabled=False):
        logits: Tensor = Float32Linear.apply(hidden.flatten(0, -2).to(dtype), layer.weight.to(dtype))
        if layer.bias is not None:
            logits = logits + layer.bias
    return logits.unflatten(0, hidden.shape[:-1])


def _chunk_bytes(hidden: Tensor, given: int | None) -> int:
    return given if given is not None else CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"])


def _compute_dtype(hidden: Tensor, given: torch.dtype | None) -> torch.dtype:
    if given is not None:
        return given
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _check(hidden: Tensor, layer: OutputLayer, target_ids: Tensor) -> None:
    weight, bias, temperature = layer
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden and weight: expected [N, H] and [V, H], given {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if tuple(target_ids.shape) != (len(hidden),):
        raise ValueError(f"target_ids: expected shape [N] = ({len(hidden)},), given {tuple(target_ids.shape)}")
    if bias is not None and tuple(bias.shape) != (len(weight),):
        raise ValueError(f"bias: expected shape [V] = ({len(weight)},), given {tuple(bias.shape)}")
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number above 0, given {temperature}")
    _check_ids("target_ids", target_ids, len(weight))


def _check_topk(topk: TopKTeacher, num_tokens: int, vocabulary: int) -> None:
    ids, logits, floor = topk
    if ids.ndim != 2 or len(ids) != num_tokens or not 1 <= ids.shape[1] <= vocabulary:
        raise ValueError(f"topk_ids: expected shape [N = {num_tokens}, K from 1 to {vocabulary}], given {ids.shape}")
    if ids.shape != logits.shape:
        raise ValueError(f"topk_logits: expected shape {tuple(ids.shape)}, given {tuple(logits.shape)}")
    _check_ids("topk_ids", ids, vocabulary)
    ordered = ids.sort(-1).values
    is_repeated = ordered[:, 1:] == ordered[:, :-1]
    if is_repeated.any():
        token, entry = is_repeated.nonzero()[0].tolist()
        raise ValueError(
            f"topk_ids: expected distinct ids, given {ordered[token, entry].item()} twice at token {token}"
        )
    if not torch.isfinite(logits).all():
        token, entry = (~torch.isfinite(logits)).nonzero()[0].tolist()
        raise ValueError(f"topk_logits: expected finite values, given {logits[token, entry].item()} at token {token}")
    if not -math.inf < floor <= 0.0:
        raise ValueError(f"floor: expected a finite log-probability, at most 0, given {floor}")


def _check_ids(name: str, ids: Tensor, vocabulary: int) -> None:
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"{name}: expected an integer dtype, given {ids.dtype}")
    is_outside = (ids < 0) | (ids >= vocabulary)
    if is_outside.any():
        position = is_outside.nonzero()[0]
        raise ValueError(
            f"{name}: expected ids in [0, V = {vocabulary}), given {ids[tuple(position)].item()} "
            f"at token {position[0].item()}"
        )
