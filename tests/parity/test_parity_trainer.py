"""The trainer against the engine, against the loss written out and differentiated by autograd, and against itself."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity.conftest import dense_log_probabilities, largest_gap
from parity.ranks import assert_rounded, with_objective
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from kdrl_core.engines.transformers_engines import TransformersScorer
from kdrl_core.errors import EngineError, RunError
from kdrl_core.ledger import listing
from kdrl_core.models.loading import load_model
from kdrl_core.objectives import Objective
from kdrl_core.training.mini_batches import update_in_turn
from kdrl_core.training.protocols import OptimizerSettings, UpdateBatch
from kdrl_core.training.torch_trainer import TorchTrainer
from kdrl_core.types import Rollout, ScoreRequest

TEMPERATURE = 0.7
UNCLIPPED = 1e9
MakeTrainer = Callable[..., tuple[TorchTrainer, Any]]


@pytest.fixture
def make_trainer(student_dir: Path, tokenizer: Any) -> MakeTrainer:
    """A trainer over a fresh copy of the student (or of the model in `path`), and that copy."""

    def make(path: Path = student_dir, **options: Any) -> tuple[TorchTrainer, Any]:
        model = load_model(path)
        values: dict[str, Any] = {
            "temperature": TEMPERATURE,
            "learning_rate": 1e-4,
            "weight_decay": 0.0,
            "warmup_steps": 0,
            "max_grad_norm": UNCLIPPED,
            "micro_batch_tokens": 100_000,
            **options,
        }
        return TorchTrainer(model, tokenizer, OptimizerSettings(**values)), model

    return make


@pytest.fixture(scope="session")
def batch(rollouts: list[Rollout], teacher: Any, student: Any) -> UpdateBatch:
    """Every term of the loss at once: advantages, a KD mask, a teacher, a reference policy, entropy."""
    sequences = [ScoreRequest(prompt_token_ids=r.prompt_token_ids, token_ids=r.token_ids) for r in rollouts]
    rng = np.random.default_rng(0)
    reference = TransformersScorer(student, temperature=TEMPERATURE, batch_tokens=512).score(sequences)
    return UpdateBatch(
        sequences=sequences,
        advantages=rng.normal(size=len(sequences)).astype(np.float32).tolist(),
        kd_weights=[float(row % 3 != 0) for row in range(len(sequences))],
        teacher_logprobs=TransformersScorer(teacher, temperature=TEMPERATURE, batch_tokens=512).score(sequences),
        ref_logprobs=[r + rng.normal(scale=0.3, size=len(r)).astype(np.float32) for r in reference],
        objective=Objective(
            beta=0.05, kl_estimator="k2", ref_beta=0.02, ref_kl_estimator="k3", entropy_coef=0.01, group_size=3
        ),
    )


def still(batch: UpdateBatch) -> UpdateBatch:
    """The batch of a GRPO step whose groups have equal rewards, without entropy bonus and penalty."""
    return replace(
        with_objective(batch, beta=0.0, ref_beta=0.0, entropy_coef=0.0),
        advantages=[0.0] * len(batch.sequences),
        kd_weights=[0.0] * len(batch.sequences),
        teacher_logprobs=None,
        ref_logprobs=None,
    )


def gradients(model: Any) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def parameters(model: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).clone()


def reference_loss(model: Any, batch: UpdateBatch) -> torch.Tensor:
    """−mean[Â log π] + β mean[m ½R²] + β_ref mean[e^R' − R' − 1] − c mean[H], one unpadded sequence at a time."""
    total = torch.zeros(())
    assert batch.teacher_logprobs is not None
    assert batch.ref_logprobs is not None
    for row, sequence in enumerate(batch.sequences):
        table = dense_log_probabilities(model, sequence, TEMPERATURE)
        logprobs = table.gather(-1, torch.tensor(list(sequence.token_ids))[:, None]).squeeze(1)
        log_ratio = torch.from_numpy(batch.teacher_logprobs[row]) - logprobs
        ref_log_ratio = torch.from_numpy(batch.ref_logprobs[row]) - logprobs
        total = total - batch.advantages[row] * logprobs.sum()
        total = total + batch.objective.beta * batch.kd_weights[row] * 0.5 * log_ratio.square().sum()
        total = total + batch.objective.ref_beta * (ref_log_ratio.exp() - ref_log_ratio - 1.0).sum()
        total = total + batch.objective.entropy_coef * (table.exp() * table).sum()
    return total / sum(len(sequence.token_ids) for sequence in batch.sequences)


@pytest.mark.parametrize("micro_batch_tokens", [100_000, 60])
def test_entropies_are_those_of_the_whole_vocabulary_in_float64(
    make_trainer: MakeTrainer, batch: UpdateBatch, student_dir: Path, micro_batch_tokens: int
) -> None:
    """−Σ_v p log p of softmax(logits / T) from full logits, of the policy before the update."""
    trainer, _ = make_trainer(micro_batch_tokens=micro_batch_tokens)
    stats = trainer.update(batch)
    assert stats.entropies is not None
    before = load_model(student_dir).double()
    with torch.no_grad():
        tables = [dense_log_probabilities(before, sequence, TEMPERATURE) for sequence in batch.sequences]
    expected = [-(table.exp() * table).sum(-1) for table in tables]
    assert all(row.dtype == np.float32 for row in stats.entropies)
    assert [len(row) for row in stats.entropies] == [len(sequence.token_ids) for sequence in batch.sequences]
    assert max(float(row.max()) for row in expected) > 0.5  # they are not all certain
    assert largest_gap(stats.entropies, expected) < 1e-5
    assert np.concatenate(stats.entropies).mean() == pytest.approx(stats.metrics["entropy"], rel=1e-5)


def test_sft_computes_no_entropies(make_trainer: MakeTrainer, batch: UpdateBatch) -> None:
    zeros = [0.0] * len(batch.sequences)
    trainer, _ = make_trainer()
    sft = Objective(kind="sft")
    stats = trainer.update(UpdateBatch(sequences=batch.sequences, objective=sft, advantages=zeros, kd_weights=zeros))
    assert stats.entropies is None


def test_logprobs_are_the_engines(make_trainer: MakeTrainer, batch: UpdateBatch, rollouts: list[Rollout]) -> None:
    trainer, _ = make_trainer(temperature=1.0, micro_batch_tokens=256)
    stats = trainer.update(batch)
    assert [len(logprobs) for logprobs in stats.logprobs] == [len(rollout.token_ids) for rollout in rollouts]
    # In float32 processors differ by up to 1.1e-5.
    assert largest_gap(stats.logprobs, [torch.tensor(rollout.logprobs) for rollout in rollouts]) < 2e-5


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_gradient_is_that_of_the_formula(
    make_trainer: MakeTrainer, batch: UpdateBatch, which: str, request: pytest.FixtureRequest
) -> None:
    """The student has tied embeddings, the teacher untied ones."""
    path = request.getfixturevalue(f"{which}_dir")
    trainer, model = make_trainer(path, micro_batch_tokens=400)
    stats = trainer.update(batch)
    reference = load_model(path)
    loss = reference_loss(reference, batch)
    loss.backward()
    expected = gradients(reference)
    assert float((gradients(model) - expected).norm() / expected.norm()) < 1e-5
    assert stats.metrics["optim/grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-4)


def test_entropy_enters_with_its_sign(make_trainer: MakeTrainer, batch: UpdateBatch) -> None:
    trainer, _ = make_trainer(learning_rate=1e-3)
    bonus_alone = with_objective(still(batch), entropy_coef=1.0)
    before = trainer.update(bonus_alone).metrics["entropy"]
    assert trainer.update(bonus_alone).metrics["entropy"] > before


@pytest.mark.parametrize("micro_batch_tokens", [1, 60, 700])
def test_micro_batches_change_nothing(make_trainer: MakeTrainer, batch: UpdateBatch, micro_batch_tokens: int) -> None:
    # A learning rate at which Adam's first step, lr · g / (|g| + 1e-8), does not blow up the rounding of g ≈ 0.
    whole, whole_model = make_trainer(learning_rate=1e-6)
    parts, parts_model = make_trainer(learning_rate=1e-6, micro_batch_tokens=micro_batch_tokens)
    expected, stats = whole.update(batch), parts.update(batch)
    difference = gradients(parts_model) - gradients(whole_model)
    assert float(difference.norm() / gradients(whole_model).norm()) < 1e-6 * 5
    assert float((parameters(parts_model) - parameters(whole_model)).abs().max()) < 1e-6
    assert stats.metrics == pytest.approx(expected.metrics, rel=1e-4, abs=1e-6)
    assert largest_gap(stats.logprobs, [torch.tensor(row) for row in expected.logprobs]) < 1e-5


def test_denominator_is_the_whole_steps_token_count(make_trainer: MakeTrainer, batch: UpdateBatch) -> None:
    """Twice the same responses: the same mean, so the same gradient."""
    once, once_model = make_trainer(micro_batch_tokens=200)
    twice, twice_model = make_trainer(micro_batch_tokens=200)
    assert batch.teacher_logprobs is not None
    assert batch.ref_logprobs is not None
    doubled = replace(
        batch,
        sequences=[*batch.sequences] * 2,
        advantages=[*batch.advantages] * 2,
        kd_weights=[*batch.kd_weights] * 2,
        teacher_logprobs=[*batch.teacher_logprobs] * 2,
        ref_logprobs=[*batch.ref_logprobs] * 2,
    )
    once.update(batch)
    twice.update(doubled)
    difference = gradients(twice_model) - gradients(once_model)
    assert float(difference.norm() / gradients(once_model).norm()) < 1e-5


def test_gradient_is_clipped_to_its_norm(make_trainer: MakeTrainer, batch: UpdateBatch) -> None:
    free, free_model = make_trainer()
    norm = free.update(batch).metrics["optim/grad_norm"]
    clipped, clipped_model = make_trainer(max_grad_norm=norm / 10)
    assert clipped.update(batch).metrics["optim/grad_norm"] == pytest.approx(norm)  # the norm before clipping
    assert float(gradients(clipped_model).norm()) == pytest.approx(norm / 10, rel=1e-4)
    assert torch.allclose(gradients(clipped_model) * 10, gradients(free_model), rtol=1e-3, atol=1e-6)


def test_warm_up_moves_from_the_first_update_on(make_trainer: MakeTrainer, batch: UpdateBatch) -> None:
    trainer, model = make_trainer(learning_rate=1e-3, warmup_steps=3)
    before = parameters(model)
    rates = [trainer.update(batch).metrics["optim/learning_rate"]]
    # Adam's first step is lr · sign(g): a quarter of the learning rate, after 3 steps of warm-up the whole.
    assert float((parameters(model) - before).abs().max()) == pytest.approx(0.25e-3, rel=1e-2)
    rates += [trainer.update(batch).metrics["optim/learning_rate"] for _ in range(4)]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])
    assert trainer.step == 5


def test_equal_rewards_do_not_move_the_policy(make_trainer: MakeTrainer, batch: UpdateBatch) -> None:
    trainer, model = make_trainer(learning_rate=1e-2)
    before = parameters(model)
    stats = trainer.update(still(batch))
    assert torch.equal(parameters(model), before)
    assert stats.metrics["optim/grad_norm"] == 0.0
    assert trainer.step == 1


def test_perturbed_teacher_changes_the_gradient(make_trainer: MakeTrainer, batch: UpdateBatch) -> None:
    assert batch.teacher_logprobs is not None
    found = []
    for shift in (0.0, 0.5):
        trainer, model = make_trainer()
        trainer.update(replace(batch, teacher_logprobs=[row - np.float32(shift) for row in batch.teacher_logprobs]))
        found.append(gradients(model).clone())
    assert float((found[1] - found[0]).norm() / found[0].norm()) > 1e-2


def test_tied_embeddings_stay_tied(make_trainer: MakeTrainer, batch: UpdateBatch, tmp_path: Path) -> None:
    trainer, model = make_trainer(learning_rate=1e-2)
    assert model.config.tie_word_embeddings
    trainer.update(batch)
    saved, exported = tmp_path / "saved", tmp_path / "exported"
    for folder in (saved, exported):
        folder.mkdir()
    trainer.save(saved)
    other, other_model = make_trainer()
    other.load(saved)
    trainer.export_hf(exported, "bfloat16")
    assert_rounded(exported, saved)
    for trained in (model, other_model, load_model(saved)):
        assert trained.lm_head.weight.data_ptr() == trained.model.embed_tokens.weight.data_ptr()
        assert torch.equal(parameters(trained), parameters(model))


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_restored_trainer_continues_to_the_bit(
    make_trainer: MakeTrainer, batch: UpdateBatch, tmp_path: Path, which: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(f"{which}_dir")
    options = {"learning_rate": 1e-3, "weight_decay": 0.01, "warmup_steps": 4, "max_grad_norm": 0.5}
    whole, whole_model = make_trainer(path, **options)
    first, _ = make_trainer(path, **options)
    for _ in range(2):
        whole.update(batch)
        first.update(batch)
    saved = tmp_path / "saved"
    saved.mkdir()
    told = first.save(saved)
    assert told.items() <= listing(saved).items()  # hashed while it was written
    written = (saved / "trainer" / "optimizer.safetensors").read_bytes()
    assert written == to_bytes(load_file(saved / "trainer" / "optimizer.safetensors"))
    second, second_model = make_trainer(path, **options)
    second.load(saved)
    assert second.step == 2
    for _ in range(2):
        expected, stats = whole.update(batch), second.update(batch)
        assert stats.metrics == expected.metrics
    assert torch.equal(parameters(second_model), parameters(whole_model))
    for trainer, name in ((whole, "whole"), (second, "second")):
        (tmp_path / name).mkdir()
        trainer.save(tmp_path / name)
    files = {file.relative_to(tmp_path / "whole") for file in (tmp_path / "whole").rglob("*") if file.is_file()}
    assert {Path("model.safetensors"), Path("trainer/optimizer.safetensors"), Path("trainer/state.json")} <= files
    assert {name.split(".")[1] for name in load_file(tmp_path / "whole" / "trainer" / "optimizer.safetensors")} == {
        "exp_avg",
        "exp_avg_sq",
        "step",
    }
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file


def written_out(model: Any, batch: UpdateBatch, rows: range, old: list[torch.Tensor]) -> tuple[torch.Tensor, list[Any]]:
    """The loss of one mini-batch, an unpadded sequence at a time: −mean[min(ρ Â, clip(ρ) Â)] + β mean[ρ m ½R²]
    + β_ref mean[ρ k3] − c mean[H], ρ a constant outside of the first term; and each token's ρ, and if it is clipped."""
    objective, total, seen = batch.objective, torch.zeros(()), []
    assert batch.teacher_logprobs is not None
    assert batch.ref_logprobs is not None
    for row in rows:
        table = dense_log_probabilities(model, batch.sequences[row], TEMPERATURE)
        logprobs = table.gather(-1, torch.tensor(list(batch.sequences[row].token_ids))[:, None]).squeeze(1)
        ratio, advantage = (logprobs - old[row]).exp(), batch.advantages[row]
        clipped = ratio.clamp(1 - (objective.clip_low or 0), 1 + (objective.clip_high or 0)) * advantage
        log_ratio = torch.from_numpy(batch.teacher_logprobs[row]) - logprobs
        ref_log_ratio = torch.from_numpy(batch.ref_logprobs[row]) - logprobs
        weight = ratio.detach()
        total = total - torch.minimum(ratio * advantage, clipped).sum()
        total = total + objective.beta * batch.kd_weights[row] * (weight * 0.5 * log_ratio.square()).sum()
        total = total + objective.ref_beta * (weight * (ref_log_ratio.exp() - ref_log_ratio - 1.0)).sum()
        total = total + objective.entropy_coef * (table.exp() * table).sum()
        seen += zip(weight.tolist(), (clipped < ratio * advantage).tolist(), strict=True)
    return total / sum(len(batch.sequences[row].token_ids) for row in rows), seen


