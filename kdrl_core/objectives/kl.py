"""Estimators of KL(π_θ ‖ π_T) from the sampled tokens alone, with R = log π_T − log π_θ per token.

    name        value            gradient by log π_θ, and their expectations over o ∼ π_θ
    k1 (5)      −R               −R       unbiased in both, widely spread value; the policy gradient (19), R ∇log π_θ
    k2 (6)      ½ R²             −R       unbiased gradient, biased value
    k3 (7)      e^R − R − 1      1 − e^R  unbiased value, biased gradient (that of the *forward* KL)
    k3_k2grad   e^R − R − 1      −R       unbiased in both (beyond the paper)

k1's gradient is not the derivative of its value: ∂(−R)/∂log π_θ = 1 is independent of the teacher and 0 in expectation,
so it is unused. Off-policy k1 is −ρ sg(R), `kl_policy_gradient`; the others are unbiased on-policy only, and the joint
loss weighs them by ρ.

"Unbiased" is per token, at the prefixes that were sampled: like the paper's (27), no estimator here credits a token
with the KL of later tokens. Given log-probabilities summed over the response ([B, 1]), the same functions estimate the
KL of whole sequences, later tokens included.

Nothing is clamped: e^R overflows float32 at R > 88, and a clamp would silence exactly the tokens that need the teacher
most. If R is not finite, the value shows it and the gradient is 0, so that a mask can follow (0 · ∞ would be NaN). The
teacher is a constant everywhere.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdrl_core.objectives.checks import as_float, check_num_dims, check_shape
from kdrl_core.objectives.inputs import check_choice
from kdrl_core.objectives.kinds import ESTIMATORS, Estimator
from kdrl_core.objectives.plugins import faults_told, is_reference, parse_reference

KLFunction = Callable[[Tensor], Tensor]
"""From R [B, T], with its gradient, to the estimate of each token [B, T]."""


def _k3(log_ratio: Tensor) -> Tensor:
    e_r_minus_1: Tensor = _MaskableExpm1.apply(log_ratio)
    return e_r_minus_1 - log_ratio


def _gradient_of_k2(log_ratio: Tensor) -> Tensor:
    """The value is 0."""
    return log_ratio.detach() * (log_ratio - log_ratio.detach())


class _MaskableExpm1(torch.autograd.Function):
    """e^x − 1. Its gradient stays 0 where a mask has made it 0, even if e^x has overflowed (0 · ∞ would be NaN)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.expm1()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where(gradient == 0, 0.0, gradient * x.exp())


def _stop_gradient_unless(condition: Tensor, values: Tensor) -> Tensor:
    return torch.where(condition, values, values.detach())


KL_ESTIMATORS: dict[str, KLFunction] = {
    "k1": lambda log_ratio: -log_ratio.detach() + _gradient_of_k2(log_ratio),
    "k2": lambda log_ratio: 0.5 * log_ratio.square(),
    "k3": _k3,
    "k3_k2grad": lambda log_ratio: _k3(log_ratio).detach() + _gradient_of_k2(log_ratio),
}
"""The functions of those in `ESTIMATORS` that use the sampled tokens alone."""
_OWN = tuple(ESTIMATORS)
assert KL_ESTIMATORS.keys() == {name for name, row in ESTIMATORS.items() if not row.needs_topk}


def register_estimator(name: str, function: KLFunction, expectation: str | KLFunction | None = None) -> None:
    """Add an estimator. From now on `name` is a legal `kl_estimator`, in recipes as in every function here.

    In a recipe, `kl_estimator: "file.py:name"` needs no registration and works with every trainer. A registered name is
    known to this process alone: the `torch` trainer has it, the ranks of the `deepspeed` trainer do not.

    Args:
        name: a new name, without a colon; one that was registered before is replaced.
        function: from R = log π_T − log π_θ, [B, T] with its gradient, to the estimate of each token [B, T]. Its
            derivative trains the student. Where R is not finite, no gradient flows into it.
        expectation: what update.parquet records in its place, an estimator's name or a function of the same kind. Give
            it if `function` has the gradient that you want, but its values are not a KL.

    Raises:
        TypeError: `function` or `expectation` cannot be called.
        ValueError: the name is empty, has a colon, or is one of kdrl's own; or no estimator has the name `expectation`.
    """
    if name in _OWN or not name or is_reference(name):
        raise ValueError(f"name: expected a new name without a colon, given {name!r}; kdrl has {', '.join(_OWN)}")
    _add(name, function, expectation, is_local=True)


