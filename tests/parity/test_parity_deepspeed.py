"""DeepSpeed's ranks against the trainer of one process: the same steps, the same files, each resuming the other's."""

import json
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from parity.ranks import (
    assert_rounded,
    gaps,
    make_batch,
    needs_deepspeed,
    plain_trainer,
    processes_of,
    rank_processes,
    ranks,
    train,
    with_objective,
    with_topk,
)
from safetensors.torch import load_file

from kdrl_core.errors import EngineError, RunError
from kdrl_core.ledger import listing
from kdrl_core.miniature.models import MiniatureModel, build_model, build_tokenizer
from kdrl_core.training.deepspeed_trainer import DeepSpeedTrainer
from kdrl_core.training.mini_batches import update_in_turn
from kdrl_core.training.protocols import UpdateBatch

pytestmark = needs_deepspeed

TOLERANCE = 1e-5
BFLOAT16_TOLERANCE = 0.05
BATCHES = [make_batch(seed) for seed in range(10)]
BATCHES[2] = replace(  # off-policy, with clipping, and some responses left out of the loss
    with_objective(BATCHES[2], clip_low=0.2, clip_high=0.28),
    old_logprobs=BATCHES[2].ref_logprobs,
    loss_mask=[float(row % 4 != 0) for row in range(len(BATCHES[2].sequences))],
)
BATCHES[3] = with_objective(BATCHES[3], kind="sft", aggregation="response_mean")


@pytest.fixture(scope="session")
def tied_dir(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tokenizer, tmp_path_factory.mktemp("tied"), is_tied=True)


@pytest.fixture(scope="session")
def untied_dir(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tokenizer, tmp_path_factory.mktemp("untied"), is_tied=False)


def untrained(tokenizer: Any, path: Path, *, is_tied: bool) -> Path:
    """A random model. Of trained ones plain torch gives random tokens logprobs that differ by 5e-5 after ten steps when
    micro-batches are cut otherwise, so they could not show 1e-5; here that is 2e-7."""
    spec = MiniatureModel(hidden_size=48, num_layers=2, tie_word_embeddings=is_tied, sft_steps=0, learning_rate=1.0)
    build_model(spec, build_tokenizer(), seed=0).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def spoiled(batch: UpdateBatch) -> UpdateBatch:
    """One advantage so large that the loss is infinite."""
    values = [3e38, *batch.advantages[1:]]
    return UpdateBatch(sequences=batch.sequences, advantages=values, kd_weights=[0.0] * len(values))


def save(trainer: Any, path: Path) -> Path:
    path.mkdir()
    told = trainer.save(path)
    assert told.items() <= listing(path).items()
    assert {"model.safetensors", "trainer/optimizer.safetensors"} <= told.keys()
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def named_buffers(folder: Path) -> list[Path]:
    """Of the ranks, in shared memory: whoever kills them would leave those behind."""
    ports = {process.environ()["MASTER_PORT"] for process in rank_processes(folder)}
    assert len(ports) == 1
    return list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{ports.pop()}_*"))  # noqa: S108


def weight_gap(left: Path, right: Path, name: str = "model.safetensors") -> float:
    ours, theirs = load_file(left / name), load_file(right / name)
    assert ours.keys() == theirs.keys()
    assert all(ours[key].dtype == theirs[key].dtype for key in ours)
    return max(float((ours[key] - theirs[key]).abs().max()) for key in ours)


def a_killed_rank_ends_the_update_and_all_others(trainer: DeepSpeedTrainer, folder: Path) -> None:
    assert (folder / "ranks.json").stat().st_mode & 0o077 == 0
    first, second = sorted(rank_processes(folder), key=lambda process: int(process.environ()["RANK"]))
    second.send_signal(signal.SIGKILL)
    started = time.monotonic()
    told = rf"update at step {trainer.step}: rank 1 \(pid {second.pid} .* signal SIGKILL, which"
    with pytest.raises(EngineError, match=told):
        trainer.update(BATCHES[0])
    assert time.monotonic() - started < 15
    assert not first.is_running() or first.status() == psutil.STATUS_ZOMBIE
    assert processes_of(folder) == []
    with pytest.raises(EngineError, match="closed"):
        trainer.save(folder)