def test_several_optimiser_steps_are_those_written_out(
    make_trainer: MakeTrainer, batch: UpdateBatch, student_dir: Path
) -> None:
    """Two AdamW steps on halves of the batch, the second off-policy, by autograd of the formula."""
    batch = with_objective(batch, clip_low=0.02, clip_high=0.03)
    options = {"learning_rate": 1e-3, "warmup_steps": 1}
    trainer, model = make_trainer(**options, micro_batch_tokens=60)
    stats = update_in_turn(trainer, batch, 2)
    assert trainer.step == 2

    reference = load_model(student_dir).eval()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, weight_decay=0.0)
    with torch.no_grad():
        tables = [dense_log_probabilities(reference, sequence, TEMPERATURE) for sequence in batch.sequences]
    old = [
        table.gather(-1, torch.tensor(list(sequence.token_ids))[:, None]).squeeze(1)
        for table, sequence in zip(tables, batch.sequences, strict=True)
    ]
    half, losses, seen = len(batch.sequences) // 2, [], []
    for rows, rate in ((range(half), 0.5e-3), (range(half, 2 * half), 1e-3)):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss, found = written_out(reference, batch, rows, old)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append((loss.item(), len(found)))
        seen += found
    moved = parameters(reference) - parameters(load_model(student_dir))
    assert float((parameters(model) - parameters(reference)).norm() / moved.norm()) < 1e-3
    ratios = [ratio for ratio, _ in seen]
    assert stats.metrics["loss/total"] == pytest.approx(sum(x * n for x, n in losses) / len(seen), rel=1e-4)
    assert stats.metrics["ratio/mean"] == pytest.approx(np.mean(ratios), rel=1e-5)
    assert stats.metrics["ratio/max"] == pytest.approx(max(ratios), rel=1e-4)
    assert stats.metrics["ratio/max"] > 1.05
    assert stats.metrics["ratio/clipped_frac"] == pytest.approx(np.mean([is_clipped for _, is_clipped in seen]))
    assert 0.02 < stats.metrics["ratio/clipped_frac"] < 0.5
    assert stats.metrics["optim/learning_rate"] == 1e-3
    assert largest_gap(stats.logprobs, old) < 1e-5  # of the policy that sampled, for every response
    assert stats.entropies is not None
    assert largest_gap(stats.entropies, [-(table.exp() * table).sum(-1) for table in tables]) < 1e-5


