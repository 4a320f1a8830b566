"""Logprobs, entropy and Top-K KL of tokens from hidden states, without their logits [N, V].

    z = (h Wᵀ + b) / T,  log π = z − log Σ_v e^z,  H = −Σ_v π log π,
    KL = Σ_v π (log π − log π'_T),  log π'_T as in `kdrl_core.objectives.topk`

The forward pass goes through the vocabulary in chunks of columns and keeps three running sums per token, relative to
the highest logit so far (Σ e^z, Σ e^z z, and the same outside the Top-K). The backward pass computes each chunk's
logits again: with l = log π_v and the gradients g, g_H, g_K of the three results,

    ∂/∂z_v = g (1[v = target] − π_v) − g_H π_v (l + H) + g_K π_v (l − log π'_T(v) − KL)

Chunks of columns rather than of tokens: each row of ∂/∂W is one matmul over all tokens, written once to its place. It
is never read back and added to, so that it needs no float32 copy when the weight is bfloat16.

Shapes: N tokens (response tokens only, packed), H hidden size, V vocabulary, K teacher tokens.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 32 * 2**20
"""Default size of one chunk's logits; about three tensors of this size live at a time."""
_MIN_COLUMNS = 256
_LOWEST = -1e4
"""Logits this far below the highest have probability 0 in every dtype; −∞ would make 0 · ∞ of their share."""


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
    weight: Tensor,
    target_ids: Tensor,
    *,
    temperature: float,
    bias: Tensor | None = None,
    with_entropy: bool = False,
    topk_ids: Tensor | None = None,
    topk_logits: Tensor | None = None,
    floor: float = 0.0,
    compute_dtype: torch.dtype | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> TokenStatistics:
    """Logprobs of `target_ids` under softmax((hidden Wᵀ + bias) / temperature), on request entropy and Top-K KL.

    Memory beyond inputs and gradients is a few chunks and a few numbers per token, whatever V. The gradient flows to
    `hidden`, `weight` and `bias`, as far as they ask for it, and comes in the dtype of each. It can be taken once.

    Args:
        hidden: [N, H] last hidden states, those that predict the targets.
        weight: [V, H] of the output layer.
        target_ids: [N] integers in [0, V).
        temperature: T > 0.
        bias: [V] of the output layer.
        with_entropy: compute the entropy as well.
        topk_ids: [N, K] the teacher's K best tokens, distinct, for the Top-K KL.
        topk_logits: [N, K] their logits (or logprobs) / T, finite; no gradient.
        floor: log-probability of every other token, finite and ≤ 0.
        compute_dtype: of the matmuls, whose sums are float32 inside; weights are cast chunk by chunk. None: that of
            autocast where it is on, else that of `hidden`. Everything after a matmul is float32 at least.
        chunk_bytes: bound on one chunk's float32 logits (256 columns at least).

    Returns:
        [N] per token; `entropy` or `topk_kl` is None where not asked for.

    Raises:
        ValueError: shapes do not match, a target or a Top-K id is outside [0, V), a Top-K id is repeated, or its logit
            is not finite.
    """
    _check(hidden, weight, target_ids, bias, temperature)
    if (topk_ids is None) != (topk_logits is None):
        raise ValueError("topk_ids and topk_logits: expected both or neither")
    teacher = None
    if topk_ids is not None and topk_logits is not None:
        _check_topk(topk_ids, topk_logits, len(hidden), len(weight))
        if not -math.inf < floor <= 0.0:
            raise ValueError(f"floor: expected a finite log-probability, at most 0, given {floor}")
        topk_ids = topk_ids.long()
        teacher = topk_logits.detach().to(_sum_dtype(hidden)).log_softmax(-1)
    dtype = _compute_dtype(hidden, compute_dtype)
    settings = _Settings(1.0 / temperature, dtype, chunk_bytes, with_entropy, floor)
    with torch.autocast(hidden.device.type, enabled=False):  # it would round the sums as well
        found = _TokenStatistics.apply(hidden, weight, bias, target_ids.long(), topk_ids, teacher, settings)
    logprobs, entropy, kl = found
    return TokenStatistics(logprobs, entropy if with_entropy else None, None if teacher is None else kl)


