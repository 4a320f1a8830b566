"""The metrics of the joint loss: the loss is the sum of its parts, and every share and mean says what it says."""

from typing import Any

import pytest
import torch
from objectives_support import BETA, B, G, T, close, log_ratio

from kdrl_core.objectives import LOSS_METRICS, kd_mask, kdrl_loss


@pytest.mark.parametrize("aggregation", ["token_mean", "group_mean"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3_k2grad", "topk"])
def test_the_loss_is_the_sum_of_its_metrics(batch: dict[str, Any], estimator: str, aggregation: str) -> None:
    generator = torch.Generator().manual_seed(2)
    arguments = batch | {
        "kl_estimator": estimator,
        "aggregation": aggregation,
        "kd_masking": "response",
        "topk": torch.rand(B, T, generator=generator, dtype=torch.float64),
        "old_logprobs": batch["logprobs"].detach() + 0.3,
        "clip_low": 0.1,
        "rollout_logprobs": batch["logprobs"].detach() - 0.1,
        "tis_cap": 1.2,
        "ref_logprobs": batch["teacher_logprobs"].flip(0),
        "ref_beta": 0.01,
        "entropy": torch.rand(B, T, generator=generator, dtype=torch.float64),
        "entropy_coef": 0.02,
    }
    loss, metrics = kdrl_loss(**arguments)
    assert set(metrics) == set(LOSS_METRICS)
    assert all(
        value.ndim == 0 and not value.requires_grad and value.dtype == torch.float64 for value in metrics.values()
    )
    close(metrics["loss/total"], loss.detach())
    parts = metrics["loss/policy"] + BETA * metrics["kd/kl"] + 0.01 * metrics["ref/kl"] - 0.02 * metrics["entropy"]
    close(metrics["loss/total"], parts)


def test_kl_metrics_under_a_mask(batch: dict[str, Any]) -> None:
    """kd/kl keeps the denominator; kd/kl_unmasked (Fig. 5) divides by the tokens on which KD acts."""
    _, metrics = kdrl_loss(kd_masking="response", **batch)
    mask, weights = batch["response_mask"], kd_mask(batch["rewards"], G, "response")[:, None]
    kl = 0.5 * log_ratio(batch) ** 2 * mask
    close(metrics["kd/kl"], (kl * weights).sum() / mask.sum())
    close(metrics["kd/kl_unmasked"], (kl * weights).sum() / (mask * weights).sum())
    close(metrics["kd/active_frac"], (mask * weights).sum() / mask.sum())
    close(metrics["kd/kl_unmasked"], metrics["kd/kl"] / metrics["kd/active_frac"])
    close(metrics["kd/kl_sampled"], (-log_ratio(batch) * mask).sum() / mask.sum())
    _, metrics = kdrl_loss(kd_weights=torch.zeros(B), **batch)
    assert metrics["kd/kl_unmasked"].item() == 0.0


def test_a_micro_batch_cannot_tell_the_unmasked_kl_without_the_global_count(batch: dict[str, Any]) -> None:
    """Dividing by its own count would not add up over micro-batches; the quotient of two metrics does."""
    _, metrics = kdrl_loss(kd_masking="response", total_tokens=56, **batch)
    assert "kd/kl_unmasked" not in metrics
    _, whole = kdrl_loss(kd_masking="response", **batch)
    close(metrics["kd/kl"] / metrics["kd/active_frac"], whole["kd/kl_unmasked"])


def test_metrics_are_absent_without_their_inputs(batch: dict[str, Any]) -> None:
    _, metrics = kdrl_loss(**(batch | {"beta": 0.0, "teacher_logprobs": None}))
    assert set(metrics) == {"loss/total", "loss/policy"}
