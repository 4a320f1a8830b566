"""The expected gradient of each estimator over *all* sequences of a small world, without sampling.

Student and teacher are autoregressive softmax models over {a, b, EOS} that end at EOS or after 3 tokens: 15 sequences.
The expectation Σ_o π(o) ∇ℓ(o), π(o) held constant, is taken by `kdrl_loss` itself: kd_weights = π(o), total_tokens = 1.

Two exact gradients are in play, and (27) is the first:

- per token: Σ_prefix π(prefix) ∇KL(π(·|prefix) ‖ π_T(·|prefix)), the prefixes held as they were sampled;
- whole sequence: ∇ Σ_o π(o) log(π(o) / π_T(o)), which also credits a token with the KL of what follows it.

The token-level k2 has exactly the first; the second is k2 of the *summed* log-ratio, one "token" per sequence, or the
policy gradient with Â = Σ_t R_t (what reward shaping does). At one token per response the two are the same.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kdrl_core.objectives import kdrl_loss

EOS, VOCABULARY, LENGTH = 2, 3, 3


def draw_parameters(seed: int) -> tuple[Tensor, Tensor]:
    """Logits by previous token (the last row is "none") and by position: shared among prefixes, as in a network."""
    generator = torch.Generator().manual_seed(seed)
    by_previous = torch.randn(VOCABULARY + 1, VOCABULARY, generator=generator, dtype=torch.float64)
    by_position = torch.randn(LENGTH, VOCABULARY, generator=generator, dtype=torch.float64)
    return by_previous, by_position


def next_token_logprobs(parameters: tuple[Tensor, Tensor], prefix: tuple[int, ...]) -> Tensor:
    by_previous, by_position = parameters
    return (by_previous[prefix[-1] if prefix else VOCABULARY] + by_position[len(prefix)]).log_softmax(-1)


def sequences(max_length: int, prefix: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Every response: ends with EOS or is cut at `max_length`."""
    for token in range(VOCABULARY):
        response = (*prefix, token)
        if token == EOS or len(response) == max_length:
            yield response
        else:
            yield from sequences(max_length, response)


def padded_logprobs(parameters: tuple[Tensor, Tensor], responses: list[tuple[int, ...]], pad: float) -> Tensor:
    rows = []
    for response in responses:
        row = [next_token_logprobs(parameters, response[:t])[token] for t, token in enumerate(response)]
        rows.append(torch.stack(row + [torch.tensor(pad, dtype=torch.float64)] * (LENGTH - len(row))))
    return torch.stack(rows)


