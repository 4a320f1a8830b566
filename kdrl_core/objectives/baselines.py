"""The paper's baselines that no flag of `kdrl_loss` gives (Sec. 2, B.2).

    SFT (14)     −(1/N) Σ_i (1/|o_i|) Σ_t log π_θ(o_{i,t}), o ∼ π_T, N responses: forward KL up to a constant (3)
    KD-RKL (5)   −(1/Σ|o_i|) Σ_i Σ_t ρ_{i,t} sg(R_{i,t}), o ∼ π_θ

SFT is length-normalised: each response weighs the same, whatever its length. On request each token does
("token_mean"), as in the other objectives. For responses of one length both are the same.
KD-RKL as the paper trains it (B.2) is `kdrl_loss` with zero advantages: with "k1" it is `kd_rkl_loss` times β.
"""

import torch
from torch import Tensor

from kdrl_core.objectives.checks import as_float, as_is_response, check_finite, check_num_dims, check_shape
from kdrl_core.objectives.inputs import Totals, check_choice, check_positive
from kdrl_core.objectives.kinds import SFT_AGGREGATIONS
from kdrl_core.objectives.kl import kl_policy_gradient
from kdrl_core.objectives.loss import group_mean, token_mean


def sft_loss(
    logprobs: Tensor,
    response_mask: Tensor,
    *,
    aggregation: str = "response_mean",
    totals: Totals | None = None,
) -> Tensor:
    """Negative log-likelihood of the teacher's responses (14), a scalar, minimised.

    Args:
        logprobs: [B, T] log π_θ of the teacher's tokens; the gradient flows here. Padding may hold anything.
        response_mask: [B, T], 1 on response tokens.
        aggregation: "response_mean", the mean over responses of each response's mean (14), or "token_mean".
        totals: for micro-batches; its `responses` count with "response_mean", its `tokens` with "token_mean".

    Raises:
        ValueError: `aggregation` is neither, `totals.responses` is not a positive number, or as `token_mean`.
    """
    check_num_dims("logprobs", logprobs, "[B, T]")
    check_choice("aggregation", aggregation, SFT_AGGREGATIONS)
    totals = totals or Totals()
    if aggregation == "token_mean":
        return -token_mean(logprobs, response_mask, total_tokens=totals.tokens)
    lengths = as_is_response(response_mask, logprobs.shape).sum(1)
    num_responses = len(lengths) if totals.responses is None else totals.responses
    check_positive("totals.responses", num_responses)
    return -group_mean(logprobs, response_mask, num_groups=num_responses, group_tokens=lengths)  # groups of one


def kd_rkl_loss(
    logprobs: Tensor,
    teacher_logprobs: Tensor,
    response_mask: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    total_tokens: float | Tensor | None = None,
) -> Tensor:
    """KD-RKL as policy gradient (5), a scalar, minimised; on-policy its gradient is −mean[R ∇log π_θ].

    Args:
        logprobs: [B, T] log π_θ of the sampled tokens; the gradient flows here, through ρ.
        teacher_logprobs: [B, T] log π_T; no gradient.
        response_mask: [B, T], 1 on response tokens; padding may hold anything.
        old_logprobs: [B, T] log π_θold; None is strictly on-policy.
        total_tokens: response tokens of the whole optimiser step, for micro-batches.

    Raises:
        ValueError: shapes differ, or a constant logprob of a response token is not finite.
    """
    check_num_dims("logprobs", logprobs, "[B, T]")
    is_response = as_is_response(response_mask, logprobs.shape)
    student = torch.where(is_response, as_float(logprobs), 0.0)
    old = student.detach()
    check_shape("teacher_logprobs", teacher_logprobs, logprobs.shape, "[B, T]")
    check_finite("teacher_logprobs", teacher_logprobs, is_response)
    if old_logprobs is not None:
        check_shape("old_logprobs", old_logprobs, logprobs.shape, "[B, T]")
        check_finite("old_logprobs", old_logprobs, is_response)
        old = torch.where(is_response, as_float(old_logprobs), 0.0).detach()
    teacher = torch.where(is_response, teacher_logprobs, 0.0)
    kl = kl_policy_gradient(student, teacher, torch.exp(student - old))
    return token_mean(kl, is_response, total_tokens=total_tokens)