@pytest.mark.usefixtures("own_estimators")
def test_ranks_train_as_one_process_and_go_on_from_checkpoints_of_others(
    tied_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Tied embeddings; ZeRO-3 on two ranks, of which one is killed at last, then ZeRO-2 on one with an estimator of the
    user's own, beside plain torch."""
    plain = plain_trainer(tied_dir, tokenizer)
    expected = train(plain, BATCHES[:2])
    plain_saved = save(plain, tmp_path / "plain")
    observed = plain.observe(BATCHES[0])
    expected += train(plain, BATCHES[2:4])
    in_turn = update_in_turn(plain, BATCHES[4], 2)
    with ranks(tied_dir, tokenizer, tmp_path / "a", zero_stage=3) as sharded:
        assert named_buffers(tmp_path / "a") == []
        untouched = save(sharded, tmp_path / "untouched")
        assert contents(untouched) == contents(save(plain_trainer(tied_dir, tokenizer), tmp_path / "initial"))
        actual = train(sharded, BATCHES[:2])
        saved = save(sharded, tmp_path / "saved")
        (tmp_path / "engine").mkdir()
        sharded.export_hf(tmp_path / "engine", "bfloat16")
        assert_rounded(tmp_path / "engine", saved)
        with pytest.raises(EngineError, match=r"step 2: loss -?(inf|nan) .* is not finite"):
            sharded.update(spoiled(BATCHES[0]))
        assert contents(save(sharded, tmp_path / "refused")) == contents(saved)
        actual += train(sharded, BATCHES[2:4])
        assert max(gaps(actual, expected).values()) < TOLERANCE
        ended = contents(save(sharded, tmp_path / "ended"))

        sharded.load(saved)
        assert sharded.step == 2
        again = train(sharded, BATCHES[2:4])
        assert [stats.metrics for stats in again] == [stats.metrics for stats in actual[2:]]
        assert contents(save(sharded, tmp_path / "again")) == ended

        sharded.load(untouched)
        assert contents(save(sharded, tmp_path / "initial again")) == contents(untouched)
        assert [stats.metrics for stats in train(sharded, BATCHES[:2])] == [stats.metrics for stats in actual[:2]]
        assert contents(save(sharded, tmp_path / "saved again")) == contents(saved)

        sharded.load(plain_saved)
        assert max(gaps([sharded.observe(BATCHES[0])], [observed]).values()) < TOLERANCE
        assert max(gaps(train(sharded, BATCHES[2:4]), expected[2:]).values()) < TOLERANCE
        assert max(gaps([update_in_turn(sharded, BATCHES[4], 2)], [in_turn]).values()) < TOLERANCE
        with pytest.raises(RunError, match="not a checkpoint"):
            sharded.load(tied_dir)
        a_killed_rank_ends_the_update_and_all_others(sharded, tmp_path / "a")

    assert weight_gap(saved, plain_saved) < 1e-4
    assert contents(saved).keys() == contents(plain_saved).keys()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "trainer/state.json"):
        assert (saved / name).read_bytes() == (plain_saved / name).read_bytes(), name
    resumed = plain_trainer(tied_dir, tokenizer)
    resumed.load(saved)
    assert max(gaps(train(resumed, BATCHES[2:4]), expected[2:]).values()) < TOLERANCE
    mine = tmp_path / "mine.py"
    mine.write_text(
        "def fourth(r):\n    return 0.1 * r**4\n\n\ndef term(responses):\n    return responses.logprobs**2\n"
    )
    own = with_objective(BATCHES[4], kl_estimator=f"{mine}:fourth", terms=((f"{mine}:term", 0.3),))
    fourth = train(resumed, [own])
    with ranks(tied_dir, tokenizer, tmp_path / "b", zero_stage=2, ranks=1) as alone:
        alone.load(saved)
        assert contents(save(alone, tmp_path / "moved")) == contents(saved)
        assert max(gaps(train(alone, BATCHES[2:4]), expected[2:]).values()) < TOLERANCE
        assert max(gaps(train(alone, [own]), fourth).values()) < TOLERANCE  # it loads the estimator that is named
        assert fourth[0].metrics["term/term"] > 0.0
        with pytest.raises(EngineError, match=r"rank 0 .* failed: RecipeError: .*mine.py:none: none is not there"):
            alone.update(with_objective(own, kl_estimator=f"{tmp_path / 'mine.py'}:none"))
    resumed.load(plain_saved)
    train(resumed, BATCHES[2:4])
    assert train(resumed, BATCHES[4:5])[0].metrics["kd/kl"] != fourth[0].metrics["kd/kl"]


