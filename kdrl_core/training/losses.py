"""From an optimiser step's plain records to the loss of one micro-batch: what every trainer shares.

The step's global counts come first (`totals_of`), so that losses, gradients and metrics of micro-batches add up to the
whole step's, however it is cut.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from kdrl_core.errors import EngineError
from kdrl_core.logprobs.chunked import TokenStatistics
from kdrl_core.logprobs.model import PaddedBatch
from kdrl_core.objectives import Responses, Totals, joint_loss, sft_loss
from kdrl_core.objectives.kinds import AGGREGATIONS
from kdrl_core.training.protocols import Float32s, UpdateBatch


def totals_of(batch: UpdateBatch) -> Totals:
    """Counts over all responses of an optimiser step.

    Raises ValueError if groups are needed and the group size is missing or does not divide B.
    """
    lengths = np.array([len(sequence.token_ids) for sequence in batch.sequences])
    objective, size = batch.objective, batch.objective.group_size
    group_tokens = num_groups = None
    if AGGREGATIONS[objective.aggregation].needs_groups and objective.variant.loss == "joint":
        if size is None or len(lengths) % size:
            raise ValueError(f"group_size: expected a divisor of the {len(lengths)} responses, given {size}")
        group_tokens = lengths.reshape(-1, size).sum(1).repeat(size).tolist()
        num_groups = len(lengths) / size
    return Totals(
        tokens=int(lengths.sum()),
        kd_tokens=int(lengths[np.asarray(batch.kd_weights) != 0].sum()),
        num_groups=num_groups,
        group_tokens=group_tokens,
    )


def micro_batch_statistics(
    model: Callable[..., TokenStatistics], batch: UpdateBatch, rows: Sequence[int], padded: PaddedBatch
) -> TokenStatistics:
    """What the loss of the responses `rows` of a step needs of the policy: one forward pass of a `LogprobModel` (or its
    engine). `padded` has those responses as tensors, in order. Raises ValueError as `LogprobModel.forward`.
    """
    is_joint = batch.objective.variant.loss == "joint"
    if batch.topk_ids is None or not is_joint:
        return model(padded, with_entropy=is_joint)
    ids, logprobs = (_pad(values, rows, padded) for values in (batch.topk_ids, batch.topk_logprobs))
    return model(padded, ids, logprobs, with_entropy=True, floor=batch.objective.topk_floor)


def micro_batch_loss(
    statistics: TokenStatistics, batch: UpdateBatch, rows: Sequence[int], padded: PaddedBatch, totals: Totals
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of the responses `rows` of a step, to be back-propagated and summed over micro-batches; its metrics.

    Args:
        statistics: [b, T] of `micro_batch_statistics`, with gradient.
        padded: the responses `rows` as tensors, in order.
        totals: `totals_of(batch)`.

    Raises:
        ValueError: as `joint_loss` and `sft_loss`.
    """
    if batch.objective.variant.loss == "likelihood":
        loss = sft_loss(statistics.logprobs, padded.response_mask, total_tokens=totals.tokens)
        return loss, {"loss/total": loss.detach(), "loss/sft": loss.detach()}

    def of_rows(values: Sequence[Any]) -> torch.Tensor:
        return torch.tensor([values[row] for row in rows], device=statistics.logprobs.device)

    responses = Responses(
        logprobs=statistics.logprobs,
        response_mask=padded.response_mask,
        advantages=of_rows(batch.advantages),
        kd_weights=of_rows(batch.kd_weights),
        teacher_logprobs=_pad(batch.teacher_logprobs, rows, padded),
        topk=statistics.topk_kl,
        rollout_logprobs=_pad(batch.rollout_logprobs, rows, padded),
        ref_logprobs=_pad(batch.ref_logprobs, rows, padded),
        entropy=statistics.entropy,
    )
    if totals.group_tokens is not None:
        totals = replace(totals, group_tokens=of_rows(cast("Sequence[int]", totals.group_tokens)))
    return joint_loss(responses, batch.objective, totals)


class TokenRecord:
    """What a trainer finds out about every response token of a step, or of a rank's share of it."""

    def __init__(self, batch: UpdateBatch) -> None:
        empty = np.empty(0, np.float32)
        self.logprobs: list[Float32s] = [empty] * len(batch.sequences)
        """[T_i] a response."""
        has_entropies = batch.objective.variant.loss == "joint"
        self.entropies: list[Float32s] | None = [empty] * len(batch.sequences) if has_entropies else None
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


def _pad(values: Sequence[NDArray[Any]] | None, rows: Sequence[int], padded: PaddedBatch) -> torch.Tensor | None:
    """Ragged per-token values [T_i] or [T_i, K] of `rows` as [b, T] or [b, T, K], 0 on padding; None stays None."""
    if values is None:
        return None
    parts = [torch.from_numpy(values[row]) for row in rows]
    kind = torch.float32 if parts[0].is_floating_point() else torch.int64
    result = torch.zeros(*padded.response_mask.shape, *parts[0].shape[1:], dtype=kind)
    for index, part in enumerate(parts):
        result[index, : len(part)] = part
    return result.to(padded.response_mask.device)
