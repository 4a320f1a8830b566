"""From an optimiser step's plain records to the loss of one micro-batch: what every trainer shares.

The step's global counts come first (`StepTotals`), so that losses, gradients and metrics of micro-batches add up to the
whole step's, however it is cut.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from kdrl_core.errors import EngineError
from kdrl_core.logprobs.batch import PaddedBatch
from kdrl_core.logprobs.chunked import TokenStatistics
from kdrl_core.objectives import kdrl_loss, sft_loss
from kdrl_core.training.protocols import Float32s, TopKTeacher, UpdateBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTotals:
    """Counts over all responses of an optimiser step."""

    tokens: int
    """Response tokens."""
    kd_tokens: int
    """Those of them on which KD acts."""
    group_tokens: Sequence[int] | None
    """[B] the response tokens of each response's group; None unless the mean is taken group by group."""
    num_groups: float | None

    @classmethod
    def of(cls, batch: UpdateBatch) -> Self:
        """Count. Raises ValueError if groups are needed and `group_size` is missing or does not divide B."""
        lengths = np.array([len(sequence.token_ids) for sequence in batch.sequences])
        group_tokens = num_groups = None
        if batch.aggregation == "group_mean":
            size = batch.group_size
            if size is None or len(lengths) % size:
                raise ValueError(f"group_size: expected a divisor of the {len(lengths)} responses, given {size}")
            group_tokens = lengths.reshape(-1, size).sum(1).repeat(size).tolist()
            num_groups = len(lengths) / size
        return cls(
            tokens=int(lengths.sum()),
            kd_tokens=int(lengths[np.asarray(batch.kd_weights) != 0].sum()),
            group_tokens=group_tokens,
            num_groups=num_groups,
        )


def micro_batch_statistics(
    model: Callable[..., TokenStatistics], batch: UpdateBatch, rows: Sequence[int], padded: PaddedBatch
) -> TokenStatistics:
    """What the loss of the responses `rows` needs of the policy: one forward pass of a `LogprobModel` (or its engine).

    Args:
        model: called as `LogprobModel.forward`.
        batch: the whole step.
        rows: which of its responses are in `padded`, in order.
        padded: those responses as tensors.

    Raises:
        ValueError: as `LogprobModel.forward`.
    """
    if batch.topk is None or batch.loss == "sft":
        return model(padded, with_entropy=batch.loss != "sft")
    ids, logprobs = _pad_topk(batch.topk, rows, padded)
    return model(padded, ids, logprobs, with_entropy=True, floor=batch.topk.floor)


def micro_batch_loss(
    statistics: TokenStatistics, batch: UpdateBatch, rows: Sequence[int], padded: PaddedBatch, totals: StepTotals
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of the responses `rows` of a step, to be back-propagated and summed over micro-batches.

    Args:
        statistics: [b, T] of `micro_batch_statistics`, with gradient.
        batch: the whole step.
        rows: which of its responses are in `padded`, in order.
        padded: those responses as tensors.
        totals: `StepTotals.of(batch)`.

    Returns:
        scalar loss; its detached metrics.

    Raises:
        ValueError: as `kdrl_loss` and `sft_loss`.
    """
    logprobs = statistics.logprobs
    device = logprobs.device
    if batch.loss == "sft":
        loss = sft_loss(logprobs, padded.response_mask, total_tokens=totals.tokens)
        return loss, {"loss/total": loss.detach(), "loss/sft": loss.detach()}
    group_tokens = None
    if totals.group_tokens is not None:
        group_tokens = torch.tensor([totals.group_tokens[row] for row in rows], device=device)
    return kdrl_loss(
        logprobs,
        advantages=torch.tensor([batch.advantages[row] for row in rows], device=device),
        teacher_logprobs=_pad_values(batch.teacher_logprobs, rows, padded),
        response_mask=padded.response_mask,
        rewards=None,
        group_size=batch.group_size,
        kd_weights=torch.tensor([batch.kd_weights[row] for row in rows], device=device),
        beta=batch.beta,
        kl_estimator=batch.kl_estimator,
        topk=statistics.topk_kl,
        rollout_logprobs=_pad_values(batch.rollout_logprobs, rows, padded),
        tis_cap=batch.tis_cap,
        ref_logprobs=_pad_values(batch.ref_logprobs, rows, padded),
        ref_beta=batch.ref_beta,
        ref_kl_estimator=batch.ref_kl_estimator,
        entropy=statistics.entropy,
        entropy_coef=batch.entropy_coef,
        aggregation=batch.aggregation,
        total_tokens=totals.tokens,
        kd_tokens=totals.kd_tokens,
        num_groups=totals.num_groups,
        group_tokens=group_tokens,
    )


class TokenRecord:
    """What a trainer finds out about every response token of a step, put together from its micro-batches.

    Args:
        batch: the step, or a rank's share of it.
    """

    def __init__(self, batch: UpdateBatch) -> None:
        empty = np.empty(0, np.float32)
        self.logprobs: list[Float32s] = [empty] * len(batch.sequences)
        """[T_i] a response."""
        self.entropies: list[Float32s] | None = None if batch.loss == "sft" else [empty] * len(batch.sequences)
        """[T_i] a response, in nats; None of SFT, which computes none."""

    def add(self, statistics: TokenStatistics, rows: Sequence[int], padded: PaddedBatch) -> None:
        """Keep what was found out about the responses `rows`, which are in `padded`, in order."""
        mask = padded.response_mask.bool().cpu()
        _scatter(statistics.logprobs, mask, rows, self.logprobs)
        if self.entropies is not None:
            assert statistics.entropy is not None  # micro_batch_statistics
            _scatter(statistics.entropy, mask, rows, self.entropies)


def _scatter(values: torch.Tensor, mask: torch.Tensor, rows: Sequence[int], into: list[Float32s]) -> None:
    """Each row of `values` [b, T], less padding, to its place."""
    found = values.detach().cpu()
    for index, row in enumerate(rows):
        into[row] = found[index][mask[index]].numpy()


def refuse_not_finite(step: int, metrics: Mapping[str, float], grad_norm: float) -> None:
    """Raise EngineError if a step's metrics or gradient norm are not finite; called before anything is changed."""
    if not np.isfinite([grad_norm, *metrics.values()]).all():
        raise EngineError(
            f"step {step}: loss {metrics.get('loss/total')} or gradient norm {grad_norm} is not finite; "
            "training has diverged, lower learning_rate or beta"
        )


def _pad_topk(topk: TopKTeacher, rows: Sequence[int], padded: PaddedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and logprobs [b, T, K] of the Top-K teacher, 0 on padding."""
    width, k = padded.response_ids.shape[1], topk.token_ids[rows[0]].shape[1]
    ids = torch.zeros(len(rows), width, k, dtype=torch.int64)
    logprobs = torch.zeros(len(rows), width, k)
    for index, row in enumerate(rows):
        length = len(topk.token_ids[row])
        ids[index, :length] = torch.from_numpy(topk.token_ids[row])
        logprobs[index, :length] = torch.from_numpy(topk.logprobs[row])
    return ids.to(padded.response_ids.device), logprobs.to(padded.response_ids.device)


def _pad_values(values: Sequence[Float32s] | None, rows: Sequence[int], padded: PaddedBatch) -> Any:
    """Ragged per-token values of `rows` as [b, T] float32, 0 on padding; None stays None."""
    if values is None:
        return None
    result = torch.zeros_like(padded.response_mask)
    for index, row in enumerate(rows):
        result[index, : len(values[row])] = torch.from_numpy(values[row])
    return result
