"""Of which KL is each estimator's expected gradient the gradient? By enumeration in float64, and in closed form.

One token: the reverse KL for k1 (as policy gradient), k2 and k3_k2grad; the *forward* KL for k3.
More tokens: as for one, prefix by prefix. What is missing to the KL of whole responses has a closed form: for
each token, how the KL of what follows it differs from what follows on average. Where the next token does not depend on
the prefix there is nothing missing. Top-K: the KL to the renormalised teacher, plus −floor · the mass outside.
"""

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdrl_core.objectives import kdrl_loss, kl_estimate, topk_kl

REVERSE = ("k1", "k2", "k3_k2grad")


def parameter(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).requires_grad_()


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.5


def expected_gradient(log_p: Tensor, log_q: Tensor, estimator: str, logits: Tensor) -> Tensor:
    """Σ_v p_v ∇KL estimate(v), p_v held constant; the vocabulary in place of the tokens of one response."""
    estimate = kl_estimate(log_p[None], log_q[None], estimator)[0]
    return torch.autograd.grad((log_p.exp().detach() * estimate).sum(), logits, retain_graph=True)[0]


def test_three_tokens_by_hand() -> None:
    # p = (½, .3, .2), q = (.2, .3, ½): R = (−a, 0, a) with a = log 2.5 = 0.9163, KL = ½ a − .2 a = .3 a = 0.2749.
    # Reverse KL by the logits: p (−R − KL) = (½ · .7 a, −.3 · .3 a, −.2 · 1.3 a) = (.35 a, −.09 a, −.26 a).
    # k3: Σ_v p_v (1 − e^R_v)(1[v = u] − p_u) = p − q = (.3, 0, −.3): off by 26 % of its length.
    logits = parameter([0.5, 0.3, 0.2]).log().detach().requires_grad_()
    log_p, log_q = logits.log_softmax(-1), parameter([0.2, 0.3, 0.5]).detach().log()
    a = torch.tensor(2.5, dtype=torch.float64).log()
    exact = a * torch.tensor([0.35, -0.09, -0.26], dtype=torch.float64)
    for name in REVERSE:
        torch.testing.assert_close(expected_gradient(log_p, log_q, name, logits), exact, rtol=1e-13, atol=1e-15)
    k3 = expected_gradient(log_p, log_q, "k3", logits)
    torch.testing.assert_close(k3, torch.tensor([0.3, 0.0, -0.3], dtype=torch.float64), rtol=1e-13, atol=1e-15)
    assert ((k3 - exact).norm() / exact.norm()).item() == pytest.approx(0.2577, abs=1e-4)