def test_a_policy_that_has_not_moved_has_ratio_one_to_the_bit(make_trainer: MakeTrainer, batch: UpdateBatch) -> None:
    trainer, _ = make_trainer(learning_rate=0.0, micro_batch_tokens=60)
    metrics = update_in_turn(trainer, with_objective(batch, clip_low=0.0, clip_high=0.0), 2).metrics
    assert (metrics["ratio/max"], metrics["ratio/clipped_frac"]) == (1.0, 0.0)


@pytest.mark.parametrize("aggregation", ["token_mean", "group_mean"])
def test_responses_outside_of_the_loss_are_as_if_not_there(
    make_trainer: MakeTrainer, batch: UpdateBatch, aggregation: str
) -> None:
    """A whole group is left out: of the sums, of the tokens, and of the groups that are counted."""
    batch = with_objective(batch, aggregation=aggregation)
    size, count = batch.objective.group_size or 0, len(batch.sequences)
    kept = range(size, count)
    masked, masked_model = make_trainer()
    without, model = make_trainer()
    stats = masked.update(replace(batch, loss_mask=[float(row in kept) for row in range(count)]))
    expected = without.update(batch.take(kept))
    assert torch.allclose(gradients(masked_model), gradients(model), rtol=1e-4, atol=1e-7)
    for name in ("loss/total", "entropy", "kd/kl", "ref/kl"):
        assert stats.metrics[name] == pytest.approx(expected.metrics[name], rel=1e-4)
    assert stats.metrics["kd/kl_unmasked"] == pytest.approx(expected.metrics["kd/kl_unmasked"], rel=1e-4)
    assert [len(row) for row in stats.logprobs] == [len(sequence.token_ids) for sequence in batch.sequences]


def test_a_batch_without_responses_in_the_loss_does_not_move_the_policy(
    make_trainer: MakeTrainer, batch: UpdateBatch
) -> None:
    trainer, model = make_trainer(learning_rate=1e-2)
    before = parameters(model)
    stats = trainer.update(replace(batch, loss_mask=[0.0] * len(batch.sequences)))
    assert torch.equal(parameters(model), before)
    assert (stats.metrics["loss/total"], stats.metrics["optim/grad_norm"], trainer.step) == (0.0, 0.0, 1)


def test_a_model_is_no_checkpoint(make_trainer: MakeTrainer, student_dir: Path) -> None:
    trainer, _ = make_trainer()
    with pytest.raises(RunError, match="it is a model, not a checkpoint of this trainer"):
        trainer.load(student_dir)


def test_diverged_update_changes_nothing(make_trainer: MakeTrainer, batch: UpdateBatch) -> None:
    trainer, model = make_trainer()
    trainer.update(batch)
    model.model.norm.weight.data[0] = float("inf")
    before = parameters(model)
    with pytest.raises(EngineError, match=r"step 1: .*not finite; training has diverged, lower learning_rate or beta"):
        trainer.update(batch)
    assert trainer.step == 1
    assert torch.equal(parameters(model), before)
