"""Rows that end in padding need no mask: the same losses and gradients, by attention that is faster and smaller."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu.conftest import DEVICES, batch_of, config_of, model_of, on_gpu, plain
from torch import Tensor

from kdrl_core.logprobs.chunked import TokenStatistics
from kdrl_core.logprobs.model import LogprobModel, pad_sequences

LENGTHS = [(3, 40), (17, 9), (30, 70), (1, 1), (9, 60), (30, 2)]


def run(model: LogprobModel, sequences: Any, device: str, *, is_masked: bool) -> TokenStatistics:
    """Statistics of one pass, whose gradients are added to the model's."""
    found = model(pad_sequences(sequences, device=device, is_masked=is_masked), with_entropy=True)
    assert found.entropy is not None
    (found.logprobs.sum() + 0.1 * found.entropy.sum()).backward()
    return found


def gradient_of(model: LogprobModel) -> Tensor:
    """Of all parameters; it is zero afterwards."""
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    model.zero_grad()
    return gradient


@contextmanager
def masks_of(model: LogprobModel) -> Iterator[list[Tensor | None]]:
    """What the first attention layer is given as its mask."""
    seen: list[Tensor | None] = []
    hook = model.model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda _, given, named: seen.append(named["attention_mask"]), with_kwargs=True
    )
    yield seen
    hook.remove()


@pytest.mark.parametrize("device", DEVICES)
def test_values_and_gradients_are_those_of_masked_rows_and_of_rows_alone(device: str) -> None:
    """In float32; in float64 gradients differ by 3e-16."""
    model = LogprobModel(model_of(config_of(), device), temperature=0.7)
    sequences = batch_of(LENGTHS).sequences
    alone = [run(model, [sequence], device, is_masked=False) for sequence in sequences]
    expected = gradient_of(model)
    with masks_of(model) as seen:
        for is_masked in (False, True):
            found = run(model, sequences, device, is_masked=is_masked)
            gap = float((gradient_of(model) - expected).norm() / expected.norm())
            print(f"{device}, masked {is_masked}: gradients differ by {gap:.1e}")
            assert gap < 1e-6
            for row, (one, sequence) in enumerate(zip(alone, sequences, strict=True)):
                for values, reference in zip(found[:2], one[:2], strict=True):
                    own, padding = values[row].split([len(sequence.token_ids), 70 - len(sequence.token_ids)])
                    torch.testing.assert_close(own, reference[0], rtol=1e-5, atol=1e-5)
                    assert (padding == 0).all()
    assert [mask is None for mask in seen] == [True, False]


@pytest.mark.parametrize("device", DEVICES)
def test_an_update_is_the_same_with_and_without_a_mask(
    device: str, save_model: Callable[[Any], Path], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metrics, per-token results in the order of the rows, and weights; several rows in a micro-batch, and one."""
    path = save_model(config_of())
    batch = batch_of(LENGTHS, entropy_coef=0.01)
    options = {"learning_rate": 1e-6, "micro_batch_tokens": 220}  # Adam does not blow up the rounding of g ≈ 0
    updates, weights = [], []
    for width in (0, 10**6):
        monkeypatch.setattr("kdrl_core.logprobs.model.MASKED_UP_TO", width)
        trainer = plain(path, tokenizer, device, **options)
        updates.append(trainer.update(batch))
        weights.append(torch.cat([p.detach().flatten() for p in trainer._model.parameters()]))
    found, expected = updates
    if device == "cuda":  # where no batch has a mask; the other half of the test is the CPU
        monkeypatch.undo()
        cpu = plain(path, tokenizer, "cpu", **options)
        expected = cpu.update(batch)
        weights[1] = torch.cat([p.detach().flatten() for p in cpu._model.parameters()]).to(device)
    for name, value in expected.metrics.items():
        assert found.metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert [len(row) for row in found.logprobs] == [response for _, response in LENGTHS]
    gap = np.abs(np.concatenate(found.logprobs) - np.concatenate(expected.logprobs)).max()
    assert gap < (1e-5 if device == "cpu" else 1e-4)
    assert float((weights[0] - weights[1]).abs().max()) < 1e-6


@on_gpu
def test_without_a_mask_a_pass_takes_less_memory() -> None:
    """4 rows of 3,000 to 4,096 tokens, heads as Qwen2.5-1.5B has them, bfloat16. The time is printed."""
    device = "cuda"
    sizes = {"hidden_size": 1536, "intermediate_size": 4096, "num_attention_heads": 12, "num_hidden_layers": 4}
    model = LogprobModel(model_of(config_of(**sizes, vocab_size=8000), device, torch.bfloat16), temperature=0.7)
    sequences = batch_of([(96 + 100 * row, 2900 + 264 * row) for row in range(4)]).sequences
    found: dict[bool, tuple[float, float]] = {}
    for is_masked in (True, False):
        for _ in range(3):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            before, started = torch.cuda.memory_allocated(), time.perf_counter()
            run(model, sequences, device, is_masked=is_masked)
            torch.cuda.synchronize()
            found[is_masked] = time.perf_counter() - started, (torch.cuda.max_memory_allocated() - before) / 2**30
            model.zero_grad()
    print({f"masked {mask}": f"{seconds:.3f} s, {gib:.2f} GiB" for mask, (seconds, gib) in found.items()})
    assert found[False][1] < found[True][1]
