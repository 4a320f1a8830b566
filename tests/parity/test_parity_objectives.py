"""The trainer's other losses against the formula written out and differentiated by autograd: Top-K (A.3), truncated
importance weights, the per-group mean of (2), SFT (14)."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity.conftest import dense_log_probabilities, dense_logprobs
from parity.ranks import with_objective

from kdrl_core.engines.transformers_engines import TransformersScorer
from kdrl_core.models.loading import load_model
from kdrl_core.training.protocols import OptimizerSettings, UpdateBatch
from kdrl_core.training.torch_trainer import TorchTrainer
from kdrl_core.types import Rollout, ScoreRequest

TEMPERATURE = 0.7
K, FLOOR = 5, -12.0
GROUP_SIZE = 3


@pytest.fixture(scope="module")
def sequences(rollouts: list[Rollout]) -> list[ScoreRequest]:
    return [ScoreRequest(prompt_token_ids=r.prompt_token_ids, token_ids=r.token_ids) for r in rollouts]


@pytest.fixture(scope="module")
def batch(sequences: list[ScoreRequest]) -> UpdateBatch:
    advantages = np.random.default_rng(0).normal(size=len(sequences)).astype(np.float32)
    weights = [float(row % 3 != 0) for row in range(len(sequences))]
    return UpdateBatch(sequences=sequences, advantages=advantages.tolist(), kd_weights=weights)


def trained(path: Path, tokenizer: Any, batch: UpdateBatch, micro_batch_tokens: int = 300) -> tuple[torch.Tensor, Any]:
    """The gradient of one step of the trainer, and what it reported."""
    model = load_model(path)
    settings = OptimizerSettings(
        temperature=TEMPERATURE,
        learning_rate=1e-5,
        weight_decay=0.0,
        warmup_steps=0,
        max_grad_norm=1e9,
        micro_batch_tokens=micro_batch_tokens,
    )
    trainer = TorchTrainer(model, tokenizer, settings)
    stats = trainer.update(batch)
    return gradient(model), stats


def gradient(model: Any) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def assert_same_gradient(path: Path, tokenizer: Any, batch: UpdateBatch, loss: Callable[[Any], torch.Tensor]) -> Any:
    """The trainer's gradient is that of `loss(model)`, one unpadded sequence at a time. Returns the trainer's stats."""
    ours, stats = trained(path, tokenizer, batch)
    model = load_model(path)
    value = loss(model)
    value.backward()
    expected = gradient(model)
    assert float((ours - expected).norm() / expected.norm()) < 1e-5
    assert stats.metrics["loss/total"] == pytest.approx(float(value.detach()), rel=1e-4)
    return stats


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_topk_scores_are_the_dense_ones(teacher: Any, sequences: list[ScoreRequest], temperature: float) -> None:
    scorer = TransformersScorer(teacher, temperature=temperature, batch_tokens=400)
    plain = scorer.score(sequences)
    for row, (score, sequence) in enumerate(zip(scorer.score_topk(sequences, K), sequences, strict=True)):
        dense = dense_log_probabilities(teacher, sequence, temperature).detach()
        best = dense.topk(K).values
        assert np.allclose(score.topk_logprobs, best, atol=2e-5, rtol=2e-5)
        assert np.allclose(dense.gather(-1, torch.from_numpy(score.topk_ids).long()), best, atol=2e-5, rtol=2e-5)
        assert np.array_equal(score.logprobs, plain[row])
        assert score.topk_ids.shape == (len(sequence.token_ids), K)
        assert (score.topk_ids.dtype, score.topk_logprobs.dtype) == (np.int32, np.float32)


def test_topk_keeps_no_padding_ids(teacher: Any, sequences: list[ScoreRequest]) -> None:
    """An embedding may have more rows than the tokenizer has tokens; their logits mean nothing."""
    scorer = TransformersScorer(teacher, temperature=1.0, batch_tokens=400, num_tokens=12)
    ids = np.concatenate([score.topk_ids.ravel() for score in scorer.score_topk(sequences, 12)])
    assert set(ids.tolist()) == set(range(12))
    with pytest.raises(ValueError, match="k: expected 1 to 12, the tokens of the vocabulary, given 13"):
        scorer.score_topk(sequences, 13)


def test_topk_gradient_is_the_dense_reverse_kls(
    student_dir: Path, teacher: Any, tokenizer: Any, batch: UpdateBatch
) -> None:
    scores = TransformersScorer(teacher, temperature=TEMPERATURE, batch_tokens=400).score_topk(batch.sequences, K)
    full = replace(
        with_objective(batch, beta=0.3, kl_estimator="topk", topk_floor=FLOOR, entropy_coef=0.0),
        teacher_logprobs=[s.logprobs for s in scores],
        topk_ids=[s.topk_ids for s in scores],
        topk_logprobs=[s.topk_logprobs for s in scores],
    )

    def loss(model: Any) -> torch.Tensor:
        total = torch.zeros(())
        for row, sequence in enumerate(batch.sequences):
            student = dense_log_probabilities(model, sequence, TEMPERATURE)
            best = dense_log_probabilities(teacher, sequence, TEMPERATURE).detach().topk(K)
            target = torch.full_like(student, FLOOR).scatter(-1, best.indices, best.values.log_softmax(-1))
            total = total - batch.advantages[row] * ratio(own(student, sequence)).sum()
            total = total + 0.3 * batch.kd_weights[row] * (student.exp() * (student - target)).sum()
        return total / num_tokens(batch)

    stats = assert_same_gradient(student_dir, tokenizer, full, loss)
    assert stats.metrics["kd/kl"] > 0


def test_importance_weights_are_the_capped_ratios(student_dir: Path, tokenizer: Any, batch: UpdateBatch) -> None:
    cap = 1.2
    rng = np.random.default_rng(1)
    with torch.no_grad():
        exact = [dense_logprobs(load_model(student_dir), s, TEMPERATURE).numpy() for s in batch.sequences]
    engine = [row + rng.normal(scale=0.4, size=len(row)).astype(np.float32) for row in exact]
    weights = [np.minimum(np.exp(ours - theirs), cap) for ours, theirs in zip(exact, engine, strict=True)]

    def loss(model: Any) -> torch.Tensor:
        total = torch.zeros(())
        for row, sequence in enumerate(batch.sequences):
            logprobs = dense_logprobs(model, sequence, TEMPERATURE)
            total = total - batch.advantages[row] * (torch.from_numpy(weights[row]) * ratio(logprobs)).sum()
        return total / num_tokens(batch)

    weighted = replace(with_objective(batch, tis_cap=cap), rollout_logprobs=engine)
    stats = assert_same_gradient(student_dir, tokenizer, weighted, loss)
    every = np.concatenate(weights)
    assert stats.metrics["ratio/tis_mean"] == pytest.approx(every.mean(), rel=1e-4)
    assert stats.metrics["ratio/tis_capped_frac"] == pytest.approx((every >= cap).mean(), abs=2 / len(every))


def test_group_mean_is_the_mean_of_the_groups_means(student_dir: Path, tokenizer: Any, batch: UpdateBatch) -> None:
    """Micro-batches are cut by length, so they split every group."""

    def loss(model: Any) -> torch.Tensor:
        means = []
        for start in range(0, len(batch.sequences), GROUP_SIZE):
            rows = range(start, start + GROUP_SIZE)
            surrogates = [
                batch.advantages[row] * ratio(dense_logprobs(model, batch.sequences[row], TEMPERATURE)) for row in rows
            ]
            means.append(torch.cat(surrogates).sum() / sum(len(batch.sequences[row].token_ids) for row in rows))
        return -torch.stack(means).mean()

    whole = with_objective(batch, aggregation="group_mean", group_size=GROUP_SIZE)
    assert_same_gradient(student_dir, tokenizer, whole, loss)
    with pytest.raises(ValueError, match="group_size: expected a divisor of the 24 responses, given 7"):
        trained(student_dir, tokenizer, with_objective(whole, group_size=7))


@pytest.mark.parametrize("aggregation", ["response_mean", "token_mean"])
def test_sft_is_the_mean_negative_log_likelihood(
    student_dir: Path, tokenizer: Any, batch: UpdateBatch, aggregation: str
) -> None:
    """(14) written out and differentiated; in one micro-batch, in some, in one for each response."""
    sft = with_objective(batch, kind="sft", aggregation=aggregation)
    sft = replace(sft, advantages=[np.nan] * len(batch.sequences))  # not read
    model = load_model(student_dir)
    each = [dense_logprobs(model, s, TEMPERATURE) for s in batch.sequences]
    loss = -(torch.cat(each) if aggregation == "token_mean" else torch.stack([own.mean() for own in each])).mean()
    loss.backward()
    whole, stats = trained(student_dir, tokenizer, sft, 100_000)
    for micro_batch_tokens in (250, 1):
        ours, _ = trained(student_dir, tokenizer, sft, micro_batch_tokens)
        assert float((ours - whole).norm() / whole.norm()) < 1e-6
    assert float((whole - gradient(model)).norm() / gradient(model).norm()) < 1e-5
    assert stats.metrics["loss/sft"] == stats.metrics["loss/total"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert set(stats.metrics) == {"loss/sft", "loss/total", "optim/grad_norm", "optim/learning_rate"}


def ratio(logprobs: torch.Tensor) -> torch.Tensor:
    """ρ on-policy: 1, with gradient ∇log π_θ."""
    return (logprobs - logprobs.detach()).exp()


def own(table: torch.Tensor, sequence: ScoreRequest) -> torch.Tensor:
    """[T] entries of the response's own tokens."""
    return table.gather(-1, torch.tensor(list(sequence.token_ids))[:, None]).squeeze(1)


def num_tokens(batch: UpdateBatch) -> int:
    """Response tokens of the step."""
    return sum(len(sequence.token_ids) for sequence in batch.sequences)