LOGIT = st.floats(-5.0, 5.0)


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 6).flatmap(lambda size: st.tuples(*[st.lists(LOGIT, min_size=size, max_size=size)] * 2)))
def test_one_token_of_any_vocabulary(both: tuple[list[float], list[float]]) -> None:
    logits = parameter(both[0])
    log_p, log_q = logits.log_softmax(-1), parameter(both[1]).detach().log_softmax(-1)
    p, q = log_p.exp().detach(), log_q.exp()
    kl = (p * (log_p - log_q)).sum().detach()
    reverse, forward = (p * (log_p - log_q - kl)).detach(), p - q
    for name in REVERSE:
        torch.testing.assert_close(expected_gradient(log_p, log_q, name, logits), reverse, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(expected_gradient(log_p, log_q, "k3", logits), forward, rtol=1e-10, atol=1e-10)
    for name, is_unbiased in {"k1": True, "k2": False, "k3": True, "k3_k2grad": True}.items():
        value = (p * kl_estimate(log_p[None], log_q[None], name)[0]).sum()
        if is_unbiased:
            torch.testing.assert_close(value.detach(), kl, rtol=1e-9, atol=1e-11)


class Tree:
    """Two tokens of a vocabulary of V: every distribution has its own logits, the second's by the first token."""

    V = 3

    def __init__(self, second_depends_on_first: bool = True) -> None:
        rows = self.V if second_depends_on_first else 1
        self.first, self.second = draw(self.V, seed=1).requires_grad_(), draw(rows, self.V, seed=2).requires_grad_()
        self.responses = torch.tensor(list(product(range(self.V), repeat=2)))
        self.logprobs = self.of(self.first, self.second)
        self.teacher_logprobs = self.of(draw(self.V, seed=3), draw(rows, self.V, seed=4))
        self.probabilities = self.logprobs.sum(1).exp()

    def of(self, first: Tensor, second: Tensor) -> Tensor:
        a, b = self.responses.T
        return torch.stack([first.log_softmax(-1)[a], second.expand(self.V, -1).log_softmax(-1)[a, b]], 1)

    def gradients(self, scalar: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(scalar, (self.first, self.second), retain_graph=True)

    def expected(self, estimator: str) -> tuple[Tensor, ...]:
        estimates = kl_estimate(self.logprobs, self.teacher_logprobs, estimator).sum(1)
        return self.gradients((self.probabilities.detach() * estimates).sum())

    def whole(self) -> tuple[Tensor, ...]:
        return self.gradients((self.probabilities * (self.logprobs - self.teacher_logprobs).sum(1)).sum())


@pytest.mark.parametrize("estimator", REVERSE)
def test_what_is_missing_to_the_kl_of_whole_responses(estimator: str) -> None:
    """∇KL_whole − E[∇estimate] is p_a (KL_a − Σ p KL) at the first token a, KL_a that of the second token after a."""
    tree = Tree()
    (first, second), (whole_first, whole_second) = tree.expected(estimator), tree.whole()
    torch.testing.assert_close(second, whole_second, rtol=1e-12, atol=1e-14)  # nothing follows the last token
    p = tree.first.softmax(-1).detach()
    second_logprobs, second_teacher = (x[:, 1].view(3, 3).detach() for x in (tree.logprobs, tree.teacher_logprobs))
    kl_after = (second_logprobs.exp() * (second_logprobs - second_teacher)).sum(1)
    missing = p * (kl_after - (p * kl_after).sum())
    assert missing.norm() > 0.1
    torch.testing.assert_close(whole_first - first, missing, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("estimator", REVERSE)
def test_nothing_is_missing_where_tokens_are_independent(estimator: str) -> None:
    tree = Tree(second_depends_on_first=False)
    torch.testing.assert_close(tree.expected(estimator), tree.whole(), rtol=1e-12, atol=1e-14)
    differences = [(a - b).norm() / b.norm() for a, b in zip(tree.expected("k3"), tree.whole(), strict=True)]
    assert min(differences) > 0.01
    assert max(differences) > 0.1


def test_topk_has_the_gradient_of_its_own_kl_and_the_floor_in_it() -> None:
    """It is exact for what it aims at, and that moves away from the teacher linearly as the floor sinks."""
    logits, teacher = draw(1, 1, 6, seed=5).requires_grad_(), draw(1, 1, 6, seed=6)
    kept, ids = teacher.topk(4)

    def gradient(scalar: Tensor) -> Tensor:
        return torch.autograd.grad(scalar, logits, retain_graph=True)[0]

    p = logits.softmax(-1)
    mass_outside = 1 - p.gather(-1, ids).sum()
    dense = gradient((p * (p.log() - teacher.log_softmax(-1))).sum())
    at = {floor: gradient(topk_kl(logits, ids, kept, floor=floor).sum()) for floor in (0.0, -10.0, -20.0, -100.0)}
    for floor, found in at.items():
        torch.testing.assert_close(found, at[0.0] - floor * gradient(mass_outside), rtol=1e-12, atol=1e-14)
    errors = [((found - dense).norm() / dense.norm()).item() for found in at.values()]
    assert errors[1:] == sorted(errors[1:])
    assert errors[-1] > 5.0
    # With the floor at each outside token's own log-probability, and no renormalisation, it would be dense: K = V.
    everything, all_ids = teacher.topk(6)
    torch.testing.assert_close(gradient(topk_kl(logits, all_ids, everything, floor=-10.0).sum()), dense)


def test_a_batch_divided_by_its_own_count_is_biased_by_the_lengths() -> None:
    """Responses of 1 or 2 tokens (token 0 ends): k2 is exact under a fixed divisor, and not under the batch's own."""
    tree = Tree()
    is_short = tree.responses[:, 0] == 0
    keep = ~is_short | (tree.responses[:, 1] == 0)  # one response "0", not three
    mask = torch.stack([torch.ones_like(is_short), ~is_short], 1)[keep]
    logprobs, teacher = tree.logprobs[keep], tree.teacher_logprobs[keep]
    weights = torch.where(mask, logprobs, 0.0).sum(1).exp().detach()
    assert weights.sum().item() == pytest.approx(1.0)
    mean_length = float(weights @ mask.sum(1).double())

    def expected(total_tokens: float | None) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for row in torch.arange(len(weights)).split(1):
            loss, _ = kdrl_loss(
                logprobs[row],
                advantages=torch.zeros(1),
                teacher_logprobs=teacher[row],
                response_mask=mask[row],
                rewards=None,
                group_size=None,
                beta=1.0,
                total_tokens=total_tokens,
            )
            total = total + weights[row] * loss.squeeze()
        return torch.cat([x.flatten() for x in tree.gradients(total.sum())])

    kl_first = (tree.first.softmax(-1) * (tree.first.log_softmax(-1) - draw(3, seed=3).log_softmax(-1))).sum()
    second, other = tree.second.log_softmax(-1), draw(3, 3, seed=4).log_softmax(-1)
    kl_second = (second.exp() * (second - other)).sum(1)
    exact = kl_first + (tree.first.softmax(-1).detach()[1:] * kl_second[1:]).sum()
    exact_gradient = torch.cat([x.flatten() for x in tree.gradients(exact / mean_length)])
    torch.testing.assert_close(expected(mean_length), exact_gradient, rtol=1e-11, atol=1e-13)
    assert (expected(None) - exact_gradient).norm() / exact_gradient.norm() > 0.05
