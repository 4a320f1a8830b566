"""Every gradient equals its formula, by autograd in float64."""

from math import exp, log
from typing import Any

import pytest
import torch
from objectives_support import BETA, B, G, T, close, gradient, log_ratio

from kdrl_core.objectives import (
    Totals,
    group_advantages,
    kd_mask,
    kd_rkl_loss,
    kdrl_loss,
    kl_estimate,
    sft_loss,
    shape_rewards,
)


def test_gradient_is_27(batch: dict[str, Any]) -> None:
    """k2: −(Â + β R) / Σ|o| on every response token, 0 on padding."""
    mask = batch["response_mask"]
    close(gradient(batch), -(batch["advantages"][:, None] + BETA * log_ratio(batch)) * mask / mask.sum())


def test_beta_zero_is_grpo(batch: dict[str, Any]) -> None:
    """(2): −Â / Σ|o|, with a teacher, without one, and to the bit."""
    mask = batch["response_mask"]
    grpo = gradient(batch, beta=0.0)
    close(grpo, -batch["advantages"][:, None] * mask / mask.sum())
    assert torch.equal(grpo, gradient(batch, beta=0.0, teacher_logprobs=None))


def test_what_is_switched_off_cannot_overflow(batch: dict[str, Any]) -> None:
    """e^R = ∞ on every token: 0 · ∞ would be NaN, so β = 0 and masked responses leave the term out."""
    expected = gradient(batch, beta=0.0)
    far = batch["teacher_logprobs"] + 1000.0
    off = {"teacher_logprobs": far, "kl_estimator": "k3", "ref_logprobs": far}
    without = kdrl_loss(**(batch | {"beta": 0.0, "teacher_logprobs": None}))[0]
    for switch in ({"beta": 0.0}, {"kd_weights": torch.zeros(B)}):
        close(gradient(batch, **switch, **off), expected)
        close(kdrl_loss(**(batch | off | switch))[0], without)
    entropy = torch.full((B, T), float("inf"))
    assert torch.equal(kdrl_loss(entropy=entropy, **(batch | {"beta": 0.0}))[0], without)


def test_zero_advantages_are_kd_rkl(batch: dict[str, Any]) -> None:
    """k1 in the loss is (5): −β R / Σ|o|, the same as k2's; the value is that of k1."""
    mask = batch["response_mask"]
    zeros = torch.zeros(B, dtype=torch.float64)
    expected = -BETA * log_ratio(batch) * mask / mask.sum()
    close(gradient(batch, advantages=zeros, kl_estimator="k1"), expected)
    close(gradient(batch, advantages=zeros, kl_estimator="k2"), expected)
    arguments = {**batch, "advantages": zeros, "kl_estimator": "k1"}
    loss, metrics = kdrl_loss(arguments.pop("logprobs"), **arguments)
    close(loss, (-BETA * log_ratio(batch) * mask).sum() / mask.sum())
    close(metrics["kd/kl"], metrics["kd/kl_sampled"])

    direct = kd_rkl_loss(batch["logprobs"], batch["teacher_logprobs"], mask)
    close(BETA * direct, loss)
    close(BETA * torch.autograd.grad(direct, batch["logprobs"])[0], expected)


def test_kd_rkl_off_policy_weighs_by_the_ratio(batch: dict[str, Any]) -> None:
    mask, old = batch["response_mask"], batch["logprobs"].detach() - 0.2
    loss = kd_rkl_loss(batch["logprobs"], batch["teacher_logprobs"], mask, old_logprobs=old)
    expected = -exp(0.2) * log_ratio(batch) * mask / mask.sum()
    close(loss, expected.sum())
    of_step = kd_rkl_loss(batch["logprobs"], batch["teacher_logprobs"], mask, old_logprobs=old, total_tokens=56)
    close(of_step, loss * mask.sum() / 56)
    close(torch.autograd.grad(loss, batch["logprobs"])[0], expected)
    zeros = torch.zeros(B, dtype=torch.float64)
    close(gradient(batch, advantages=zeros, old_logprobs=old, kl_estimator="k1"), BETA * expected)


