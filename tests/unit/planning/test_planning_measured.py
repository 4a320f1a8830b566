"""The plan's arithmetic against memory that is really taken, on a CPU."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from kdrl_core.logprobs.chunked import CHUNK_BYTES
from kdrl_core.look.planning import memory
from kdrl_core.look.planning.memory import (
    TrainerSettings,
    gradient_bytes,
    kept_bytes,
    layer_activation_bytes,
    logprob_bytes,
    trainer_states,
    working_bytes,
)
from kdrl_core.look.planning.shapes import ModelShape, shape_from_config

GIB = 2**30
ON_A_GPU = memory.CHUNK_BYTES


@pytest.fixture(autouse=True)
def chunks_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured here is smaller than on the GPUs of a plan."""
    monkeypatch.setattr(memory, "CHUNK_BYTES", CHUNK_BYTES["cpu"])


def test_a_plan_knows_the_chunks_of_a_gpu() -> None:
    assert CHUNK_BYTES["cuda"] == ON_A_GPU


def tiny(layers: int = 2, **changes: Any) -> Qwen2Config:
    values: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    return Qwen2Config(**{**values, **changes}, num_hidden_layers=layers)


def saved_bytes(layers: int, dtype: torch.dtype, *, is_autocast: bool, is_padded: bool) -> int:
    """Bytes that autograd keeps for the backward pass of the decoder, parameters and their casts aside."""
    model = AutoModelForCausalLM.from_config(tiny(layers)).to(dtype).train()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(sorted(p.shape)) for p in model.parameters() if p.ndim == 2}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        is_cast = tuple(sorted(tensor.shape)) in shapes
        if tensor.untyped_storage().data_ptr() not in parameters and not is_cast:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids = torch.randint(0, 300, (2, 256))
    mask = torch.ones_like(ids)
    if is_padded:
        mask[0, :5] = 0
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast),
    ):
        output = model.model(input_ids=ids, attention_mask=mask, use_cache=False)
    assert output.last_hidden_state.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_a_layer_keeps_what_the_formula_says_to_the_byte(precision: Any, is_padded: bool) -> None:
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    two, three = (
        saved_bytes(layers, dtype, is_autocast=precision == "autocast", is_padded=is_padded) for layers in (2, 3)
    )
    shape = shape_from_config(tiny(), name="tiny")
    settings = TrainerSettings(precision=precision)
    expected = 512 * layer_activation_bytes(shape, settings, is_padded=is_padded)
    if is_padded:
        expected += 512 * 256 * settings.activation_bytes  # the mask
    assert three - two == expected


@pytest.mark.parametrize("is_tied", [True, False])
def test_weights_gradients_and_moments_are_exact(is_tied: bool) -> None:
    config = tiny(tie_word_embeddings=is_tied)
    shape = shape_from_config(config, name="tiny")
    model = AutoModelForCausalLM.from_config(config).float()
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    settings = TrainerSettings(precision="float32")
    states = trainer_states(shape, settings)

    def size(tensors: Any) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert size(model.parameters()) == states["trainer weights"]
    assert size(p.grad for p in model.parameters()) == gradient_bytes(shape, settings)
    assert size(moments) == states["optimizer"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kv_cache_is_exact(dtype: torch.dtype) -> None:
    config = tiny(3)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.inference_mode():
        cache = model(input_ids=torch.ones(2, 7, dtype=torch.long), use_cache=True).past_key_values
    found = sum(
        tensor.numel() * tensor.element_size() for layer in cache.layers for tensor in (layer.keys, layer.values)
    )
    assert found == 2 * 7 * shape_from_config(config, name="tiny").kv_bytes_per_token(dtype.itemsize)


@pytest.mark.parametrize(("width", "measured_gib", "off"), [(4, 0.96, 0.05), (2, 0.60, 0.09)])
def test_logprobs_take_what_docs_memory_measured(width: int, measured_gib: float, off: float) -> None:
    """V = 151,936, T = 2,048, H = 1,536, logprobs and entropy; measured beyond weight and hidden states. A CPU makes
    float32 copies of bfloat16 chunks, which the plan does not count."""
    shape = ModelShape(
        name="head",
        hidden=1536,
        layers=1,
        heads=12,
        kv_heads=2,
        head_dim=128,
        intermediate=8960,
        vocabulary=151_936,
        tied=False,
    )
    planned = logprob_bytes(shape, tokens=2048, width=width, has_gradient=True) + width * shape.embedding
    assert planned / GIB == pytest.approx(measured_gib, rel=off)


_NO_HOARD = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Has the C library give back what was freed, so that resident memory is what is in use."""

_STEP = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, Qwen2Config
from kdrl_core.logprobs.model import LogprobModel, pad_sequences
from kdrl_core.types import ScoreRequest

values = json.loads(sys.argv[1])
torch.set_num_threads(1)


def memory(name):
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status[name].split()[0]) * 1024


def step(model, rows, width):
    sequences = [
        ScoreRequest(prompt_token_ids=(1,) * 8, token_ids=(2,) * (width - 8 - 16 * row)) for row in range(rows)
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=values["precision"] == "autocast"):
        found = model(pad_sequences(sequences), with_entropy=True)
    (found.logprobs.sum() + found.entropy.sum()).backward()


config = Qwen2Config(**values["config"])
model = AutoModelForCausalLM.from_config(config).float()
optimizer = torch.optim.AdamW(model.parameters())
wrapped = LogprobModel(model, temperature=1.0, recomputes=values["is_checkpointed"])
step(wrapped, 1, 32)  # threads, libraries and gradients are there
optimizer.step()
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
step(wrapped, values["rows"], values["width"])
print(json.dumps({"peak": memory("VmHWM") - before}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    ("rows", "is_checkpointed"),
    [(1, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, False), (2, False), (2, True)))],
)
def test_the_peak_of_a_training_step_is_within_the_plan(rows: int, is_checkpointed: bool) -> None:
    """Resident memory of a process beyond weights, gradients and moments: at most the plan, and 3/4 of it at least."""
    config = tiny(
        8, hidden_size=384, intermediate_size=1024, num_attention_heads=6, num_key_value_heads=2, vocab_size=8000
    )
    width = 2048 // rows
    given = {
        "config": config.to_diff_dict(),
        "rows": rows,
        "width": width,
        "precision": "float32",
        "is_checkpointed": is_checkpointed,
    }
    done = subprocess.run(
        [sys.executable, "-c", _STEP, json.dumps(given)],
        env={**os.environ, **_NO_HOARD},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)["peak"]
    shape = shape_from_config(config, name="small")
    settings = TrainerSettings(precision="float32", is_checkpointed=is_checkpointed, is_masked=True)
    planned = sum(count(shape, settings, rows=rows, width=width) for count in (kept_bytes, working_bytes))
    planned += 2 * 4 * shape.embedding  # the micro-batch's own gradients of embedding and output layer
    print(f"measured {measured / 2**20:.0f} MiB, planned {planned / 2**20:.0f} MiB")
    assert 0.75 * planned <= measured <= planned
