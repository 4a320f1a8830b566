"""The digest of weights: the same however they are packed and split, another after the smallest change."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kdrl_core.engines.weight_digest import folder_digest, model_digest

Q, K, V = torch.randn(8, 16), torch.randn(4, 16), torch.randn(4, 16)
NORM = torch.ones(16)


def mixed(bits: int) -> int:
    """The hash of one element: in whole numbers below 2^32, and at the end with a sign."""
    bits = bits * -1_640_531_535 % 2**32
    bits ^= bits >> 15
    bits = bits * -2_048_144_777 % 2**32
    bits ^= bits >> 13
    return bits - 2**32 if bits >= 2**31 else bits


def stored(path: Path, weights: dict[str, torch.Tensor], **config: object) -> Path:
    path.mkdir(exist_ok=True)
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def packed(*weights: torch.Tensor) -> torch.nn.Module:
    model = torch.nn.Module()
    for number, weight in enumerate(weights):
        model.register_parameter(f"w{number}", torch.nn.Parameter(weight))
    return model


def test_the_sum_is_that_of_whole_numbers(tmp_path: Path) -> None:
    """1.0, -2.0 and 0.15625 in float32: sign, exponent + 127, fraction; zeros of both signs add nothing."""
    values = torch.tensor([1.0, -2.0, 0.15625, 0.0, -0.0])
    bits = [0x3F800000, 0xC0000000 - 2**32, 0x3E200000]
    expected = f"float32:{sum(map(mixed, bits)) % 2**64:016x}"
    assert folder_digest(stored(tmp_path, {"w": values}), "float32") == expected
    assert model_digest(packed(values), torch.float32) == expected
    halves = [each >> 16 for each in bits]  # bfloat16 is the upper half
    assert folder_digest(tmp_path, "bfloat16") == f"bfloat16:{sum(map(mixed, halves)) % 2**64:016x}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packing_order_and_padding_do_not_matter(dtype: str, tmp_path: Path) -> None:
    stored(tmp_path, {"q": Q, "k": K, "v": V, "norm": NORM, "x.rotary_emb.inv_freq": torch.ones(3)})
    engine = packed(NORM, torch.cat([Q, K, V, torch.zeros(16, 16)]).t()).to(getattr(torch, dtype))
    assert model_digest(engine, getattr(torch, dtype)) == folder_digest(tmp_path, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_changed_element_is_enough(dtype: torch.dtype) -> None:
    weights = torch.randn(300, 300).to(dtype)
    before = model_digest(packed(weights), dtype)
    bits = weights.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)
    bits[123, 45] ^= 1
    assert model_digest(packed(weights), dtype) != before
    bits[123, 45] ^= 1
    assert model_digest(packed(weights), dtype) == before


def test_no_two_numbers_have_one_hash() -> None:
    """All of bfloat16 but NaN; of float32 a part, and the number that would have the hash of 0 if >> kept the sign."""
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    halves = halves[~halves.isnan()]
    digests = {model_digest(packed(half[None]), torch.bfloat16) for half in halves[::16]}
    assert len(digests) == len(halves[::16])
    number = torch.tensor([-244_002_641], dtype=torch.int32).view(torch.float32)
    assert model_digest(packed(number), torch.float32) != model_digest(packed(torch.zeros(1)), torch.float32)


def test_a_tied_head_counts_once_in_memory_and_file(tmp_path: Path) -> None:
    model = torch.nn.Module()
    model.embed, model.lm_head = torch.nn.Embedding(8, 16), torch.nn.Linear(16, 8, bias=False)
    model.lm_head.weight = model.embed.weight
    once = {"embed.weight": model.embed.weight.detach()}
    found = model_digest(model, torch.float32)
    assert folder_digest(stored(tmp_path / "one", once, tie_word_embeddings=True), "float32") == found
    twice = {**once, "lm_head.weight": once["embed.weight"].clone()}
    assert folder_digest(stored(tmp_path / "two", twice, tie_word_embeddings=True), "float32") == found
    assert folder_digest(stored(tmp_path / "untied", twice, tie_word_embeddings=False), "float32") != found


def test_weights_in_several_files_are_those_of_the_index(tmp_path: Path) -> None:
    whole = folder_digest(stored(tmp_path / "whole", {"q": Q, "k": K}), "float32")
    parts = stored(tmp_path / "parts", {})
    (parts / "model.safetensors").unlink()
    save_file({"q": Q}, parts / "a.safetensors")
    save_file({"k": K}, parts / "b.safetensors")
    save_file({"v": V}, parts / "stray.safetensors")
    index = {"weight_map": {"q": "a.safetensors", "k": "b.safetensors"}}
    (parts / "model.safetensors.index.json").write_text(json.dumps(index))
    assert folder_digest(parts, "float32") == whole


class Packed(torch.nn.Module):
    """As a layer of vLLM's CPU build: it computes with a copy, and its parameter may be empty."""

    def __init__(self, copy: torch.Tensor, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.input_size = torch.nn.Parameter(weight), copy.shape[1]
        self.cpu_linear = lambda x, weight, bias: x @ copy.t()


def test_a_packed_copy_is_read_back(tmp_path: Path) -> None:
    expected = folder_digest(stored(tmp_path, {"q": Q}), "float32")
    assert model_digest(Packed(Q, torch.empty(0)), torch.float32) == expected
    assert model_digest(Packed(Q, Q), torch.float32) == expected
    assert model_digest(Packed(Q + 1e-6, Q), torch.float32) != expected  # an old copy beside a new parameter
    assert model_digest(Packed(Q, Q + 1e-6), torch.float32) != expected