@torch.no_grad()
def best_tokens(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    k: int,
    *,
    temperature: float,
    bias: Tensor | None = None,
    num_tokens: int | None = None,
    compute_dtype: torch.dtype | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> BestTokens:
    """Logprobs of `target_ids` and of the `k` likeliest tokens, the softmax taken over the whole vocabulary.

    Args:
        hidden, weight, target_ids, temperature, bias, compute_dtype, chunk_bytes: as in `token_statistics`.
        k: tokens to keep, at most `num_tokens`.
        num_tokens: ids from here on are padding of the embedding, never among the best; None: none are.

    Raises:
        ValueError: shapes do not match, a target is outside [0, V), or `k` is above the number of tokens.
    """
    _check(hidden, weight, target_ids, bias, temperature)
    last = len(weight) if num_tokens is None else min(num_tokens, len(weight))
    if not 1 <= k <= last:
        raise ValueError(f"k: expected 1 to {last}, the tokens of the vocabulary, given {k}")
    settings = _Settings(1.0 / temperature, _compute_dtype(hidden, compute_dtype), chunk_bytes, False, 0.0)
    targets = target_ids.long()[:, None]
    sums = _Sums(len(hidden), hidden.device, _sum_dtype(hidden), with_entropy=False)
    logit = sums.highest.new_zeros(len(hidden), 1)
    values, ids = logit.new_empty(len(hidden), 0), targets.new_empty(len(hidden), 0)
    with torch.autocast(hidden.device.type, enabled=False):
        for start, logits in _logit_chunks(hidden, weight, bias, settings):
            _gather_into(logit, logits, targets, start)
            own = logits[:, : max(0, last - start)]
            best = own.topk(min(k, own.shape[1]), dim=-1)
            values, ids = torch.cat([values, best.values], 1), torch.cat([ids, best.indices + start], 1)
            if values.shape[1] > k:
                values, order = values.topk(k, dim=-1)
                ids = ids.gather(1, order)
            sums.add(logits)
    log_sum = sums.log_sum()
    return BestTokens(logit[:, 0] - log_sum, ids, values - log_sum[:, None])


class _Settings(NamedTuple):
    scale: float
    """1 / T."""
    dtype: torch.dtype
    """Of the matmuls."""
    chunk_bytes: int
    with_entropy: bool
    floor: float


class _TokenStatistics(torch.autograd.Function):
    """Logprobs, entropy and Top-K KL [N]; the latter two are empty tensors where not asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        topk_ids: Tensor | None,
        teacher: Tensor | None,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = _sum_dtype(hidden)
        sums = _Sums(len(hidden), hidden.device, dtype, with_entropy=settings.with_entropy or teacher is not None)
        logit = sums.highest.new_zeros(len(hidden), 1)
        topk_logits = None if topk_ids is None else sums.highest.new_zeros(topk_ids.shape)
        for start, logits in _logit_chunks(hidden, weight, bias, settings):
            _gather_into(logit, logits, targets[:, None], start)
            if topk_ids is not None and topk_logits is not None:
                # The Top-K leaves the sums: what is outside must not be a difference of nearly equal numbers.
                _gather_into(topk_logits, logits, topk_ids, start, then_fill=-math.inf)
            sums.add(logits)
        kl = above_floor = None
        if teacher is None or topk_logits is None:
            log_sum = sums.log_sum()
            entropy = sums.entropy() if settings.with_entropy else None
        else:
            outside, outside_entropy = sums.total, sums.weighted
            outside_highest = sums.highest
            sums = sums.clone()
            sums.add(topk_logits.clone())
            log_sum, entropy = sums.log_sum(), sums.entropy()
            inside = (topk_logits - log_sum[:, None]).clamp(min=_LOWEST)
            share = (outside_highest - log_sum).exp()  # of the running sums in the whole
            above = (outside_highest - log_sum).clamp(min=_LOWEST)
            outside_entropy = share * (outside_entropy + above * outside)  # Σ π log π outside
            kl = (inside.exp() * (inside - teacher)).sum(-1) + outside_entropy - settings.floor * share * outside
            # KL + floor, which the gradient needs: not a difference of nearly equal numbers.
            above_floor = (inside.exp() * (inside - teacher + settings.floor)).sum(-1) + outside_entropy
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets, topk_ids, teacher, log_sum, entropy, kl, above_floor)
        return (
            logit[:, 0] - log_sum,
            entropy if settings.with_entropy and entropy is not None else log_sum.new_empty(0),
            log_sum.new_empty(0) if kl is None else kl,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, topk_ids, teacher, log_sum, entropy, kl, above_floor = ctx.saved_tensors
        settings: _Settings = ctx.settings
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        nothing = (None,) * 7
        own, on_entropy, on_kl = gradients
        on_entropy = on_entropy if settings.with_entropy else None
        on_kl = None if kl is None else on_kl
        if own is None and on_entropy is None and on_kl is None:
            return nothing
        # ∂/∂logit = π (slope · log π + offset); in the Top-K another offset; and what the target adds
        scale = settings.scale
        offset = torch.zeros_like(log_sum)
        slope = None
        if own is not None:
            own = own * scale
            offset = offset - own
        if on_entropy is not None:
            slope = -on_entropy * scale
            offset = offset + slope * entropy
        topk_offset = None
        if on_kl is not None:
            on_kl = on_kl * scale
            slope = on_kl if slope is None else slope + on_kl
            topk_offset = (offset - on_kl * kl)[:, None] - on_kl[:, None] * teacher
            offset = offset - on_kl * above_floor
        hidden_grad = torch.zeros(hidden.shape, dtype=log_sum.dtype, device=hidden.device) if for_hidden else None
        weight_grad = torch.empty_like(weight) if for_weight else None
        bias_grad = torch.empty_like(bias) if for_bias else None
        operand = hidden.to(settings.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for start, logits in _logit_chunks(hidden, weight, bias, settings):
                columns = slice(start, start + logits.shape[1])
                logprobs = logits.sub_(log_sum[:, None])
                if topk_offset is not None and slope is not None:
                    where, position = _inside(topk_ids, start, logits.shape[1])
                    tokens, entries = where.nonzero(as_tuple=True)
                    in_topk = tokens, position[tokens, entries]
                    of_topk = logprobs[in_topk].clamp_(min=_LOWEST)
                    topk_grad = of_topk.exp() * (slope[tokens] * of_topk + topk_offset[tokens, entries])
                if slope is None:
                    grad = logprobs.exp_().mul_(offset[:, None])
                else:
                    probabilities = logprobs.exp()
                    grad = logprobs.clamp_(min=_LOWEST).mul_(slope[:, None]).add_(offset[:, None]).mul_(probabilities)
                    del probabilities
                if topk_offset is not None:
                    grad[in_topk] = topk_grad
                if own is not None:
                    where, at = _inside(targets[:, None], start, grad.shape[1])
                    grad.scatter_add_(1, at, torch.where(where, own[:, None].to(grad.dtype), 0.0))
                del logits, logprobs
                if bias_grad is not None:
                    bias_grad[columns] = grad.sum(0)
                if grad.dtype != settings.dtype:
                    grad = grad.to(settings.dtype)
                if hidden_grad is not None:
                    rows = weight[columns].to(settings.dtype)
                    if grad.dtype == hidden_grad.dtype:
                        hidden_grad.addmm_(grad, rows)
                    else:
                        hidden_grad += grad @ rows
                if weight_grad is not None:
                    if weight_grad.dtype == grad.dtype:
                        torch.mm(grad.t(), operand, out=weight_grad[columns])
                    else:
                        weight_grad[columns] = grad.t() @ operand
        return (None if hidden_grad is None else hidden_grad.to(hidden.dtype), weight_grad, bias_grad, *nothing[3:])


class _Sums:
    """Σ e^z and Σ e^z z per token, chunk by chunk, both relative to the highest logit so far."""

    def __init__(self, num_tokens: int, device: torch.device, dtype: torch.dtype, *, with_entropy: bool) -> None:
        self.highest = torch.full((num_tokens,), torch.finfo(dtype).min, device=device, dtype=dtype)
        self.total = torch.zeros_like(self.highest)
        """Σ e^(z − highest)."""
        self.weighted = torch.zeros_like(self.highest)
        """Σ e^(z − highest) (z − highest)."""
        self._with_entropy = with_entropy

    def add(self, logits: Tensor) -> None:
        """Add columns [N, C]; their memory is used up."""
        highest = torch.maximum(self.highest, logits.amax(1))
        shift = (self.highest - highest).clamp_(min=_LOWEST)
        shrink = shift.exp()
        logits = logits.sub_(highest[:, None])
        if self._with_entropy:
            exponentials = logits.exp()
            weighted = torch.linalg.vecdot(exponentials, logits.clamp_(min=_LOWEST))
            self.weighted = shrink * (self.weighted + shift * self.total) + weighted
        else:
            exponentials = logits.exp_()
        self.total = shrink * self.total + exponentials.sum(1)
        self.highest = highest

    def clone(self) -> "_Sums":
        """The same sums, to be added to alone."""
        other = _Sums(0, self.highest.device, self.highest.dtype, with_entropy=self._with_entropy)
        other.highest, other.total, other.weighted = self.highest, self.total, self.weighted
        return other

    def log_sum(self) -> Tensor:
        """log Σ e^z [N]."""
        return self.highest + self.total.log()

    def entropy(self) -> Tensor:
        """[N] in nats."""
        return self.total.log() - self.weighted / self.total


def _logit_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, settings: _Settings
) -> Iterator[tuple[int, Tensor]]:
    """First column and logits / T [N, C] of every chunk, in the dtype of sums; the caller may write to them."""
    dtype = _sum_dtype(hidden)
    columns = max(_MIN_COLUMNS, settings.chunk_bytes // (dtype.itemsize * max(1, len(hidden))))
    operand = hidden.to(settings.dtype)
    for start in range(0, len(weight), columns):
        logits = operand @ weight[start : start + columns].to(settings.dtype).t()
        if bias is not None:
            logits += bias[start : start + columns].to(settings.dtype)
        logits = logits.to(dtype)
        if settings.scale != 1.0:
            logits *= settings.scale
        yield start, logits
        del logits  # not while the next chunk is computed


def _inside(ids: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Which `ids` are in the chunk, and their column, that of the others being any."""
    position = ids - start
    return (position >= 0) & (position < columns), position.clamp(0, columns - 1)


def _gather_into(values: Tensor, logits: Tensor, ids: Tensor, start: int, *, then_fill: float | None = None) -> None:
    """Write the logits of `ids` [N, K] that are in this chunk to `values` [N, K]."""
    where, position = _inside(ids, start, logits.shape[1])
    found = logits.gather(1, position)
    torch.where(where, found, values, out=values)
    if then_fill is not None:
        tokens, entries = where.nonzero(as_tuple=True)
        logits[tokens, position[tokens, entries]] = then_fill


def _sum_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _compute_dtype(hidden: Tensor, given: torch.dtype | None) -> torch.dtype:
    if given is not None:
        return given
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _check(hidden: Tensor, weight: Tensor, target_ids: Tensor, bias: Tensor | None, temperature: float) -> None:
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


def _check_topk(ids: Tensor, logits: Tensor, num_tokens: int, vocabulary: int) -> None:
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
