"""The KDRL joint loss (8), minimised: −J_GRPO + β · KL, and what training adds to it.

    loss = − mean[ w · ρ Â ]              policy gradient (2); ρ clipped on request
           + β · mean[ w · m · KL ]       distillation: k2 (6) by default, m the reward-guided mask (Sec. 3.4)
           + β_ref · mean[ w · KL_ref ]   stage 1's penalty to the frozen initial policy (Table 3)
           − c · mean[ H ]                entropy bonus (Tables 3, 5)
           + Σ c_j · mean[ f_j ]          terms of one's own (beyond the paper)

On-policy with k2 its gradient is −mean[(Â_i + β m_i R_{i,t}) ∇log π_θ], that is −(27). `mean` is `token_mean` over the
response tokens of the whole optimiser step, or `group_mean`; masks never change its denominator.

Departures and additions:
- k1 is the policy gradient of (5): the derivative of its value would be independent of the teacher (see kl.py).
- ρ is clipped only if `clip_low` or `clip_high` is given, and only where it multiplies Â.
- Off-policy (`old_logprobs`) the tokens are the old policy's. Each estimate of a KL from sampled tokens is then weighed
  by ρ, as a constant: E_old[sg(ρ) ∇k] = E_θ[∇k], so an estimator keeps the gradient that it has on-policy, and k2's is
  that of (5), −ρ R ∇log π_θ, token by token. Without ρ it would pull towards the teacher where the old policy went.
  Top-K and the entropy sum over the vocabulary, so they need no ρ. Prefixes stay the old policy's, as in (2).
- w = min(π_θold / π_rollout, tis_cap), a constant, corrects for an engine whose probabilities differ from the trainer's
  (truncated importance weighting). It weighs every term that is an expectation over sampled tokens; Top-K sums over the
  vocabulary, and so does the entropy.
- A coefficient of 0 leaves its term out altogether: at β = 0 this is GRPO to the bit.

Two means turn per-token values into one number. The denominators of the whole optimiser step are passed in, so that
the results of micro-batches (or ranks) add up to the result of the whole batch:

    token_mean  Σ_i Σ_t x_{i,t} / Σ_i |o_i|, over all responses of the step (the default, kdrl's choice; as in verl)
    group_mean  mean over groups of the same ratio within the group: Eq. 2 to the letter, whose Σ runs over one question

Sums are computed and returned in float32 at least.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from kdrl_core.objectives.advantages import KD_MASKINGS
from kdrl_core.objectives.checks import (
    as_float,
    as_is_response,
    check_counts,
    check_num_dims,
    check_shape,
    refuse_bad_input,
)
from kdrl_core.objectives.inputs import Objective, Responses, Totals, check_group_size, check_positive
from kdrl_core.objectives.kinds import AGGREGATIONS, ESTIMATORS
from kdrl_core.objectives.kl import check_estimator, kl_estimate, kl_policy_gradient

Metrics = dict[str, Tensor]

LOSS_METRICS: dict[str, str] = {
    "loss/total": "the loss = loss/policy + β kd/kl + β_ref ref/kl − c entropy, and terms of one's own",
    "loss/policy": "−mean of w ρ Â",
    "kd/kl": "mean of w m KL, as it enters the loss: over all response tokens (with a teacher)",
    "kd/kl_unmasked": "mean of KL over the response tokens on which KD acts (Fig. 5); 0 if there are none. Absent for "
    "micro-batches unless `kd_tokens` is given; it is also kd/kl ÷ kd/active_frac (token_mean, mask of 0 and 1, w = 1)",
    "kd/active_frac": "share of response tokens on which KD acts (with a teacher)",
    "kd/kl_sampled": "mean of −ρ R over all response tokens, masked or not: the unbiased KL (with teacher_logprobs)",
    "ref/kl": "mean of w KL_ref (with ref_logprobs)",
    "entropy": "mean entropy of the policy in nats (with entropy)",
    "ratio/mean": "mean of ρ (with old_logprobs)",
    "ratio/clipped_frac": "share of response tokens whose ρ is clipped, so that the policy term has no gradient there",
    "ratio/tis_mean": "mean of w (with rollout_logprobs)",
    "ratio/tis_capped_frac": "share of response tokens whose w is at the cap (with rollout_logprobs)",
}
"""Every metric of `joint_loss`, except `term/<function>`: the mean of a term of one's own. "mean" and "share" are taken
by `aggregation`, with its global denominator, so that the metrics of micro-batches add up to the whole batch's."""


