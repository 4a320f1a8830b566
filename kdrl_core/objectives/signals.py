"""From a step's rewards to what trains: advantages (2) and the weights of distillation (Sec. 3.4), by objective.

grpo, kdrl      Â of the rewards
reward_shaping  Â of the shaped rewards (Sec. 3.1)
kd_rkl, sft     Â = 0
"""

import torch
from torch import Tensor

from kdrl_core.objectives.advantages import group_advantages
from kdrl_core.objectives.inputs import Objective
from kdrl_core.objectives.masking import kd_mask
from kdrl_core.objectives.shaping import shape_rewards


def training_signals(
    objective: Objective,
    rewards: Tensor,
    *,
    student_logprobs: Tensor | None = None,
    teacher_logprobs: Tensor | None = None,
    response_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages [B] and KD weights [B] of a whole step, groups contiguous. No gradient.

    Args:
        objective: of the step, with its group size.
        rewards: [B] outcome rewards.
        student_logprobs, teacher_logprobs, response_mask: [B, T], read only where rewards are shaped.

    Raises:
        ValueError: as `group_advantages`, `kd_mask` and `shape_rewards`.
    """
    variant, size = objective.variant, objective.group_size
    assert size is not None  # the recipe gives it
    advantages, weights, base = torch.zeros_like(rewards), torch.zeros_like(rewards), rewards
    if variant.advantages == "shaped rewards":
        assert student_logprobs is not None
        assert teacher_logprobs is not None
        assert response_mask is not None
        base = shape_rewards(rewards, student_logprobs, teacher_logprobs, response_mask, objective.beta)
    if variant.advantages != "none":
        advantages = group_advantages(base, size, normalize_std=objective.normalize_std)
    if variant.distils:
        weights = kd_mask(rewards, size, objective.kd_masking)
    return advantages, weights