class World:
    """Student with gradient, teacher, all responses, and the two exact gradients."""

    def __init__(self, max_length: int = LENGTH) -> None:
        self.student, self.teacher = draw_parameters(0), draw_parameters(1)
        for parameter in self.student:
            parameter.requires_grad_()
        self.responses = list(sequences(max_length))
        self.mask = torch.tensor([[t < len(response) for t in range(LENGTH)] for response in self.responses])
        self.logprobs = padded_logprobs(self.student, self.responses, pad=float("nan"))
        self.teacher_logprobs = padded_logprobs(self.teacher, self.responses, pad=float("-inf"))
        self.probabilities = torch.where(self.mask, self.logprobs, 0.0).sum(1).exp()

    def gradient(self, scalar: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(scalar, self.student, retain_graph=True)])

    def log_ratio(self) -> Tensor:
        return torch.where(self.mask, self.teacher_logprobs - self.logprobs, 0.0)

    def exact_sequence_gradient(self) -> Tensor:
        return self.gradient(-(self.probabilities * self.log_ratio().sum(1)).sum())

    def exact_token_gradient(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for prefix in {response[:t] for response in self.responses for t in range(len(response))}:
            reached = torch.tensor([response[: len(prefix)] == prefix for response in self.responses])
            student = next_token_logprobs(self.student, prefix)
            kl = (student.exp() * (student - next_token_logprobs(self.teacher, prefix))).sum()
            total = total + self.probabilities[reached].sum().detach() * kl
        return self.gradient(total)

    def expected(self, estimator: str, **changes: Any) -> tuple[Tensor, float]:
        """Gradient and value of E_{o∼π}[Σ_t KL estimate], through the loss."""
        arguments: dict[str, Any] = {
            "logprobs": self.logprobs,
            "teacher_logprobs": self.teacher_logprobs,
            "response_mask": self.mask,
            "advantages": torch.zeros(len(self.responses)),
            "rewards": None,
            "group_size": None,
            "kd_weights": self.probabilities.detach(),
            "beta": 1.0,
            "total_tokens": 1.0,
            "kl_estimator": estimator,
        }
        loss, metrics = kdrl_loss(**(arguments | changes))
        return self.gradient(loss), metrics["kd/kl"].item()


@pytest.fixture
def world() -> World:
    return World()


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return float((actual - exact).norm() / exact.norm())


def test_the_world_is_complete(world: World) -> None:
    assert len(world.responses) == 1 + 2 + 4 * 3
    assert world.probabilities.sum().item() == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize(
    ("estimator", "has_unbiased_gradient", "has_unbiased_value"),
    [("k1", True, True), ("k2", True, False), ("k3", False, True), ("k3_k2grad", True, True)],
)
def test_expected_gradient_and_value(
    world: World, estimator: str, has_unbiased_gradient: bool, has_unbiased_value: bool
) -> None:
    gradient, value = world.expected(estimator)
    error = relative_error(gradient, world.exact_token_gradient())
    assert error < 1e-13 if has_unbiased_gradient else error > 0.1, error
    exact = -(world.probabilities * world.log_ratio().sum(1)).sum().item()
    assert exact > 0.1  # otherwise a relative tolerance would say nothing
    assert (abs(value / exact - 1) < 1e-13) == has_unbiased_value, (value, exact)


def test_k3_has_the_gradient_of_the_forward_kl(world: World) -> None:
    """Σ_prefix π(prefix) ∇KL(π_T ‖ π): its bias has a name."""
    total = torch.zeros((), dtype=torch.float64)
    for prefix in {response[:t] for response in world.responses for t in range(len(response))}:
        reached = torch.tensor([response[: len(prefix)] == prefix for response in world.responses])
        teacher = next_token_logprobs(world.teacher, prefix)
        forward = (teacher.exp() * (teacher - next_token_logprobs(world.student, prefix))).sum()
        total = total + world.probabilities[reached].sum().detach() * forward
    assert relative_error(world.expected("k3")[0], world.gradient(total)) < 1e-13


def test_differentiated_k1_has_no_expected_gradient(world: World) -> None:
    """E[∇log π] = 0: what a peer back-propagates teaches nothing."""
    direct = (world.probabilities.detach() * -world.log_ratio().sum(1)).sum()
    assert world.gradient(direct).norm() < 1e-14
    assert world.exact_token_gradient().norm() > 0.1


def sequence_sums(world: World) -> dict[str, Tensor]:
    """One "token" per response: its whole log-probability."""
    return {
        "logprobs": torch.where(world.mask, world.logprobs, 0.0).sum(1, keepdim=True),
        "teacher_logprobs": torch.where(world.mask, world.teacher_logprobs, 0.0).sum(1, keepdim=True),
        "response_mask": torch.ones(len(world.responses), 1),
    }


@pytest.mark.parametrize(("estimator", "is_unbiased"), [("k1", True), ("k2", True), ("k3", False)])
def test_summed_log_ratios_give_the_gradient_of_the_sequence_kl(
    world: World, estimator: str, is_unbiased: bool
) -> None:
    error = relative_error(world.expected(estimator, **sequence_sums(world))[0], world.exact_sequence_gradient())
    assert error < 1e-13 if is_unbiased else error > 0.1, error


def test_summed_log_ratios_as_advantage_give_it_too(world: World) -> None:
    """Policy gradient with Â = Σ_t R_t: the expected effect of reward shaping before normalisation (Sec. 3.1)."""
    advantages = (world.probabilities * world.log_ratio().sum(1)).detach()
    gradient, _ = world.expected("k2", advantages=advantages, beta=0.0)
    assert relative_error(gradient, world.exact_sequence_gradient()) < 1e-13


def test_per_token_and_sequence_kl_differ_beyond_one_token(world: World) -> None:
    """What (27) leaves out: the influence of a token on the KL of those that follow it."""
    assert relative_error(world.exact_token_gradient(), world.exact_sequence_gradient()) > 0.1
    one_token = World(max_length=1)
    assert relative_error(one_token.exact_token_gradient(), one_token.exact_sequence_gradient()) < 1e-13
    assert relative_error(one_token.expected("k2")[0], one_token.exact_sequence_gradient()) < 1e-13


def test_the_joint_loss_is_policy_gradient_plus_kd(world: World) -> None:
    """(8) and (27) in expectation: ∇E[Â Σ_t 1] by REINFORCE minus β times the reverse KL's gradient."""
    rewards = torch.linspace(0.0, 1.0, len(world.responses), dtype=torch.float64)
    beta, weights = 0.3, world.probabilities.detach()
    gradient, _ = world.expected("k2", advantages=weights * rewards, beta=beta)
    exact = world.gradient((world.probabilities * rewards).sum()) - beta * world.exact_token_gradient()
    assert relative_error(-gradient, exact) < 1e-13
