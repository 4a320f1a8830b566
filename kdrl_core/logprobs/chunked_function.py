"""The autograd function behind chunked.py, whose docstring has the equations and the shapes.

It goes through the logits one chunk of C columns at a time and keeps running sums over them.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_MIN_COLUMNS = 256
_CAST_COLUMNS = 8192
"""Columns of a weight that are in memory in float32 at a time, where torch has no such product."""
LOWEST = -1e4
"""Logits this far below the highest have probability 0 in every dtype; −∞ would turn their term into 0 · ∞."""


class ChunkSettings(NamedTuple):
    scale: float
    """1 / T."""
    dtype: torch.dtype
    """Of the matmuls."""
    chunk_bytes: int
    with_entropy: bool
    floor: float


class RunningSums:
    """Σ e^z and Σ e^z z per token, chunk by chunk, both relative to the highest logit so far."""

    def __init__(self, num_tokens: int, device: torch.device, dtype: torch.dtype, *, with_entropy: bool) -> None:
        self.highest = torch.full((num_tokens,), torch.finfo(dtype).min, device=device, dtype=dtype)
        self.total = torch.zeros_like(self.highest)
        """Σ e^(z − highest)."""
        self.weighted = torch.zeros_like(self.highest)
        """Σ e^(z − highest) (z − highest)."""
        self._with_entropy = with_entropy

    def add(self, logits: Tensor) -> None:
        """Add columns [N, C], whose memory is overwritten."""
        highest = torch.maximum(self.highest, logits.amax(1))
        shift = (self.highest - highest).clamp_(min=LOWEST)
        shrink = shift.exp()
        logits = logits.sub_(highest[:, None])
        if self._with_entropy:
            exponentials = logits.exp()
            weighted = torch.linalg.vecdot(exponentials, logits.clamp_(min=LOWEST))
            self.weighted = shrink * (self.weighted + shift * self.total) + weighted
        else:
            exponentials = logits.exp_()
        self.total = shrink * self.total + exponentials.sum(1)
        self.highest = highest

    def clone(self) -> "RunningSums":
        """A copy of the sums; adding to it leaves these as they are."""
        other = RunningSums(0, self.highest.device, self.highest.dtype, with_entropy=self._with_entropy)
        other.highest, other.total, other.weighted = self.highest, self.total, self.weighted
        return other

    def log_sum(self) -> Tensor:
        """log Σ e^z [N]."""
        return self.highest + self.total.log()

    def entropy(self) -> Tensor:
        """[N] in nats."""
        return self.total.log() - self.weighted / self.total


def logit_chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, settings: ChunkSettings
) -> Iterator[tuple[int, Tensor]]:
    """First column and logits / T [N, C] of every chunk, in the dtype of sums; the caller may write to them."""
    dtype = sum_dtype(hidden)
    columns = max(_MIN_COLUMNS, settings.chunk_bytes // (dtype.itemsize * max(1, len(hidden))))
    operand = hidden.to(settings.dtype)
    for start in range(0, len(weight), columns):
        logits = float32_product(operand, weight[start : start + columns].to(settings.dtype).t()).to(dtype)
        if bias is not None:
            logits += bias[start : start + columns]
        if settings.scale != 1.0:
            logits *= settings.scale
        yield start, logits
        del logits  # free the memory before the next chunk is computed


def float32_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of two matrices [N, K] and [K, M], in float32 for bfloat16 and float16; other dtypes stay.

    torch's own product of bfloat16 matrices is rounded to bfloat16: at T = 0.6 that alone moves logprobs by 0.013 nats.
    """
    if left.dtype not in (torch.bfloat16, torch.float16):
        return left @ right
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    left = left.float()  # in float32 the products of such numbers are exact
    parts = [left @ part.float() for part in right.split(_CAST_COLUMNS, dim=1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class Float32Linear(torch.autograd.Function):
    """hidden [N, K] · weightᵀ [K, M] by `float32_product`; gradients have the dtype of the operands."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return float32_product(hidden, weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        gradient = gradient.to(weight.dtype)
        for_hidden, for_weight = ctx.needs_input_grad
        return gradient @ weight if for_hidden else None, gradient.t() @ hidden if for_weight else None


def inside_chunk(ids: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Which `ids` are in the chunk, and the column of each; ids outside of it get any column."""
    position = ids - start
    return (position >= 0) & (position < columns), position.clamp(0, columns - 1)


def gather_into(values: Tensor, logits: Tensor, ids: Tensor, start: int, *, then_fill: float | None = None) -> None:
    """Write the logits of `ids` [N, K] that are in this chunk to `values` [N, K]."""
    where, position = inside_chunk(ids, start, logits.shape[1])
    found = logits.gather(1, position)
    torch.where(where, found, values, out=values)
    if then_fill is not None:
        tokens, entries = where.nonzero(as_tuple=True)
        logits[tokens, position[tokens, entries]] = then_fill


def sum_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


class ChunkedStatistics(torch.autograd.Function):
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
        settings: ChunkSettings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = sum_dtype(hidden)
        sums = RunningSums(len(hidden), hidden.device, dtype, with_entropy=settings.with_entropy or teacher is not None)
        logit = sums.highest.new_zeros(len(hidden), 1)
        topk_logits = None if topk_ids is None else sums.highest.new_zeros(topk_ids.shape)
        for start, logits in logit_chunks(hidden, weight, bias, settings):
            gather_into(logit, logits, targets[:, None], start)
            if topk_ids is not None and topk_logits is not None:
                # The sums leave out the Top-K, so that the rest is not a difference of nearly equal numbers.
                gather_into(topk_logits, logits, topk_ids, start, then_fill=-torch.inf)
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
            inside = (topk_logits - log_sum[:, None]).clamp(min=LOWEST)
            share = (outside_highest - log_sum).exp()  # turns the running sums into probabilities
            above = (outside_highest - log_sum).clamp(min=LOWEST)
            outside_entropy = share * (outside_entropy + above * outside)  # Σ π log π outside
            kl = (inside.exp() * (inside - teacher)).sum(-1) + outside_entropy - settings.floor * share * outside
            # The gradient needs KL + floor, computed here without a difference of nearly equal numbers.
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
        saved, settings = _Saved(*ctx.saved_tensors), ctx.settings
        hidden, weight, bias = saved.hidden, saved.weight, saved.bias
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        slopes = _slopes(saved, settings, *gradients)
        if slopes is None:
            return (None,) * 7
        hidden_grad = torch.zeros(hidden.shape, dtype=saved.log_sum.dtype, device=hidden.device) if for_hidden else None
        weight_grad = torch.empty_like(weight) if for_weight else None
        bias_grad = torch.empty_like(bias) if for_bias and bias is not None else None
        operand = hidden.to(settings.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for start, logits in logit_chunks(hidden, weight, bias, settings):
                columns = slice(start, start + logits.shape[1])
                grad = _logit_gradient(logits, start, saved, slopes)
                del logits
                if bias_grad is not None:
                    bias_grad[columns] = grad.sum(0)
                if grad.dtype != settings.dtype:
                    grad = grad.to(settings.dtype)
                if hidden_grad is not None:
                    _add_matmul(hidden_grad, grad, weight[columns].to(settings.dtype))
                if weight_grad is not None:
                    _write_matmul(weight_grad[columns], grad.t(), operand)
        return (None if hidden_grad is None else hidden_grad.to(hidden.dtype), weight_grad, bias_grad, *(None,) * 4)


class _Saved(NamedTuple):
    """What the forward pass keeps, in its order. Each is a tensor, or None if it was not asked for."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    topk_ids: Tensor | None
    teacher: Any
    log_sum: Tensor
    entropy: Any
    kl: Any
    above_floor: Any


class _Slopes(NamedTuple):
    """∂/∂logit = π (slope · log π + offset). Top-K tokens have their own offset; the target gets `own` in addition."""

    offset: Tensor
    """[N]."""
    slope: Tensor | None
    """[N]."""
    topk_offset: Tensor | None
    """[N, K]."""
    own: Tensor | None
    """[N]."""


def _slopes(
    saved: _Saved, settings: ChunkSettings, own: Tensor | None, on_entropy: Tensor | None, on_kl: Tensor | None
) -> _Slopes | None:
    """Slopes from the gradients of logprobs, entropy and Top-K KL [N]; None without any gradient."""
    on_entropy = on_entropy if settings.with_entropy else None
    on_kl = None if saved.kl is None else on_kl
    if own is None and on_entropy is None and on_kl is None:
        return None
    offset = torch.zeros_like(saved.log_sum)
    slope = topk_offset = None
    if own is not None:
        own = own * settings.scale
        offset = offset - own
    if on_entropy is not None:
        slope = -on_entropy * settings.scale
        offset = offset + slope * saved.entropy
    if on_kl is not None:
        on_kl = on_kl * settings.scale
        slope = on_kl if slope is None else slope + on_kl
        topk_offset = (offset - on_kl * saved.kl)[:, None] - on_kl[:, None] * saved.teacher
        offset = offset - on_kl * saved.above_floor
    return _Slopes(offset, slope, topk_offset, own)


def _logit_gradient(logits: Tensor, start: int, saved: _Saved, slopes: _Slopes) -> Tensor:
    """The gradient of a chunk's logits [N, C], in their memory."""
    offset, slope, topk_offset, own = slopes
    logprobs = logits.sub_(saved.log_sum[:, None])
    if topk_offset is not None and slope is not None and saved.topk_ids is not None:
        where, position = inside_chunk(saved.topk_ids, start, logits.shape[1])
        tokens, entries = where.nonzero(as_tuple=True)
        in_topk = tokens, position[tokens, entries]
        of_topk = logprobs[in_topk].clamp_(min=LOWEST)
        topk_grad = of_topk.exp() * (slope[tokens] * of_topk + topk_offset[tokens, entries])
    if slope is None:
        grad = logprobs.exp_().mul_(offset[:, None])
    else:
        probabilities = logprobs.exp()
        grad = logprobs.clamp_(min=LOWEST).mul_(slope[:, None]).add_(offset[:, None]).mul_(probabilities)
        del probabilities
    if topk_offset is not None:
        grad[in_topk] = topk_grad
    if own is not None:
        where, at = inside_chunk(saved.targets[:, None], start, grad.shape[1])
        grad.scatter_add_(1, at, torch.where(where, own[:, None].to(grad.dtype), 0.0))
    return grad


def _add_matmul(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _write_matmul(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out = left @ right."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)
