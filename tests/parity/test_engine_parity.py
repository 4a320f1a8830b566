"""Engine, scorer and trainer against transformers itself and against a dense reference, on the miniature student."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdrl_core.config import resolve_path
from kdrl_core.engines.models import load_model, load_tokenizer, stop_token_ids
from kdrl_core.engines.transformers_rollout import TransformersRolloutEngine
from kdrl_core.engines.transformers_scorer import TransformersScorer
from kdrl_core.ledger import derive_seed
from kdrl_core.training.protocols import UpdateBatch
from kdrl_core.training.torch_trainer import TorchTrainer
from kdrl_core.types import FinishReason, Rollout, RolloutRequest, ScoreRequest

STUDENT = resolve_path("builtin:miniature/student")
QUESTIONS = ["3+5", "7*2-4", "1+2+3*4-5+6", "9-9*9", "4*4*4*4*4"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(STUDENT)


def prompt_ids(tokenizer: Any, question: str) -> list[int]:
    return tokenizer.encode(f"<|user|>{question}<|assistant|>", add_special_tokens=False)


def sample(
    tokenizer: Any,
    *,
    temperature: float,
    batch_size: int = 64,
    samples: int = 4,
    limit: int = 48,
    reverse: bool = False,
) -> list[Rollout]:
    model = load_model(STUDENT)
    engine = TransformersRolloutEngine(
        model,
        tokenizer,
        stop_ids=stop_token_ids(model, tokenizer),
        temperature=temperature,
        max_response_tokens=limit,
        batch_size=batch_size,
    )
    requests = [
        RolloutRequest(prompt_id=q, sample=s, prompt_token_ids=prompt_ids(tokenizer, q), seed=derive_seed(3, q, s))
        for q in QUESTIONS
        for s in range(samples)
    ]
    rollouts = engine.generate(list(reversed(requests)) if reverse else requests)
    return list(reversed(rollouts)) if reverse else rollouts


def dense_logprobs(model: Any, rollout: Any, temperature: float) -> np.ndarray:
    """The reference: one full forward pass of one sequence, no padding, no cache."""
    prompt, response = list(rollout.prompt_token_ids), list(rollout.token_ids)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    table = (logits.double() / temperature).log_softmax(-1)
    return table[torch.arange(len(response)), response].numpy()


def test_greedy_equals_generate(tokenizer: Any) -> None:
    model = load_model(STUDENT)
    for rollout in sample(tokenizer, temperature=0.0, samples=1):
        prompt = torch.tensor([list(rollout.prompt_token_ids)])
        expected = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=48, temperature=None
        )[0, prompt.shape[1] :]
        assert list(rollout.token_ids) == expected.tolist()


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_sampled_logprobs_are_those_of_scaled_logits(tokenizer: Any, temperature: float) -> None:
    model = load_model(STUDENT)
    for rollout in sample(tokenizer, temperature=temperature):
        np.testing.assert_allclose(rollout.logprobs, dense_logprobs(model, rollout, temperature), atol=1e-5)
        assert (rollout.token_ids[-1] == tokenizer.eos_token_id) == (rollout.finish_reason is FinishReason.STOP)
        assert tokenizer.eos_token_id not in list(rollout.token_ids)[:-1]


def test_a_response_does_not_depend_on_its_batch(tokenizer: Any) -> None:
    together = sample(tokenizer, temperature=1.0)
    for other in (
        sample(tokenizer, temperature=1.0, batch_size=3),
        sample(tokenizer, temperature=1.0, reverse=True),
    ):
        assert [list(r.token_ids) for r in other] == [list(r.token_ids) for r in together]


def test_truncated_responses_have_no_eos(tokenizer: Any) -> None:
    for rollout in sample(tokenizer, temperature=1.0, limit=5):
        assert len(rollout.token_ids) <= 5
        if rollout.finish_reason is FinishReason.LENGTH:
            assert len(rollout.token_ids) == 5
            assert tokenizer.eos_token_id not in rollout.token_ids


def test_first_tokens_follow_the_distribution(tokenizer: Any) -> None:
    """Frequencies of the first sampled token over many seeds, against softmax(logits / T) at T = 2."""
    model, count = load_model(STUDENT), 4_000
    prompt = prompt_ids(tokenizer, "3+5")
    engine = TransformersRolloutEngine(
        model, tokenizer, stop_ids=[1], temperature=2.0, max_response_tokens=1, batch_size=count
    )
    requests = [RolloutRequest(prompt_id="q", sample=s, prompt_token_ids=prompt, seed=s) for s in range(count)]
    tokens = [rollout.token_ids[0] for rollout in engine.generate(requests)]
    with torch.no_grad():
        expected = (model(input_ids=torch.tensor([prompt])).logits[0, -1] / 2.0).softmax(-1).numpy()
    frequency = np.bincount(tokens, minlength=len(expected)) / count
    np.testing.assert_allclose(frequency, expected, atol=5 * np.sqrt(0.25 / count))


@pytest.mark.parametrize("batch_tokens", [64, 100_000])
def test_scorer_equals_dense_reference_at_the_students_temperature(tokenizer: Any, batch_tokens: int) -> None:
    teacher = load_model(resolve_path("builtin:miniature/teacher"))
    rollouts = sample(tokenizer, temperature=1.0)
    scorer = TransformersScorer(teacher, temperature=0.6, batch_tokens=batch_tokens)
    scores = scorer.score([ScoreRequest(prompt_token_ids=r.prompt_token_ids, token_ids=r.token_ids) for r in rollouts])
    for rollout, score in zip(rollouts, scores, strict=True):
        np.testing.assert_allclose(score, dense_logprobs(teacher, rollout, 0.6), atol=1e-4)


def _trainer(tokenizer: Any, *, micro_batch_tokens: int = 100_000, learning_rate: float = 1e-3) -> TorchTrainer:
    return TorchTrainer(
        load_model(STUDENT),
        tokenizer,
        temperature=1.0,
        learning_rate=learning_rate,
        weight_decay=0.0,
        warmup_steps=0,
        max_grad_norm=1.0,
        micro_batch_tokens=micro_batch_tokens,
    )


def _batch(tokenizer: Any, *, advantages: float | None = None) -> tuple[UpdateBatch, list[Rollout]]:
    rollouts = sample(tokenizer, temperature=1.0)
    rng = np.random.default_rng(0)
    size = len(rollouts)
    batch = UpdateBatch(
        sequences=[ScoreRequest(prompt_token_ids=r.prompt_token_ids, token_ids=r.token_ids) for r in rollouts],
        advantages=rng.normal(size=size).tolist() if advantages is None else [advantages] * size,
        kd_weights=[1.0, 0.0] * (size // 2),
        teacher_logprobs=[np.array(r.logprobs, np.float32) - 0.3 for r in rollouts] if advantages is None else None,
        ref_logprobs=None,
        beta=0.1 if advantages is None else 0.0,
        kl_estimator="k2",
        ref_beta=0.0,
        ref_kl_estimator="k3",
        entropy_coef=0.001 if advantages is None else 0.0,
        group_size=4,
    )
    return batch, rollouts


def test_trainer_logprobs_equal_the_engines(tokenizer: Any) -> None:
    batch, rollouts = _batch(tokenizer)
    stats = _trainer(tokenizer).update(batch)
    for rollout, logprobs in zip(rollouts, stats.logprobs, strict=True):
        np.testing.assert_allclose(logprobs, rollout.logprobs, atol=1e-5)


def test_micro_batches_change_nothing(tokenizer: Any) -> None:
    """One forward pass or eight, ragged lengths: the same update and the same metrics (PITFALLS 4)."""
    batch, _ = _batch(tokenizer)
    whole, cut = _trainer(tokenizer), _trainer(tokenizer, micro_batch_tokens=128)
    first, second = whole.update(batch), cut.update(batch)
    assert first.metrics.keys() == second.metrics.keys()
    for name, value in first.metrics.items():
        assert second.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    for a, b in zip(whole._optimizer.param_groups[0]["params"], cut._optimizer.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-3)


def test_no_signal_moves_nothing(tokenizer: Any) -> None:
    """Groups without variance, no teacher, no entropy bonus: Â = 0 leaves the weights as they are (PITFALLS 6)."""
    batch, _ = _batch(tokenizer, advantages=0.0)
    trainer = _trainer(tokenizer)
    before = [p.detach().clone() for p in trainer._model.parameters()]
    assert trainer.update(batch).metrics["optim/grad_norm"] == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, trainer._model.parameters(), strict=True))


def test_saved_trainer_goes_on_bit_for_bit(tokenizer: Any, tmp_path: Path) -> None:
    batch, _ = _batch(tokenizer)
    straight, stopped = _trainer(tokenizer), _trainer(tokenizer)
    for _ in range(3):
        straight.update(batch)
    stopped.update(batch)
    stopped.save(tmp_path)
    resumed = _trainer(tokenizer, learning_rate=1e-3)
    resumed.load(tmp_path)
    for _ in range(2):
        resumed.update(batch)
    assert resumed.step == straight.step == 3
    for a, b in zip(straight._model.parameters(), resumed._model.parameters(), strict=True):
        assert torch.equal(a, b)
