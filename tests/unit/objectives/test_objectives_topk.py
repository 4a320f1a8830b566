"""Top-K (A.3) by hand, against a dense computation in float64, and in the loss."""

from math import exp, log
from typing import Any

import pytest
import torch
from objectives_support import BETA, B, G, T, close
from torch import Tensor

from kdrl_core.objectives import kd_mask, kdrl_loss, topk_kl


def test_topk_kl_charges_the_floor_for_mass_outside() -> None:
    # Student (½, ¼, ¼). The teacher's top 2 are tokens 2 and 0 with odds 3 : 1, so π' = (¼, floor, ¾).
    # KL = ½ log(½ / ¼) + ¼ (log ¼ − (−5)) + ¼ log(¼ / ¾) = ½ log 2 + ¼ (5 − log 4) − ¼ log 3.
    kl = topk_kl(
        torch.tensor([[[0.5, 0.25, 0.25]]], dtype=torch.float64).log() + 7.0,
        torch.tensor([[[2, 0]]]),
        torch.tensor([[[3.0, 1.0]]], dtype=torch.float64).log() - 2.0,
        floor=-5.0,
    )
    assert kl.shape == (1, 1)
    assert kl.item() == pytest.approx(0.5 * log(2) + 0.25 * (5 - log(4)) - 0.25 * log(3), abs=1e-15)


def test_topk_floor_shows_the_papers_instability() -> None:
    """A student with 1 % of its mass outside pays 0.01 · |floor| there: the floor, not the teacher, dominates."""
    student = torch.tensor([[[0.99, 0.01]]], dtype=torch.float64).log()
    ids, logits = torch.tensor([[[0]]]), torch.zeros(1, 1, 1, dtype=torch.float64)
    entropy_part = 0.99 * log(0.99) + 0.01 * log(0.01)
    for floor in (-10.0, -100.0, -1e4):
        assert topk_kl(student, ids, logits, floor=floor).item() == pytest.approx(entropy_part - 0.01 * floor)


def test_topk_enters_as_it_is(batch: dict[str, Any]) -> None:
    topk = torch.rand(B, T, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    arguments = {**batch, "kl_estimator": "topk", "topk": topk, "kd_masking": "response", "teacher_logprobs": None}
    rollout = {"rollout_logprobs": batch["logprobs"].detach() + 1.0, "tis_cap": 2.0}
    mask = batch["response_mask"]
    weights = kd_mask(batch["rewards"], G, "response")[:, None]
    for extra in ({}, rollout):  # a sum over the vocabulary needs no importance weight
        loss, metrics = kdrl_loss(**arguments, **extra)
        close(torch.autograd.grad(loss, topk)[0], BETA * mask * weights / mask.sum())
        close(metrics["kd/kl"], (topk * mask * weights).sum().detach() / mask.sum())
        _, metrics = kdrl_loss(kd_weights=0.5 * weights[:, 0], **arguments, **extra)
        close(metrics["kd/kl"], 0.5 * (topk * mask * weights).sum().detach() / mask.sum())
        assert "kd/kl_sampled" not in metrics


class TestTopK:
    """A.3 against a dense computation in float64."""

    B, T, V, K = 3, 4, 11, 5
    FLOOR = -12.0

    def draw(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(3)
        student = torch.randn(self.B, self.T, self.V, generator=generator, dtype=torch.float64) * 2
        return student.requires_grad_(), torch.randn(
            self.B, self.T, self.V, generator=generator, dtype=torch.float64
        ) * 2

    def test_all_tokens_are_the_full_reverse_kl(self) -> None:
        student, teacher = self.draw()
        logits, ids = teacher.topk(self.V)
        kl = topk_kl(student, ids, logits, floor=self.FLOOR)
        log_p, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
        close(kl, (log_p.exp() * (log_p - log_t)).sum(-1))

    def test_value_and_gradient_are_the_dense_ones(self) -> None:
        student, teacher = self.draw()
        logits, ids = teacher.topk(self.K)
        kl = topk_kl(student, ids, logits.requires_grad_(), floor=self.FLOOR)
        # Dense: the other logits to −∞, softmax, log, and the floor in place of −∞; token by token in plain Python.
        expected = torch.zeros(self.B, self.T, dtype=torch.float64)
        slope = torch.zeros(self.B, self.T, self.V, dtype=torch.float64)
        for b in range(self.B):
            for t in range(self.T):
                kept = set(ids[b, t].tolist())
                normaliser = log(sum(exp(teacher[b, t, v].item()) for v in kept))
                log_t = [teacher[b, t, v].item() - normaliser if v in kept else self.FLOOR for v in range(self.V)]
                total = sum(exp(x) for x in student[b, t].tolist())
                p = [exp(x) / total for x in student[b, t].tolist()]
                value = sum(p[v] * (log(p[v]) - log_t[v]) for v in range(self.V))
                expected[b, t] = value
                # ∂KL/∂z_v = p_v (log p_v − log t_v − KL)
                for v in range(self.V):
                    slope[b, t, v] = p[v] * (log(p[v]) - log_t[v] - value)
        torch.testing.assert_close(kl.detach(), expected, rtol=1e-12, atol=1e-13)
        student_gradient, teacher_gradient = torch.autograd.grad(kl.sum(), (student, logits), allow_unused=True)
        torch.testing.assert_close(student_gradient, slope, rtol=1e-11, atol=1e-13)
        assert teacher_gradient is None

    def test_tokens_that_the_student_excludes_cost_nothing(self) -> None:
        """Logits of −∞, as of padding ids: 0 · log 0 is 0, in value and gradient, inside the top-K or out."""
        student, teacher = self.draw()
        logits, ids = teacher.topk(self.V)
        cut = student.detach().clone()
        cut[..., -1] = float("-inf")
        cut.requires_grad_()
        found = topk_kl(cut, ids, logits, floor=self.FLOOR)
        smaller = student[..., :-1].log_softmax(-1)
        close(found, (smaller.exp() * (smaller - teacher.log_softmax(-1)[..., :-1])).sum(-1))
        (slope,) = torch.autograd.grad(found.sum(), cut)
        assert slope.isfinite().all()
        assert not slope[..., -1].any()
        assert slope[..., :-1].any()
        outside = topk_kl(cut, torch.zeros_like(ids[..., :1]), logits[..., :1], floor=self.FLOOR)
        assert outside.isfinite().all()

    def test_padding_is_zero_with_zero_gradient(self) -> None:
        student, teacher = self.draw()
        logits, ids = teacher.topk(self.K)
        mask = torch.ones(self.B, self.T)
        mask[1, 2:] = 0
        clean = topk_kl(student, ids, logits, floor=self.FLOOR, response_mask=mask)
        dirty_student = student.detach().clone()
        dirty_student[1, 2:] = float("nan")
        logits[1, 2:], ids[1, 2:] = float("-inf"), -1
        dirty = topk_kl(dirty_student.requires_grad_(), ids, logits, floor=self.FLOOR, response_mask=mask)
        assert torch.equal(clean, dirty)
        assert dirty[1, 2:].tolist() == [0.0, 0.0]
        (student_gradient,) = torch.autograd.grad(dirty.sum(), dirty_student)
        assert student_gradient.isfinite().all()
        assert not student_gradient[1, 2:].any()
