"""Reward shaping (Sec. 3.1): r'_i = r_i + β Σ_t R_{i,t}, with R = log π_T − log π_θ, then GRPO's advantage of r'.

The log-ratios are summed over a response, so a longer one weighs more, and the sum enters *before* group
normalisation. The paper finds that training on it collapses early.
"""

import torch
from torch import Tensor

from kdrl_core.objectives.checks import as_float, as_is_response, check_finite, check_num_dims, check_shape
from kdrl_core.objectives.scalars import check_not_negative


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
