"""Estimators of KL(π_θ ‖ π_T) from the sampled tokens alone, with R = log π_T − log π_θ per token.

    name        value            derivative by log π_θ, and its expectation over o ∼ π_θ
    k1          −R               1        zero, and free of the teacher: no training signal
    k2 (6)      ½ R²             −R       unbiased gradient, biased value
    k3 (7)      e^R − R − 1      1 − e^R  unbiased value, biased gradient (that of the *forward* KL)
    k3_k2grad   e^R − R − 1      −R       unbiased in both (beyond the paper)
    (5)         −ρ sg(R)         −ρ R     k1 as policy gradient, `kl_policy_gradient`: unbiased in both, high variance

"Unbiased" is per token, at the prefixes that were sampled: no estimator here credits a token with the KL of the tokens
that follow it, as the paper's (27) does not. Unbiased on-policy only. Nothing is clamped: e^R overflows float32 at
R > 88, and a clamp would silence exactly the tokens that need the teacher most. The teacher is a constant everywhere.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from kdrl_core.objectives.checks import check_choice, check_num_dims, check_shape

KLEstimator = Literal["k1", "k2", "k3", "k3_k2grad"]


def _k1(log_ratio: Tensor) -> Tensor:
    return -log_ratio


def _k2(log_ratio: Tensor) -> Tensor:
    return 0.5 * log_ratio.square()


def _k3(log_ratio: Tensor) -> Tensor:
    return log_ratio.expm1() - log_ratio


def _k3_k2grad(log_ratio: Tensor) -> Tensor:
    k2 = _k2(log_ratio)
    return _k3(log_ratio).detach() + (k2 - k2.detach())


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": _k1, "k2": _k2, "k3": _k3, "k3_k2grad": _k3_k2grad}


def kl_estimate(student_logprobs: Tensor, teacher_logprobs: Tensor, estimator: KLEstimator | str) -> Tensor:
    """Per-token estimate of KL(student ‖ teacher), (6) and (7); lower is closer to the teacher.

    Args:
        student_logprobs: [B, T] log π_θ of the sampled tokens; the gradient flows here.
        teacher_logprobs: [B, T] log π_T of the same tokens; no gradient.
        estimator: "k1" | "k2" | "k3" | "k3_k2grad", see the module.

    Returns:
        [B, T]. Padding is computed like any token: mask it before (`kdrl_loss` does).

    Raises:
        ValueError: the shapes differ, or an unknown estimator.
    """
    check_choice("estimator", estimator, KL_ESTIMATORS)
    check_num_dims("student_logprobs", student_logprobs, "[B, T]")
    check_shape("teacher_logprobs", teacher_logprobs, student_logprobs.shape, "[B, T]")
    return KL_ESTIMATORS[estimator](teacher_logprobs.detach() - student_logprobs)


def kl_policy_gradient(student_logprobs: Tensor, teacher_logprobs: Tensor, ratio: Tensor | None = None) -> Tensor:
    """Per-token −ρ · sg(R): minimising it maximises KD-RKL (5).

    On-policy its value is k1 and its gradient −R ∇log π_θ; the difference from differentiating k1 is that R is a
    constant here and the gradient comes through the importance ratio.

    Args:
        student_logprobs: [B, T]; the gradient flows through ρ only.
        teacher_logprobs: [B, T]; no gradient.
        ratio: [B, T] ρ = π_θ / π_θold with its gradient; None is on-policy, 1 in value.

    Raises:
        ValueError: the shapes differ.
    """
    check_num_dims("student_logprobs", student_logprobs, "[B, T]")
    check_shape("teacher_logprobs", teacher_logprobs, student_logprobs.shape, "[B, T]")
    if ratio is None:
        ratio = torch.exp(student_logprobs - student_logprobs.detach())
    check_shape("ratio", ratio, student_logprobs.shape, "[B, T]")
    return -ratio * (teacher_logprobs - student_logprobs).detach()