@pytest.mark.slow
def test_untied_embeddings_are_exported_as_by_the_plain_trainer(
    untied_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """ZeRO-0 on two ranks, with the Top-K loss, fewer responses than ranks, and a rank that fails at last."""
    plain = plain_trainer(untied_dir, tokenizer)
    batches = [with_topk(BATCHES[0]), make_batch(7, num_groups=1, group_size=3), make_batch(8, num_groups=1)]
    batches.append(UpdateBatch(sequences=batches[0].sequences[:1], advantages=[1.0], kd_weights=[0.0]))
    expected = train(plain, batches)
    with ranks(untied_dir, tokenizer, tmp_path / "ranks", zero_stage=0) as trainer:
        assert max(gaps(train(trainer, batches), expected).values()) < TOLERANCE
        for folder in ("ours", "theirs"):
            (tmp_path / folder).mkdir()
        trainer.export_hf(tmp_path / "ours")
        plain.export_hf(tmp_path / "theirs")
        with pytest.raises(EngineError, match=r"(?s)update at step 4: rank 1 .* failed: IndexError.*Traceback"):
            trainer.update(make_batch(9, unknown_token_in=0))
        with pytest.raises(EngineError, match="closed"):
            trainer.update(batches[0])
    assert contents(tmp_path / "ours").keys() == contents(tmp_path / "theirs").keys()
    assert weight_gap(tmp_path / "ours", tmp_path / "theirs") < 1e-4
    assert "lm_head.weight" in load_file(tmp_path / "ours" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("which", ["tied", "untied"])
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_ten_steps_are_those_of_one_process(
    zero_stage: int, num_ranks: int, which: str, tokenizer: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(f"{which}_dir")
    expected = train(plain_trainer(model, tokenizer), BATCHES)
    with ranks(model, tokenizer, tmp_path / "ranks", zero_stage=zero_stage, ranks=num_ranks) as trainer:
        found = gaps(train(trainer, BATCHES), expected)
    print(f"parity float32 {which} stage {zero_stage} ranks {num_ranks}: {json.dumps(found)}")
    assert max(found.values()) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        {"zero_stage": 0, "activation_checkpointing": True},
        {"zero_stage": 3, "activation_checkpointing": True},
        {"zero_stage": 2, "offload_optimizer": True},
        {"zero_stage": 3, "offload_optimizer": True},
        {"zero_stage": 3, "ranks": 3},
    ],
)
def test_where_things_are_kept_changes_nothing(
    config: dict[str, Any], tied_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    batches = [*BATCHES[:5], *map(with_topk, BATCHES[5:])]
    plain = plain_trainer(tied_dir, tokenizer)
    expected = train(plain, batches)
    with ranks(tied_dir, tokenizer, tmp_path / "ranks", **config) as trainer:
        found = gaps(train(trainer, batches[:5]), expected[:5])
        saved = save(trainer, tmp_path / "saved")
        ended = gaps(train(trainer, batches[5:]), expected[5:])
        trainer.load(saved)
        assert gaps(train(trainer, batches[5:]), expected[5:]) == ended
    print(f"parity float32 {config}: {json.dumps(found)}")
    assert max(*found.values(), *ended.values()) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_bfloat16_keeps_float32_masters(zero_stage: int, tied_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    expected = train(plain_trainer(tied_dir, tokenizer), BATCHES)
    with ranks(tied_dir, tokenizer, tmp_path / "a", zero_stage=zero_stage, dtype="bfloat16") as trainer:
        initial = save(trainer, tmp_path / "initial")
        found = gaps(train(trainer, BATCHES[:5]), expected[:5])
        saved = save(trainer, tmp_path / "saved")
        with pytest.raises(EngineError, match="not finite"):
            trainer.update(spoiled(BATCHES[0]))
        assert contents(save(trainer, tmp_path / "refused")) == contents(saved)
        actual = train(trainer, BATCHES[5:])
    assert contents(initial) == contents(save(plain_trainer(tied_dir, tokenizer), tmp_path / "plain"))
    print(f"parity bfloat16 stage {zero_stage} ranks 2: {json.dumps(found)}")
    assert max(found.values()) < BFLOAT16_TOLERANCE
    with ranks(tied_dir, tokenizer, tmp_path / "b", zero_stage=zero_stage, dtype="bfloat16") as trainer:
        trainer.load(saved)
        again = train(trainer, BATCHES[5:])
    assert [stats.metrics for stats in again] == [stats.metrics for stats in actual]
    for ours, theirs in zip(again, actual, strict=True):
        assert np.array_equal(np.concatenate(ours.logprobs), np.concatenate(theirs.logprobs))


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_new_processes_go_on_bit_by_bit(
    zero_stage: int, num_ranks: int, tied_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    config = {"zero_stage": zero_stage, "ranks": num_ranks}
    with ranks(tied_dir, tokenizer, tmp_path / "a", **config) as trainer:
        train(trainer, BATCHES[:3])
        saved = save(trainer, tmp_path / "saved")
        train(trainer, BATCHES[3:5])
        ended = contents(save(trainer, tmp_path / "ended"))
    with ranks(tied_dir, tokenizer, tmp_path / "b", **config) as trainer:
        trainer.load(saved)
        train(trainer, BATCHES[3:5])
        assert contents(save(trainer, tmp_path / "again")) == ended
