"""Digests of a model's weights: equal if, and only if, an engine holds the weights that a folder has.

    digest = Σ mix(bits of w) mod 2^64, over every element w of every weight, in the engine's dtype

The sum is the same in any order. So it does not matter how an engine packs its weights (q, k and v in one matrix),
splits them over GPUs, or pads them: mix(0) = 0. One changed element always changes it, and a larger change is missed
once in 2^32. It says nothing about the order: weights of one shape that were exchanged have the same digest, and are
found by the probe of a weight sync.

vLLM's own checksums (`compute_weight_checksums`) are SHA-256 of its packed parameters. They cannot be compared with an
export, are empty on a CPU, where the packed copies are not parameters, and take seconds on the host.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from kdrl_core.config.paths import read_json, shards

_ON_HOST = 2**15
"""Elements mixed together on the host: they stay in the cache, and torch uses one thread for so few."""
_ON_DEVICE = 2**24
"""Elements mixed together on a GPU; takes 200 MB for a moment."""
_ROWS_READ_BACK = 256
_THREADS = 8
_BITS = {2: torch.int16, 4: torch.int32}
_NOT_LOADED = "rotary_emb.inv_freq"
_HEAD = "lm_head.weight"


def folder_digest(folder: Path, dtype: str) -> str:
    """Digest of the safetensors weights of a model directory, cast to `dtype` (`bfloat16`, `float32`), as `dtype:hex`.

    Raises ModelError or OSError if the files cannot be read.
    """
    wanted = getattr(torch, dtype)
    is_tied = bool(read_json(folder / "config.json").get("tie_word_embeddings", False))

    def weights() -> Iterator[torch.Tensor]:
        for name in shards(folder) or sorted(path.name for path in folder.glob("*.safetensors")):
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (no dict)
                    if not (key.endswith(_NOT_LOADED) or (is_tied and key == _HEAD)):
                        yield file.get_tensor(key)

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        sums = threads.map(lambda weight: _mixed_sum(weight, wanted), weights())
        return _told(dtype, sum(int(each) for each in sums))


def model_digest(model: torch.nn.Module, dtype: torch.dtype, *, rank: int = 0, num_ranks: int = 1) -> str:
    """Digest of the weights that a model computes with, as `folder_digest`.

    With `num_ranks` above 1 the model is this rank's part of a vLLM model, and the ranks of vLLM's tensor-parallel
    group call this together; the digest is that of the whole.
    """
    seen: set[int] = set()
    total = torch.zeros((), dtype=torch.int64)
    for layer in model.modules():
        for name, weight in layer.named_parameters(recurse=False):
            if id(weight) not in seen and weight.is_floating_point():
                seen.add(id(weight))
                total += _mixed_sum(_own(layer, name, weight, rank, num_ranks), dtype).cpu()
        if hasattr(layer, "cpu_linear"):
            total += _packed_difference(layer, dtype, rank, num_ranks)
    if num_ranks > 1:
        from vllm.distributed import get_tp_group

        torch.distributed.all_reduce(total, group=get_tp_group().cpu_group)
    return _told(str(dtype).removeprefix("torch."), int(total))


def _told(dtype: str, total: int) -> str:
    return f"{dtype}:{total % 2**64:016x}"


@torch.no_grad()
def _mixed_sum(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Σ mix(bits) modulo 2^64, a number where the weight is. mix is one-to-one, and 0 for zeros of both signs."""
    size = _ON_HOST if weight.device.type == "cpu" else _ON_DEVICE
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    for part in weight.detach().reshape(-1).split(size):
        bits = part.to(dtype).view(_BITS[dtype.itemsize])
        mixed = bits.to(torch.int32, copy=True)
        mixed.masked_fill_(bits == torch.iinfo(bits.dtype).min, 0)  # -0.0: a packed matrix does not give its sign back
        mixed *= -1_640_531_535  # odd, about 2^32 / 1.618
        mixed ^= (mixed >> 15).bitwise_and_(2**17 - 1)  # without the copies of the sign that >> shifts in
        mixed *= -2_048_144_777
        mixed ^= (mixed >> 13).bitwise_and_(2**19 - 1)
        total += mixed.sum(dtype=torch.int64)
    return total


def _own(layer: torch.nn.Module, name: str, weight: torch.Tensor, rank: int, num_ranks: int) -> torch.Tensor:
    """The rows of a weight that this rank counts: of what several ranks hold, the first of them counts it."""
    if num_ranks == 1:
        return weight
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    is_split = isinstance(layer, (linear.ColumnParallelLinear, linear.RowParallelLinear, VocabParallelEmbedding))
    if not is_split or layer.tp_size == 1 or (isinstance(layer, linear.RowParallelLinear) and name == "bias"):
        return weight[: len(weight) if rank == 0 else 0]
    if isinstance(layer, linear.QKVParallelLinear) and rank % layer.num_kv_head_replicas:
        return weight[: layer.num_heads * layer.head_size]
    return weight


def _packed_difference(layer: Any, dtype: torch.dtype, rank: int, num_ranks: int) -> torch.Tensor:
    """What to add for the packed copy that vLLM's CPU build computes with. The parameter of most layers is empty: then
    it is the copy's sum. Otherwise it is twice the difference of their sums, so that both must be right: some passes
    use the parameter. The copy is opaque, so it is read back: its product with each unit vector is a column."""
    weight = layer.weight
    if weight.is_meta or (weight.ndim != 2 and weight.numel()):
        return torch.zeros((), dtype=torch.int64)
    size = weight.shape[1] if weight.numel() else getattr(layer, "input_size_per_partition", layer.input_size)
    torch.get_num_threads()  # sets OpenMP's count in this thread; vLLM's kernels compare it with torch's
    total = -_mixed_sum(_own(layer, "weight", weight, rank, num_ranks), dtype)
    units = torch.eye(size, dtype=dtype)
    for part in units.split(_ROWS_READ_BACK):
        columns = layer.cpu_linear(part, weight, None)
        total += _mixed_sum(_own(layer, "weight", columns.t(), rank, num_ranks), dtype)
    return 2 * total if weight.numel() else total