def test_off_policy_every_estimate_is_weighed_by_the_ratio(batch: dict[str, Any]) -> None:
    """ρ = e^0.2: k2 −ρ R, which is (5); k3 ρ (1 − e^R); the penalty to the reference alike. The sum over the
    vocabulary has no ρ. No gradient flows through the weight: ½ R² would have entered it."""
    mask, old = batch["response_mask"], batch["logprobs"].detach() - 0.2
    factor = {"k2": -log_ratio(batch), "k3": 1 - log_ratio(batch).exp()}
    policy = gradient(batch, beta=0.0, old_logprobs=old)
    close(policy, -exp(0.2) * batch["advantages"][:, None] * mask / mask.sum())
    for estimator, slope in factor.items():
        kd = gradient(batch, old_logprobs=old, kl_estimator=estimator) - policy
        close(kd, BETA * exp(0.2) * slope * mask / mask.sum())
        reference = {"ref_logprobs": batch["teacher_logprobs"], "ref_beta": BETA, "ref_kl_estimator": estimator}
        close(gradient(batch, beta=0.0, old_logprobs=old, **reference) - policy, kd)
    direct = kd_rkl_loss(batch["logprobs"], batch["teacher_logprobs"], mask, old_logprobs=old)
    close(gradient(batch, old_logprobs=old) - policy, BETA * torch.autograd.grad(direct, batch["logprobs"])[0])
    topk = torch.full((B, T), 2.0, dtype=torch.float64, requires_grad=True)
    loss, _ = kdrl_loss(**batch, topk=topk, kl_estimator="topk", old_logprobs=old)
    close(torch.autograd.grad(loss, topk)[0], BETA * mask / mask.sum())


def test_off_policy_k2_has_the_gradient_of_the_kl_of_the_policy_that_is_trained() -> None:
    """Three tokens, each with its probability under the old policy: Σ_v π_old(v) ρ(v) ∇k2(v) = ∇ KL(π_θ ‖ π_T)."""
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    old, teacher = (torch.tensor(row, dtype=torch.float64).log() for row in ([0.2, 0.5, 0.3], [0.6, 0.1, 0.3]))
    policy = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((policy.exp() * (policy - teacher)).sum(), logits, retain_graph=True)
    for estimator in ("k1", "k2", "k3_k2grad"):
        loss, metrics = kdrl_loss(
            policy[:, None],
            advantages=torch.zeros(3, dtype=torch.float64),
            teacher_logprobs=teacher[:, None],
            response_mask=torch.ones(3, 1),
            rewards=None,
            group_size=None,
            beta=1.0,
            kl_estimator=estimator,
            kd_weights=old.exp(),
            old_logprobs=old[:, None],
            total_tokens=1,
        )
        close(torch.autograd.grad(loss, logits, retain_graph=True)[0], exact)
    assert metrics["ratio/mean"].item() == pytest.approx((policy - old).exp().sum().item())


def test_k3_differentiates_to_one_minus_e_to_the_r(batch: dict[str, Any]) -> None:
    """(7): ∂k3/∂log π = 1 − e^R; k3_k2grad has k3's value and k2's gradient."""
    mask = batch["response_mask"]
    expected = (-batch["advantages"][:, None] + BETA * (1 - log_ratio(batch).exp())) * mask / mask.sum()
    close(gradient(batch, kl_estimator="k3"), expected)
    close(gradient(batch, kl_estimator="k3_k2grad"), gradient(batch, kl_estimator="k2"))