def joint_loss(responses: Responses, objective: Objective, totals: Totals) -> tuple[Tensor, Metrics]:
    """The joint loss of (8), minimised: the sum of coefficient × term. Returns the scalar loss and its metrics,
    detached 0-d tensors by the names of `LOSS_METRICS`. With the global counts in `totals`, losses and metrics of
    micro-batches add up to those of the whole batch.

    `Objective.group_size` must divide B, unless `totals` says that this is a micro-batch and nothing needs its groups
    whole.

    Raises:
        ValueError: bad input, found before any arithmetic: shapes that do not match, an unknown variant, a negative
            coefficient or count, a missing argument, not-finite values on response tokens (of `entropy` and `topk`
            where they enter the loss). It names the argument, what was expected and what was given.
        RecipeError: an estimator that is named as `file.py:name` cannot be loaded.
    """
    check_estimator("kl_estimator", objective.kl_estimator, with_topk=True)
    check_estimator("ref_kl_estimator", objective.ref_kl_estimator)
    is_response = refuse_bad_input(responses, objective, totals)
    sampled = _sampled(responses, objective, totals, is_response)
    loss, metrics = policy_gradient(responses, objective, sampled)
    for coefficient, (value, found) in (
        (objective.kd_beta, distillation(responses, objective, totals, sampled)),
        (objective.ref_beta, reference_penalty(responses, objective, sampled)),
        (objective.entropy_coef, entropy_bonus(responses, sampled)),
    ):
        if value is not None and coefficient > 0.0:
            loss = loss + coefficient * value
        metrics |= found
    if objective.terms:
        from kdrl_core.objectives.terms import own_terms

        own, found = own_terms(_without_padding(responses, sampled), objective, sampled.mean)
        loss, metrics = loss + own, metrics | found
    metrics["loss/total"] = loss
    return loss, {name: value.detach() for name, value in metrics.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sampled:
    """Tensors that the terms share."""

    is_response: Tensor
    """[B, T] bool."""
    student: Tensor
    """[B, T] log π_θ, 0 on padding."""
    ratio: Tensor
    """[B, T] ρ = π_θ / π_θold, with its gradient."""
    weight: Tensor
    """[B, T] w of truncated importance weighting; 1 without."""
    is_off_policy: bool
    """The tokens are those of an older policy, so ρ is not 1."""
    mean: Callable[[Tensor], Tensor]
    """Over the response tokens of the whole step."""


def _sampled(responses: Responses, objective: Objective, totals: Totals, is_response: Tensor) -> _Sampled:
    mean = MEANS[objective.aggregation](is_response, objective.group_size, totals)
    # Padding must not meet arithmetic: 0 · NaN is NaN, in the gradient as well.
    student, old = torch.where(is_response, as_float(responses.logprobs), 0.0), responses.old_logprobs
    old = student.detach() if old is None else torch.where(is_response, as_float(old), 0.0).detach()
    weight = torch.ones_like(old)
    if responses.rollout_logprobs is not None and objective.tis_cap is not None:
        gap = old - torch.where(is_response, responses.rollout_logprobs, 0.0)
        weight = torch.exp(gap).clamp(max=objective.tis_cap).detach()
    ratio = torch.exp(student - old)
    return _Sampled(
        is_response=is_response,
        student=student,
        ratio=ratio,
        weight=weight,
        is_off_policy=responses.old_logprobs is not None,
        mean=mean,
    )


def _without_padding(responses: Responses, at: _Sampled) -> Responses:
    """0 on padding, where a gradient flows: a function that knows no mask may make NaN of what stands there."""
    entropy = responses.entropy
    if entropy is not None:
        entropy = torch.where(at.is_response, as_float(entropy), 0.0)
    return replace(responses, logprobs=at.student, entropy=entropy)


def policy_gradient(responses: Responses, objective: Objective, at: _Sampled) -> tuple[Tensor, Metrics]:
    """−mean[ w · ρ Â ] of (2), ρ clipped on request; and its metrics."""
    metrics: Metrics = {}
    if responses.rollout_logprobs is not None and objective.tis_cap is not None:
        metrics["ratio/tis_mean"] = at.mean(at.weight)
        metrics["ratio/tis_capped_frac"] = at.mean((at.weight >= objective.tis_cap).to(at.weight.dtype))
    surrogate, is_clipped = _surrogate(
        at.ratio, responses.advantages.detach()[:, None], objective.clip_low, objective.clip_high
    )
    loss = metrics["loss/policy"] = -at.mean(at.weight * surrogate)
    if responses.old_logprobs is not None:
        metrics["ratio/mean"] = at.mean(at.ratio)
        metrics["ratio/clipped_frac"] = at.mean(is_clipped.to(at.ratio.dtype))
    return loss, metrics


def distillation(
    responses: Responses, objective: Objective, totals: Totals, at: _Sampled
) -> tuple[Tensor | None, Metrics]:
    """mean[ w · m · KL ] of (5–8), m the reward-guided mask (Sec. 3.4), and its metrics. None without a teacher."""
    value, metrics = None, {}
    source = responses.topk if objective.needs_topk else responses.teacher_logprobs
    if source is not None:
        weights = _kd_weights(responses, objective, at)
        is_active = at.is_response & (weights > 0)[:, None]
        if objective.needs_topk:
            kl = torch.where(is_active, as_float(source), 0.0)
            value = at.mean(weights.detach()[:, None] * kl)
        else:
            kl = _token_kl(at, source, is_active, objective.kd_estimator)
            value = at.mean(at.weight * weights.detach()[:, None] * kl)
        metrics["kd/kl"] = value
        metrics["kd/active_frac"] = at.mean(is_active.to(at.student.dtype))
        kd_tokens, is_whole = totals.kd_tokens, totals.tokens is None and totals.num_groups is None
        if kd_tokens is None and is_whole:
            kd_tokens = is_active.sum()
        if kd_tokens is not None:
            metrics["kd/kl_unmasked"] = kl.sum() / max(kd_tokens, 1)
    if responses.teacher_logprobs is not None:
        log_ratio = at.student - responses.teacher_logprobs
        metrics["kd/kl_sampled"] = at.mean(at.ratio * log_ratio if at.is_off_policy else log_ratio)
    return value, metrics


def reference_penalty(responses: Responses, objective: Objective, at: _Sampled) -> tuple[Tensor | None, Metrics]:
    """mean[ w · KL_ref ], the penalty to the frozen reference policy (Table 3); and its metric. None: no reference."""
    if responses.ref_logprobs is None:
        return None, {}
    value = at.mean(at.weight * _token_kl(at, responses.ref_logprobs, at.is_response, objective.ref_kl_estimator))
    return value, {"ref/kl": value}


def entropy_bonus(responses: Responses, at: _Sampled) -> tuple[Tensor | None, Metrics]:
    """−mean[ H ], the entropy bonus (Tables 3, 5); and its metric. None: no entropy."""
    if responses.entropy is None:
        return None, {}
    entropy = at.mean(responses.entropy)
    return -entropy, {"entropy": entropy}


def _kd_weights(responses: Responses, objective: Objective, at: _Sampled) -> Tensor:
    """m [B] ≥ 0."""
    if responses.kd_weights is not None:
        return responses.kd_weights
    rewards = responses.rewards  # None: they mask nothing
    has_failed = at.is_response.new_zeros(len(at.student)) if rewards is None else rewards == 0
    return KD_MASKINGS[objective.kd_masking](has_failed, objective.group_size).to(at.student.dtype)


def _surrogate(
    ratio: Tensor, advantages: Tensor, clip_low: float | None, clip_high: float | None
) -> tuple[Tensor, Tensor]:
    """min(ρ Â, clip(ρ) Â) [B, T], and where the clipped one is smaller, so that no gradient flows."""
    unclipped = ratio * advantages
    low = None if clip_low is None else 1.0 - clip_low
    high = None if clip_high is None else 1.0 + clip_high
    if low is None and high is None:
        return unclipped, torch.zeros_like(unclipped, dtype=torch.bool)
    clipped = ratio.detach().clamp(low, high) * advantages
    is_clipped = clipped < unclipped
    return torch.where(is_clipped, clipped, unclipped), is_clipped


def _token_kl(at: _Sampled, teacher: Tensor, is_active: Tensor, estimator: str) -> Tensor:
    """KL per token [B, T], 0 with gradient 0 where not active; k1 as policy gradient, others weighed by sg(ρ)."""
    student, teacher = torch.where(is_active, at.student, 0.0), torch.where(is_active, teacher, 0.0)
    if ESTIMATORS[estimator].is_policy_gradient:
        return kl_policy_gradient(student, teacher, torch.where(is_active, at.ratio, 1.0))
    kl = kl_estimate(student, teacher, estimator)
    return torch.where(is_active, at.ratio, 1.0).detach() * kl if at.is_off_policy else kl


# --- means ------------------------------------------------------------------------------------------------------------


def token_mean(values: Tensor, response_mask: Tensor, *, total_tokens: float | Tensor | None = None) -> Tensor:
    """Sum over response tokens divided by their count, a scalar.

    Args:
        values: [B, T]; the gradient flows through. Where `response_mask` is 0 they may be anything.
        response_mask: [B, T], 1 on response tokens.
        total_tokens: the optimiser step's response tokens, for micro-batches; None counts this mask.

    Raises:
        ValueError: shapes differ, a mask entry is neither 0 nor 1, `total_tokens` is not a positive number, or it
            is None and there are no response tokens.
    """
    check_num_dims("values", values, "[B, T]")
    is_response = as_is_response(response_mask, values.shape)
    if total_tokens is None:
        total_tokens = count_tokens(is_response)
    check_positive("total_tokens", total_tokens)
    return unchecked_token_mean(values, is_response, total_tokens)


def group_mean(
    values: Tensor,
    response_mask: Tensor,
    group_size: int | None = None,
    *,
    num_groups: float | None = None,
    group_tokens: Tensor | None = None,
) -> Tensor:
    """Mean over groups of (sum over the group's response tokens / their count); a group without tokens is 0. A scalar.

    Args:
        values: [B, T]; the gradient flows through. Where `response_mask` is 0 they may be anything.
        response_mask: [B, T], 1 on response tokens.
        group_size: G ≥ 2; groups contiguous. Not needed with `group_tokens`.
        num_groups: the optimiser step's groups, for micro-batches; None: B / G.
        group_tokens: [B] response tokens of each response's whole group, for micro-batches that split or reorder
            groups; needs `num_groups`.

    Raises:
        ValueError: shapes do not match, a mask entry is neither 0 nor 1, `group_size` does not divide B or is below 2,
            `num_groups` is not a positive number, an entry of `group_tokens` is negative or not finite, or both
            `group_size` and `group_tokens` are None.
    """
    check_num_dims("values", values, "[B, T]")
    is_response = as_is_response(response_mask, values.shape)
    num_groups, group_tokens = count_groups(is_response, group_size, num_groups, group_tokens)
    return unchecked_group_mean(values, is_response, num_groups, group_tokens)


def unchecked_token_mean(values: Tensor, is_response: Tensor, total_tokens: float | Tensor) -> Tensor:
    """`token_mean` of what was checked before."""
    return torch.where(is_response, as_float(values), 0.0).sum() / total_tokens


def unchecked_group_mean(values: Tensor, is_response: Tensor, num_groups: float, group_tokens: Tensor) -> Tensor:
    """`group_mean` of what was checked before."""
    return (torch.where(is_response, as_float(values), 0.0).sum(1) / group_tokens.clamp(min=1)).sum() / num_groups


def count_tokens(is_response: Tensor) -> int:
    """Response tokens of the whole batch. Raises ValueError if there is none."""
    total = int(is_response.sum())
    if total == 0:
        raise ValueError("response_mask: expected at least one response token, given none")
    return total


def count_groups(
    is_response: Tensor, group_size: int | None, num_groups: float | None, group_tokens: Tensor | None
) -> tuple[float, Tensor]:
    """`num_groups` and `group_tokens` of `group_mean`, checked, or counted where they are None. Raises as it does."""
    if group_tokens is None:
        if group_size is None:
            raise ValueError("group_size: expected an integer of at least 2, or group_tokens, given None")
        check_group_size(group_size, len(is_response))
        group_tokens = is_response.sum(1).reshape(-1, group_size).sum(1).repeat_interleave(group_size)
        num_groups = len(is_response) / group_size if num_groups is None else num_groups
    else:
        check_shape("group_tokens", group_tokens, is_response.shape[:1], "[B]")
        check_counts("group_tokens", group_tokens)
    if num_groups is None:
        raise ValueError("num_groups: expected the number of groups of the step beside group_tokens, given None")
    check_positive("num_groups", num_groups)
    return num_groups, group_tokens


def _over_tokens(is_response: Tensor, group_size: int | None, totals: Totals) -> Callable[[Tensor], Tensor]:
    tokens = count_tokens(is_response) if totals.tokens is None else totals.tokens
    return partial(unchecked_token_mean, is_response=is_response, total_tokens=tokens)


def _over_groups(is_response: Tensor, group_size: int | None, totals: Totals) -> Callable[[Tensor], Tensor]:
    group_tokens = cast("Tensor | None", totals.group_tokens)  # of a micro-batch; the whole step has a plain list
    groups, tokens = count_groups(is_response, group_size, totals.num_groups, group_tokens)
    return partial(unchecked_group_mean, is_response=is_response, num_groups=groups, group_tokens=tokens)


MEANS = {"token_mean": _over_tokens, "group_mean": _over_groups}
"""From the response mask, G and the global counts to the mean of values [B, T]. Raise ValueError as `group_mean`."""
assert MEANS.keys() == AGGREGATIONS.keys()
