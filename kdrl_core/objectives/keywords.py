"""The joint loss with every value as a keyword argument."""

from dataclasses import fields
from typing import Any

from torch import Tensor

from kdrl_core.objectives.inputs import Objective, Responses, Totals
from kdrl_core.objectives.loss import joint_loss


def kdrl_loss(
    logprobs: Tensor,
    *,
    advantages: Tensor,
    teacher_logprobs: Tensor | None,
    response_mask: Tensor,
    rewards: Tensor | None,
    group_size: int | None,
    beta: float,
    kl_estimator: str = "k2",
    kd_masking: str = "none",
    kd_weights: Tensor | None = None,
    topk: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    clip_low: float | None = None,
    clip_high: float | None = None,
    rollout_logprobs: Tensor | None = None,
    tis_cap: float | None = None,
    ref_logprobs: Tensor | None = None,
    ref_beta: float = 0.0,
    ref_kl_estimator: str = "k3",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    aggregation: str = "token_mean",
    total_tokens: float | Tensor | None = None,
    kd_tokens: float | Tensor | None = None,
    num_groups: float | None = None,
    group_tokens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The joint loss of (8), with every value as a keyword; its gradient is −(27).

    `Responses`, `Objective` and `Totals` have a field of the same name for each argument, with its shape, unit and
    meaning (`total_tokens` is `Totals.tokens`).

    Returns:
        scalar loss, and detached 0-d tensors by the names of `LOSS_METRICS`. With the global counts given, losses and
        metrics of micro-batches add up to those of the whole batch.

    Raises:
        ValueError: as `joint_loss`.
    """
    given = locals()
    totals = Totals(tokens=total_tokens, kd_tokens=kd_tokens, num_groups=num_groups, group_tokens=group_tokens)
    return joint_loss(_pick(Responses, given), _pick(Objective, given), totals)


def _pick(record: Any, given: dict[str, Any]) -> Any:
    return record(**{field.name: given[field.name] for field in fields(record) if field.name in given})
