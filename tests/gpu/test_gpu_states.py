"""Masters and checkpoints: bfloat16 loses no small step, and a checkpoint is the same whatever it was trained on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu.conftest import DEVICES, SLOW_DEVICES, batch_of, config_of, one_rank, plain, saved
from parity.ranks import gaps, needs_deepspeed
from safetensors.torch import load_file

from kdrl_core.training.protocols import StepStats

ROWS = [(4, 20), (9, 12), (2, 15), (7, 30)]
TINY_STEP = {"learning_rate": 1e-6, "warmup_steps": 0, "weight_decay": 0.0}
NEAR = 1e-3
"""Relative: one device's float32 against the other's, after updates by Adam at a learning rate of 1e-4."""


def weights_of(path: Path) -> torch.Tensor:
    found = load_file(path / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    return torch.cat([found[name].flatten() for name in sorted(found)])


def assert_masters_move(before: Path, after: Path) -> None:
    """Three updates at 1e-6: nearly every float32 weight moves, and few of their bfloat16 roundings do."""
    first, last = weights_of(before), weights_of(after)
    moved = float((first != last).float().mean())
    seen = float((first.bfloat16() != last.bfloat16()).float().mean())
    print(f"of {len(first)} weights {moved:.1%} moved, {seen:.2%} in bfloat16")
    assert moved > 0.95
    assert seen < 0.1
    assert float((first - last).abs().max()) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_masters_move_under_autocast(
    device: str, save_model: Callable[[Any], Path], tokenizer: Any, tmp_path: Path
) -> None:
    trainer = plain(save_model(config_of(vocab_size=24)), tokenizer, device, is_bfloat16=True, **TINY_STEP)
    before = saved(trainer, tmp_path / "before")
    for _ in range(3):
        trainer.update(batch_of(ROWS))
    assert_masters_move(before, saved(trainer, tmp_path / "after"))


@needs_deepspeed
@pytest.mark.parametrize("device", SLOW_DEVICES)
def test_masters_of_bfloat16_ranks_move(
    device: str, save_model: Callable[[Any], Path], tokenizer: Any, tmp_path: Path
) -> None:
    """ZeRO-2; the fourth update is the same whether the ranks go on or a new one resumes from their checkpoint."""
    path = save_model(config_of(vocab_size=24))
    with one_rank(path, tokenizer, tmp_path / "a", device, **TINY_STEP) as trainer:
        before = saved(trainer, tmp_path / "before")
        for _ in range(3):
            trainer.update(batch_of(ROWS))
        after = saved(trainer, tmp_path / "after")
        expected = trainer.update(batch_of(ROWS))
        trainer.load(after)
        again = trainer.update(batch_of(ROWS))
    assert_masters_move(before, after)
    assert_near(again, expected, 1e-6)


def assert_near(found: StepStats, expected: StepStats, limit: float) -> None:
    """Losses, metrics and per-token results, memory aside."""
    own = [
        StepStats(
            metrics={name: value for name, value in each.metrics.items() if not name.startswith("memory/")},
            logprobs=each.logprobs,
            entropies=each.entropies,
        )
        for each in (found, expected)
    ]
    largest = gaps(own[:1], own[1:])
    print(largest)
    assert max(largest.values()) < limit


@pytest.mark.parametrize("device", DEVICES)
def test_a_checkpoint_goes_on_where_it_was_on_the_device_and_on_a_cpu(
    device: str, save_model: Callable[[Any], Path], tokenizer: Any, tmp_path: Path
) -> None:
    """Two updates on the device, a third there, and on a CPU from the checkpoint; and back again."""
    path, options = save_model(config_of(vocab_size=24)), {"learning_rate": 1e-4}
    trainer = plain(path, tokenizer, device, **options)
    cpu = plain(path, tokenizer, "cpu", **options)
    for _ in range(2):
        assert_near(trainer.update(batch_of(ROWS)), cpu.update(batch_of(ROWS)), NEAR)
    made = saved(trainer, tmp_path / "made")
    expected = trainer.update(batch_of(ROWS))
    cpu.load(made)
    assert cpu.step == 2
    assert_near(cpu.update(batch_of(ROWS)), expected, NEAR if device == "cuda" else 1e-9)
    back = saved(cpu, tmp_path / "back")
    trainer.load(back)
    assert np.array_equal(weights_of(back), weights_of(saved(trainer, tmp_path / "again")))
    assert (back / "trainer" / "state.json").read_bytes() == (tmp_path / "again/trainer/state.json").read_bytes()
    moments, again = (load_file(each / "trainer" / "optimizer.safetensors") for each in (back, tmp_path / "again"))
    assert moments.keys() == again.keys()
    assert all(torch.equal(moments[name], again[name]) for name in moments)


@needs_deepspeed
@pytest.mark.parametrize("device", SLOW_DEVICES)
def test_ranks_and_one_process_on_a_cpu_resume_each_other(
    device: str, save_model: Callable[[Any], Path], tokenizer: Any, tmp_path: Path
) -> None:
    """float32: two updates by a rank on the device, the third by it and by one process on a CPU."""
    path, options = save_model(config_of(vocab_size=24)), {"learning_rate": 1e-4}
    cpu = plain(path, tokenizer, "cpu", **options)
    with one_rank(path, tokenizer, tmp_path / "a", device, dtype="float32", **options) as trainer:
        for _ in range(2):
            trainer.update(batch_of(ROWS))
        cpu.load(saved(trainer, tmp_path / "made"))
        expected = cpu.update(batch_of(ROWS))
        assert_near(trainer.update(batch_of(ROWS)), expected, NEAR)
        trainer.load(saved(cpu, tmp_path / "back"))
        assert trainer.step == 3
        assert_near(trainer.update(batch_of(ROWS)), cpu.update(batch_of(ROWS)), NEAR)
