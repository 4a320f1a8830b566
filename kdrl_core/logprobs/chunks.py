"""Logits a chunk of columns at a time, and running sums over them. Shapes as in chunked.py; C columns of a chunk."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_MIN_COLUMNS = 256
LOWEST = -1e4
"""Logits this far below the highest have probability 0 in every dtype; −∞ would make 0 · ∞ of their share."""


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
        """Add columns [N, C]; their memory is used up."""
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
        """The same sums, to be added to alone."""
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
        logits = operand @ weight[start : start + columns].to(settings.dtype).t()
        if bias is not None:
            logits += bias[start : start + columns].to(settings.dtype)
        logits = logits.to(dtype)
        if settings.scale != 1.0:
            logits *= settings.scale
        yield start, logits
        del logits  # not while the next chunk is computed


def inside_chunk(ids: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Which `ids` are in the chunk, and their column, that of the others being any."""
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
