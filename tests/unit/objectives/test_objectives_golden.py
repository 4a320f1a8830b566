"""Golden values of the parts, with the arithmetic beside them."""

from math import exp, log, sqrt

import pytest
import torch
from torch import Tensor

from kdrl_core.objectives import (
    BetaSchedule,
    group_advantages,
    group_mean,
    kd_mask,
    kl_estimate,
    kl_policy_gradient,
    shape_rewards,
    token_mean,
)

NAN, INF = float("nan"), float("inf")


def test_advantages_use_the_unbiased_std_and_epsilon_1e_6() -> None:
    # Group [1, 0, 0, 1]: mean ½, squared deviations 4 · ¼ = 1, unbiased variance 1/3, std 0.57735; ½ / 0.57735 = 0.866.
    # Group [1, 0, 0, 0]: mean ¼, squared deviations 9/16 + 3/16 = ¾, variance ¼, std ½; ¾ / ½ = 1.5, −¼ / ½ = −0.5.
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64), 4)
    a = 0.5 / (sqrt(1 / 3) + 1e-6)
    expected = [a, -a, -a, a, 0.75 / (0.5 + 1e-6), *[-0.25 / (0.5 + 1e-6)] * 3]
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0.0)


def test_advantages_of_a_constant_group_are_exactly_zero() -> None:
    # In float32 the mean of eight times 0.1 is not 0.1: the difference of 7e-9 would be 7e-3 when divided by ε.
    rewards = torch.tensor([0.1] * 8 + [0.3] * 8 + [1e6 + 0.3] * 8)
    assert (rewards[:8] - rewards[:8].view(1, 8).mean(1)).abs().max() > 0.0
    assert group_advantages(rewards, 8).tolist() == [0.0] * 24
    assert group_advantages(rewards, 8, normalize_std=False).tolist() == [0.0] * 24


def test_advantages_without_std_are_centred_rewards() -> None:
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4, normalize_std=False)
    assert advantages.tolist() == [0.75, -0.25, -0.25, -0.25]


def test_advantages_take_epsilon_and_integer_rewards() -> None:
    # std of [1, 0] is √½ = 0.70711; ½ / (0.7071068 + 0.1) = 0.6194968.
    advantages = group_advantages(torch.tensor([1, 0]), 2, eps=0.1)
    assert advantages.dtype == torch.float32
    assert advantages.tolist() == pytest.approx([0.6194968, -0.6194968], abs=1e-6)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # Teacher twice as likely, half as likely, equal: R = log 2, −log 2, 0.
        ("k1", [-log(2), log(2), 0.0]),
        ("k2", [0.5 * log(2) ** 2, 0.5 * log(2) ** 2, 0.0]),
        ("k3", [2 - log(2) - 1, 0.5 + log(2) - 1, 0.0]),
        ("k3_k2grad", [2 - log(2) - 1, 0.5 + log(2) - 1, 0.0]),
    ],
)
def test_kl_estimates(estimator: str, expected: list[float]) -> None:
    student = torch.tensor([[0.25, 0.5, 0.5]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.5, 0.25, 0.5]], dtype=torch.float64).log()
    estimate = kl_estimate(student, teacher, estimator)
    torch.testing.assert_close(estimate, torch.tensor([expected], dtype=torch.float64), rtol=0.0, atol=1e-15)


def test_kl_policy_gradient_weighs_r_by_the_ratio() -> None:
    # −ρ R with ρ = 1.5 and R = log 2; on-policy −R.
    student, teacher = torch.tensor([[log(0.25)]]), torch.tensor([[log(0.5)]])
    assert kl_policy_gradient(student, teacher, torch.tensor([[1.5]])).item() == pytest.approx(-1.5 * log(2))
    assert kl_policy_gradient(student, teacher).item() == pytest.approx(-log(2))


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("none", [1, 1, 1, 1, 1, 1]),
        ("response", [0, 1, 1, 1, 0, 0]),  # 1 where r = 0
        ("group", [0, 0, 1, 1, 0, 0]),  # 1 where the whole pair failed
    ],
)
def test_kd_mask(level: str, expected: list[float]) -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    mask = kd_mask(rewards, 2, level)
    assert mask.tolist() == expected
    assert mask.dtype == torch.float32
    assert kd_mask(rewards.double(), 2, level).dtype == torch.float64
    assert kd_mask(rewards.long(), 2, level).tolist() == expected


def test_shaped_rewards_add_the_summed_log_ratio() -> None:
    # Row 0: R = (−1 + 2) + (−2 + 5) = 4, r' = 1 + 0.1 · 4. Row 1: one token, R = −3 + 1 = −2, r' = 0 − 0.2.
    shaped = shape_rewards(
        torch.tensor([1.0, 0.0]),
        torch.tensor([[-2.0, -5.0], [-1.0, NAN]], requires_grad=True),
        torch.tensor([[-1.0, -2.0], [-3.0, -INF]]),
        torch.tensor([[1.0, 1.0], [1.0, 0.0]]),
        0.1,
    )
    assert shaped.tolist() == pytest.approx([1.4, -0.2])
    assert not shaped.requires_grad


