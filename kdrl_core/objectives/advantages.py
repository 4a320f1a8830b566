"""Group-relative advantages (2): Â_i = (r_i − mean(r)) / (std(r) + ε), mean and std over the G responses to a prompt.

Departures: std is the unbiased one (N − 1) and ε = 1e-6, as in the paper's framework; a group of equal rewards has
Â = 0 exactly, whatever the rounding of its mean.
"""

import torch
from torch import Tensor

from kdrl_core.objectives.checks import as_float, check_finite, check_num_dims
from kdrl_core.objectives.scalars import check_group_size, check_not_negative


def group_advantages(rewards: Tensor, group_size: int, *, normalize_std: bool = True, eps: float = 1e-6) -> Tensor:
    """Â of (2) for each response; higher is better. No gradient.

    Args:
        rewards: [B] r_i, the G responses of a group contiguous.
        group_size: G ≥ 2.
        normalize_std: divide by std + eps; otherwise only the mean is subtracted.
        eps: ε ≥ 0.

    Returns:
        [B] in the dtype of `rewards`, float32 at least (as for integer or half-precision rewards).

    Raises:
        ValueError: `rewards` is not [B] and finite, `group_size` does not divide B or is below 2, or eps < 0.
    """
    check_num_dims("rewards", rewards, "[B]")
    check_group_size(group_size, len(rewards))
    check_not_negative("eps", eps)
    check_finite("rewards", rewards)
    groups = as_float(rewards.detach()).reshape(-1, group_size)
    advantages = groups - groups.mean(1, keepdim=True)
    if normalize_std:
        advantages = advantages / (groups.std(1, keepdim=True) + eps)
    is_constant = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    return torch.where(is_constant, 0.0, advantages).reshape(-1)
