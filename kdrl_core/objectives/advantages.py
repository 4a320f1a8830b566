"""Training signals from a step's rewards: advantages (2), shaped rewards (Sec. 3.1), distillation weights (Sec. 3.4).

Advantages (2): Â_i = (r_i − mean(r)) / (std(r) + ε), mean and std over the G responses to a prompt. Departures: std is
the unbiased one (N − 1) and ε = 1e-6, as in the paper's framework; a group of equal rewards has Â = 0 exactly, whatever
the rounding of its mean.

Reward shaping (3.1): r'_i = r_i + β Σ_t R_{i,t}, with R = log π_T − log π_θ, then Â of r'. The log-ratios are summed
over a response, so a longer one weighs more, and the sum enters *before* group normalisation. The paper finds that
training on it collapses early.

Reward-guided masking (3.4) says where the teacher's signal applies:

    none      R' = R
    response  R' = 1[r_i = 0] · R                    the response failed
    group     R' = 1[r_j = 0 for all j in the group] · R   every response to the prompt failed: there Â = 0

R' multiplies R and nothing else: the denominator Σ|o_i| of the objective still counts every response token.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdrl_core.objectives.checks import as_float, as_is_response, check_finite, check_num_dims, check_shape
from kdrl_core.objectives.inputs import Objective, check_choice, check_group_size, check_not_negative
from kdrl_core.objectives.kinds import MASKINGS


def group_advantages(rewards: Tensor, group_size: int, *, normalize_std: bool = True, eps: float = 1e-6) -> Tensor:
    """Â of (2) for each response; higher is better. No gradient.

    Args:
        rewards: [B] r_i, the G responses of a group contiguous.
        group_size: G ≥ 2.
        normalize_std: divide by std + eps; otherwise only the mean is subtracted.
        eps: ε ≥ 0.

    Returns:
        [B] in the dtype of `rewards`, float32 at least (for integer or half-precision rewards).

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


def shape_rewards(
    rewards: Tensor, student_logprobs: Tensor, teacher_logprobs: Tensor, response_mask: Tensor, beta: float
) -> Tensor:
    """Shaped rewards r' (Sec. 3.1), for `group_advantages`. No gradient.

    Args:
        rewards: [B] outcome rewards.
        student_logprobs: [B, T] log π_θ of the sampled tokens.
        teacher_logprobs: [B, T] log π_T of the same tokens.
        response_mask: [B, T], 1 on response tokens; padding may hold anything.
        beta: β ≥ 0.

    Returns:
        [B], float32 at least.

    Raises:
        ValueError: shapes do not match, β is negative, or a logprob of a response token or a reward is not finite.
    """
    check_not_negative("beta", beta)
    check_num_dims("student_logprobs", student_logprobs, "[B, T]")
    check_shape("teacher_logprobs", teacher_logprobs, student_logprobs.shape, "[B, T]")
    check_shape("rewards", rewards, student_logprobs.shape[:1], "[B]")
    is_response = as_is_response(response_mask, student_logprobs.shape)
    check_finite("rewards", rewards)
    check_finite("student_logprobs", student_logprobs, is_response)
    check_finite("teacher_logprobs", teacher_logprobs, is_response)
    log_ratio = as_float(teacher_logprobs.detach()) - as_float(student_logprobs.detach())
    return as_float(rewards.detach()) + beta * torch.where(is_response, log_ratio, 0.0).sum(1)


KD_MASKINGS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "none": lambda has_failed, group_size: torch.ones_like(has_failed),
    "response": lambda has_failed, group_size: has_failed,
    "group": lambda has_failed, group_size: has_failed.reshape(-1, group_size).all(1).repeat_interleave(group_size),
}
"""From [B] "the response failed", and G, to [B] "KD applies"."""
assert KD_MASKINGS.keys() == MASKINGS.keys()


def kd_mask(rewards: Tensor, group_size: int, level: str) -> Tensor:
    """1 where KD applies, 0 where it does not (Sec. 3.4). No gradient.

    Args:
        rewards: [B] outcome rewards r_i, groups contiguous; failed means exactly 0.
        group_size: G ≥ 2.
        level: "none" | "response" | "group".

    Returns:
        [B] in the dtype of `rewards`, float32 at least (for integer or half-precision rewards).

    Raises:
        ValueError: unknown level, `rewards` is not [B] and finite, `group_size` does not divide B or is below 2.
    """
    check_choice("level", level, KD_MASKINGS)
    check_num_dims("rewards", rewards, "[B]")
    check_group_size(group_size, len(rewards))
    check_finite("rewards", rewards)
    rewards = as_float(rewards.detach())
    return KD_MASKINGS[level](rewards == 0, group_size).to(rewards.dtype)


def training_signals(
    objective: Objective,
    rewards: Tensor,
    *,
    outcomes: Tensor | None = None,
    student_logprobs: Tensor | None = None,
    teacher_logprobs: Tensor | None = None,
    response_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages [B] and KD weights [B] of a whole step, groups contiguous. No gradient.

    Advantages are those of the rewards (grpo, kdrl), of the shaped rewards (reward_shaping), or 0 (kd_rkl, sft).

    Args:
        objective: of the step, with its group size.
        rewards: [B] outcome rewards.
        outcomes: [B], 0 where a response failed, for the masks; None: the rewards themselves.
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
        weights = kd_mask(rewards if outcomes is None else outcomes, size, objective.kd_masking)
    return advantages, weights