VALUES = torch.tensor([[1.0, 2.0, NAN], [3.0, -INF, NAN], [4.0, 5.0, 6.0], [7.0, 8.0, INF]])
MASK = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64])
def test_token_mean(dtype: torch.dtype) -> None:
    # (1 + 2 + 3 + 4 + 5 + 6 + 7 + 8) / 8 = 4.5; over a step of 20 tokens 36 / 20 = 1.8.
    assert token_mean(VALUES, MASK.to(dtype)).item() == 4.5
    assert token_mean(VALUES, MASK.to(dtype), total_tokens=20).item() == pytest.approx(1.8)
    assert token_mean(VALUES, MASK.to(dtype), total_tokens=torch.tensor(20)).item() == pytest.approx(1.8)
    assert token_mean(VALUES, torch.zeros_like(MASK), total_tokens=20).item() == 0.0


def test_group_mean() -> None:
    # Groups of 2: (1 + 2 + 3) / 3 = 2 and (4 + 5 + 6 + 7 + 8) / 5 = 6, mean 4; as 2 of 4 groups (2 + 6) / 4 = 2.
    assert group_mean(VALUES, MASK, 2).item() == 4.0
    assert group_mean(VALUES, MASK, 2, num_groups=4).item() == 2.0
    # The same from split groups: each row brings its group's count.
    group_tokens = torch.tensor([3, 3, 5, 5])
    parts = [
        group_mean(VALUES[rows], MASK[rows], num_groups=2, group_tokens=group_tokens[rows]).item()
        for rows in ([1, 2], [3], [0])
    ]
    assert sum(parts) == pytest.approx(4.0)
    # A group without tokens counts as 0: (0 + 6) / 2.
    assert group_mean(VALUES, MASK * torch.tensor([[0.0], [0.0], [1.0], [1.0]]), 2).item() == 3.0


def test_beta_is_constant_by_default() -> None:
    assert [BetaSchedule(2e-3)(step) for step in (0, 1, 10_000)] == [2e-3] * 3


@pytest.mark.parametrize(
    ("schedule", "floor_step"),
    [
        (BetaSchedule(5e-3, 5e-5, 1e-3), 80),  # (5e-3 − 1e-3) / 5e-5 = 80
        (BetaSchedule(2e-1, 8e-4, 2e-3), 248),  # (2e-1 − 2e-3) / 8e-4 = 247.5
        (BetaSchedule(0.3, 0.1, 0.0), 3),  # 0.3 − 3 · 0.1 is 5.6e-17 in binary
    ],
)
def test_beta_reaches_its_floor_at_the_step_that_the_formula_says(schedule: BetaSchedule, floor_step: int) -> None:
    assert schedule(0) == schedule.init
    assert schedule(1) == pytest.approx(schedule.init - schedule.decay, abs=1e-15)
    assert schedule(floor_step - 1) > schedule.minimum
    assert all(schedule(step) == schedule.minimum for step in (floor_step, floor_step + 1, 10**6))


def test_beta_is_the_formula_whatever_its_numbers() -> None:
    assert BetaSchedule(1e-3, 0.0, 2e-3)(5) == 2e-3  # max(1e-3, 2e-3)
    assert BetaSchedule(1e-3, 1e-4, 2e-3)(0) == 2e-3
    assert BetaSchedule(1e-3, 1e-4)(20) == 0.0
    assert BetaSchedule(0)(0) == 0.0


def test_beta_is_the_decimal_value() -> None:
    # 5e-3 − 79 · 5e-5 = 1.05e-3; in binary it comes out as 1.0499999999999997e-3. 0.2 − 247 · 8e-4 = 2.4e-3.
    assert BetaSchedule(5e-3, 5e-5, 1e-3)(79) == 1.05e-3
    assert BetaSchedule(2e-1, 8e-4, 2e-3)(247) == 2.4e-3


def test_schedules_are_values() -> None:
    assert BetaSchedule(5e-3, 5e-5, 1e-3) == BetaSchedule(init=5e-3, decay=5e-5, minimum=1e-3)
    with pytest.raises(AttributeError):
        BetaSchedule(1.0).init = 2.0  # type: ignore[misc]


def test_k3_is_exact_near_zero_and_nothing_is_clamped() -> None:
    # e^R − R − 1 = R²/2 + R³/6 + …; R = 20 is beyond what peers clamp at.
    student = torch.zeros(1, 2, dtype=torch.float64)
    teacher: Tensor = torch.tensor([[1e-4, 20.0]], dtype=torch.float64)
    values = kl_estimate(student, teacher, "k3")[0].tolist()
    assert values[0] == pytest.approx(1e-8 / 2 + 1e-12 / 6, rel=1e-7)
    assert values[1] == pytest.approx(exp(20) - 21)
    # In float32 e^0.001 − 1 − 0.001 would be off by a tenth; expm1 keeps three digits of 5.00167e-7.
    single = kl_estimate(torch.zeros(1, 1), torch.full((1, 1), 1e-3), "k3")
    assert single.item() == pytest.approx(5.00167e-7, rel=1e-3)