@pytest.mark.parametrize(
    ("estimator", "slope"),
    [
        ("k1", lambda r: -r),  # (5), (19)
        ("k2", lambda r: -r),  # (6)
        ("k3", lambda r: 1 - r.exp()),  # (7)
        ("k3_k2grad", lambda r: -r),
    ],
)
def test_slopes_of_the_estimators(batch: dict[str, Any], estimator: str, slope: Any) -> None:
    teacher = batch["teacher_logprobs"].requires_grad_()
    value = kl_estimate(batch["logprobs"], teacher, estimator).sum()
    student_gradient, teacher_gradient = torch.autograd.grad(value, (batch["logprobs"], teacher), allow_unused=True)
    close(student_gradient, slope(log_ratio(batch).detach()))
    assert teacher_gradient is None


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3_k2grad"])
def test_the_teacher_is_in_the_gradient(batch: dict[str, Any], estimator: str) -> None:
    """k1 differentiated has no teacher in it. Here a token's teacher moves that token's gradient alone."""
    before = gradient(batch, kl_estimator=estimator)
    batch["teacher_logprobs"][2, 1] -= 0.5
    is_changed = gradient(batch, kl_estimator=estimator) != before
    assert is_changed.nonzero().tolist() == [[2, 1]]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("level", ["none", "response", "group"])
def test_masks_multiply_r_and_keep_the_denominator(batch: dict[str, Any], level: str, estimator: str) -> None:
    """Sec. 3.4: the KD part of the gradient is the unmasked one times the mask; precomputed weights are the same."""
    mask = kd_mask(batch["rewards"], G, level)
    assert mask.tolist() == {"none": [1] * 8, "response": [0, 1, 1, 0] + [1] * 4, "group": [0] * 4 + [1] * 4}[level]
    grpo = gradient(batch, beta=0.0)
    unmasked = gradient(batch, kl_estimator=estimator)
    masked = gradient(batch, kl_estimator=estimator, kd_masking=level)
    close(masked - grpo, (unmasked - grpo) * mask[:, None])
    weighted = gradient(batch, kl_estimator=estimator, kd_weights=mask, rewards=None, group_size=None)
    assert torch.equal(weighted, masked)


def test_group_without_variance_still_learns_from_the_teacher(batch: dict[str, Any]) -> None:
    """Â = 0 in the failed group, and KD acts exactly there."""
    result = gradient(batch, kd_masking="group")[4:]
    mask = batch["response_mask"]
    close(result, (-BETA * log_ratio(batch) * mask / mask.sum())[4:])
    assert (result.abs().sum(1) > 0).all()


def test_reward_shaping_is_grpo_on_shaped_rewards(batch: dict[str, Any]) -> None:
    """Sec. 3.1: the sum over tokens comes before group normalisation; no gradient through R."""
    mask = batch["response_mask"]
    shaped = shape_rewards(batch["rewards"], batch["logprobs"], batch["teacher_logprobs"], mask, BETA)
    close(shaped, batch["rewards"] + BETA * (log_ratio(batch) * mask).sum(1))
    groups = shaped.view(-1, G)
    expected = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)).view(-1)
    result = gradient(batch, advantages=group_advantages(shaped, G), beta=0.0, teacher_logprobs=None)
    close(result, -expected[:, None] * mask / mask.sum())


@pytest.mark.parametrize(("estimator", "slope"), [("k2", lambda r: -r), ("k3", lambda r: 1 - r.exp())])
def test_reference_penalty(batch: dict[str, Any], estimator: str, slope: Any) -> None:
    """Stage 1: + β_ref · KL to the frozen policy, over all tokens whatever the KD mask."""
    mask, ref = batch["response_mask"], batch["teacher_logprobs"] + 0.1
    without = gradient(batch, kd_masking="response")
    with_penalty = gradient(batch, kd_masking="response", ref_logprobs=ref, ref_beta=0.05, ref_kl_estimator=estimator)
    close(with_penalty - without, 0.05 * slope(ref - batch["logprobs"].detach()) * mask / mask.sum())
    if estimator == "k3":  # the default: Table 3's low_var_kl
        assert torch.equal(gradient(batch, kd_masking="response", ref_logprobs=ref, ref_beta=0.05), with_penalty)