def check_estimator(argument: str, name: str, *, with_topk: bool = False) -> None:
    """`name` is an estimator. One that is named as `file.py:name` is loaded first, at its first use in the process.

    Raises:
        ValueError: no such estimator.
        RecipeError: its file or module cannot be loaded.
    """
    if name not in _OWN and is_reference(name):
        function = parse_reference(name).load()
        if function is not KL_ESTIMATORS.get(name):
            _add(name, function)
    check_choice(argument, name, ESTIMATORS if with_topk else KL_ESTIMATORS)


def _add(name: str, function: KLFunction, expectation: str | KLFunction | None = None, **facts: bool) -> None:
    if not callable(function):
        raise TypeError(f"function: expected a function of log-ratios, given {function!r:.50}")
    if isinstance(expectation, str):
        check_estimator("expectation", expectation)
    elif expectation is not None and not callable(expectation):
        raise TypeError(f"expectation: expected an estimator's name or a function, given {expectation!r:.50}")
    KL_ESTIMATORS[name] = function
    ESTIMATORS[name] = Estimator(expectation=expectation, is_for_reference=True, **facts)


def kl_estimate(student_logprobs: Tensor, teacher_logprobs: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(student ‖ teacher), (5) to (7); lower is closer to the teacher.

    Args:
        student_logprobs: [B, T] log π_θ of the sampled tokens; the gradient flows here.
        teacher_logprobs: [B, T] log π_T of the same tokens; no gradient.
        estimator: "k1" | "k2" | "k3" | "k3_k2grad", see the module, or one of `register_estimator`.

    Returns:
        [B, T], float32 at least. Padding is computed like any token: mask it afterwards by `token_mean`, or use
        `kdrl_loss`. The gradient then ignores padding that is not finite.

    Raises:
        ValueError: the shapes differ, an unknown estimator, or one that returns another shape.
        RecipeError: an estimator that is named as `file.py:name` cannot be loaded, raises, or returns another shape.
    """
    check_estimator("estimator", estimator)
    return _estimate(KL_ESTIMATORS[estimator], student_logprobs, teacher_logprobs, name=estimator)


def recorded_kl(student_logprobs: Tensor, teacher_logprobs: Tensor, estimator: str) -> Tensor:
    """Per-token KL [B, T] as update.parquet records it and `kdrl rollouts show` prints it.

    These are the values that the loss uses, or those of the estimator's `expectation`: k3's for k3_k2grad, and k2's for
    Top-K, which needs the whole vocabulary. No gradient. Arguments and errors as `kl_estimate`; "topk" is allowed.
    """
    check_estimator("estimator", estimator, with_topk=True)
    expectation = ESTIMATORS[estimator].expectation or estimator
    function = KL_ESTIMATORS[expectation] if isinstance(expectation, str) else expectation
    return _estimate(function, student_logprobs.detach(), teacher_logprobs, name=estimator)


def _estimate(function: KLFunction, student_logprobs: Tensor, teacher_logprobs: Tensor, *, name: str) -> Tensor:
    log_ratio = _log_ratio(student_logprobs, teacher_logprobs)
    with faults_told(name):
        kl = function(_stop_gradient_unless(log_ratio.isfinite(), log_ratio))
        check_shape("what the KL estimator returns", kl, log_ratio.shape, "[B, T]")
    return kl


def kl_policy_gradient(student_logprobs: Tensor, teacher_logprobs: Tensor, ratio: Tensor | None = None) -> Tensor:
    """Per-token −ρ · sg(R): minimising it maximises KD-RKL (5).

    Args:
        student_logprobs: [B, T]; the gradient flows through ρ only.
        teacher_logprobs: [B, T]; no gradient.
        ratio: [B, T] ρ = π_θ / π_θold with its gradient; None is on-policy (ρ = 1): k1 of `kl_estimate`.

    Returns:
        [B, T], float32 at least; padding as in `kl_estimate`.

    Raises:
        ValueError: the shapes differ.
    """
    if ratio is None:
        return kl_estimate(student_logprobs, teacher_logprobs, "k1")
    log_ratio = _log_ratio(student_logprobs, teacher_logprobs).detach()
    check_shape("ratio", ratio, log_ratio.shape, "[B, T]")
    return -_stop_gradient_unless(log_ratio.isfinite(), ratio) * log_ratio


def _log_ratio(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    check_num_dims("student_logprobs", student_logprobs, "[B, T]")
    check_shape("teacher_logprobs", teacher_logprobs, student_logprobs.shape, "[B, T]")
    return as_float(teacher_logprobs).detach() - as_float(student_logprobs)