def test_entropy_bonus(batch: dict[str, Any]) -> None:
    """− c · mean H: the gradient of the loss by the entropy is −c / Σ|o| on response tokens."""
    mask = batch["response_mask"]
    entropy = torch.full((B, T), 2.0, dtype=torch.float64, requires_grad=True)
    loss, metrics = kdrl_loss(entropy=entropy, entropy_coef=1e-3, **batch)
    close(torch.autograd.grad(loss, entropy)[0], -1e-3 * mask / mask.sum())
    assert metrics["entropy"].item() == pytest.approx(2.0)


def test_group_mean_is_eq_2_to_the_letter(batch: dict[str, Any]) -> None:
    """Each group is divided by its own tokens (14 each here, so move two) and the groups are averaged."""
    batch["response_mask"][0, 4:] = 0.0
    mask = batch["response_mask"]
    tokens = torch.tensor([12.0] * 4 + [14.0] * 4, dtype=torch.float64)
    factor = -(batch["advantages"][:, None] + BETA * log_ratio(batch)) * mask
    close(gradient(batch, aggregation="group_mean"), factor / tokens[:, None] / 2)
    first = {name: value[:4] if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    loss, _ = kdrl_loss(aggregation="group_mean", num_groups=2, **first)  # whole groups need no more than their number
    (found,) = torch.autograd.grad(loss, batch["logprobs"])
    close(found[:4], (factor / tokens[:, None] / 2)[:4])


def test_ratio_and_clipping() -> None:
    """ρ Â with ρ = 1.5, 0.5, 1.1; [0.8, 1.28]. Clipped where it is the smaller: gradient 0; elsewhere −ρ Â / N."""
    old = torch.tensor([[0.5, 0.5, 0.5]] * 2, dtype=torch.float64).log()
    logprobs = (old + torch.tensor([1.5, 0.5, 1.1], dtype=torch.float64).log()).requires_grad_()
    arguments: dict[str, Any] = {
        "advantages": torch.tensor([1.0, -2.0], dtype=torch.float64),
        "teacher_logprobs": None,
        "response_mask": torch.ones(2, 3),
        "rewards": None,
        "group_size": 2,
        "beta": 0.0,
        "old_logprobs": old,
    }
    loss, metrics = kdrl_loss(logprobs, **arguments)
    # −(1.5 + 0.5 + 1.1) (1 − 2) / 6
    assert loss.item() == pytest.approx(3.1 / 6)
    assert metrics["ratio/mean"].item() == pytest.approx(3.1 / 3)
    assert metrics["ratio/clipped_frac"].item() == 0.0
    ratio = torch.tensor([[1.5, 0.5, 1.1]], dtype=torch.float64)
    close(torch.autograd.grad(loss, logprobs)[0], -ratio * torch.tensor([[1.0], [-2.0]], dtype=torch.float64) / 6)

    loss, metrics = kdrl_loss(logprobs, clip_low=0.2, clip_high=0.28, **arguments)
    # Â = 1: min(1.5, 1.28) + min(0.5, 0.8) + 1.1 = 2.88; Â = −2: −2 (max(1.5, 1.28) + max(0.5, 0.8) + 1.1) = −6.8.
    assert loss.item() == pytest.approx((6.8 - 2.88) / 6)
    assert metrics["ratio/clipped_frac"].item() == pytest.approx(2 / 6)
    expected = torch.tensor([[0.0, -0.5, -1.1], [3.0, 0.0, 2.2]], dtype=torch.float64) / 6
    close(torch.autograd.grad(loss, logprobs)[0], expected)


def test_old_logprobs_of_the_same_policy_change_nothing(batch: dict[str, Any]) -> None:
    old = batch["logprobs"].detach()
    assert torch.equal(gradient(batch, old_logprobs=old, clip_low=0.2, clip_high=0.2), gradient(batch))


def test_truncated_importance_weights(batch: dict[str, Any]) -> None:
    """w = min(π_θold / π_rollout, cap) multiplies (27) token by token; no gradient flows through it."""
    difference = torch.linspace(-1.0, 2.0, B * T, dtype=torch.float64).view(B, T)
    changes = {"rollout_logprobs": batch["logprobs"].detach() - difference, "tis_cap": 2.0}
    weight = difference.exp().clamp(max=2.0)
    close(gradient(batch, **changes), gradient(batch) * weight)
    old = batch["logprobs"].detach() + 0.3  # w is that of the policy that ρ starts from, so ρ w = π_θ / π_rollout
    old_weight = (difference + 0.3).exp().clamp(max=2.0)
    close(gradient(batch, old_logprobs=old, **changes), gradient(batch, old_logprobs=old) * old_weight)
    arguments = {**batch, **changes, "ref_logprobs": batch["teacher_logprobs"], "ref_kl_estimator": "k2"}
    _, metrics = kdrl_loss(arguments.pop("logprobs"), **arguments)
    mask = batch["response_mask"]
    close(metrics["ratio/tis_mean"], (weight * mask).sum() / mask.sum())
    close(metrics["ratio/tis_capped_frac"], ((difference >= log(2.0)) * mask).sum() / mask.sum())
    close(metrics["ref/kl"], (weight * 0.5 * log_ratio(batch) ** 2 * mask).sum() / mask.sum())
    close(metrics["kd/kl"], metrics["ref/kl"])
    close(metrics["kd/kl_unmasked"], (0.5 * log_ratio(batch) ** 2 * mask).sum() / mask.sum())


def test_sft_is_length_normalised() -> None:
    """(14) by hand. Responses of 1 and 3 tokens, log π: −4; −1 −2 −3 (padding holds NaN).

    response_mean: (4 + (1 + 2 + 3) / 3) / 2 = 3; gradient −1 / (2 · 1) and −1 / (2 · 3).
    token_mean: (4 + 1 + 2 + 3) / 4 = 2.5; gradient −1 / 4.
    In a step of 8 responses and 40 tokens: 6 / 8 = 0.75, and 10 / 40 = 0.25.
    """
    logprobs = torch.tensor([[-4.0, torch.nan, torch.nan], [-1.0, -2.0, -3.0]], requires_grad=True)
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    loss = sft_loss(logprobs, mask)
    close(loss, torch.tensor(3.0))
    close(torch.autograd.grad(loss, logprobs)[0], torch.tensor([[-1 / 2, 0.0, 0.0], [-1 / 6, -1 / 6, -1 / 6]]))
    close(sft_loss(logprobs, mask, totals=Totals(responses=8)), torch.tensor(0.75))
    tokens = sft_loss(logprobs, mask, aggregation="token_mean")
    close(tokens, torch.tensor(2.5))
    close(torch.autograd.grad(tokens, logprobs)[0], -mask / 4)
    close(sft_loss(logprobs, mask, aggregation="token_mean", totals=Totals(tokens=40)), torch.tensor(0.25))


def test_no_argument_is_mutated(batch: dict[str, Any]) -> None:
    batch |= {"old_logprobs": torch.zeros(B, T), "entropy": torch.zeros(B, T), "kd_weights": torch.rand(B)}
    before = {name: value.clone() for name, value in batch.items() if isinstance(value, torch.Tensor)}
    kdrl_loss(**batch)[0].backward()
    group_advantages(batch["rewards"], G)
    kd_mask(batch["rewards"], G, "group")
    shape_rewards(batch["rewards"], batch["logprobs"], batch["teacher_logprobs"], batch["response_mask"], 1.0)
    assert all(torch.equal(batch[name], value) for name, value in before.items())
