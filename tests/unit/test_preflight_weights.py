"""Models that could not be loaded when their turn comes are found before any work, from JSON files and headers."""

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdrl_core.boxes.preflight import check_inputs, check_weights
from kdrl_core.config import ModelConfig, load_recipe, resolve_path
from kdrl_core.errors import ModelError
from kdrl_core.models.loading import load_model, load_weights_into
from kdrl_core.models.prepare import prepared_model

WEIGHTS = "model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(params=["student", "teacher"])
def role(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(role: str, tmp_path: Path) -> Path:
    """A copy of the role's model."""
    return Path(shutil.copytree(resolve_path(f"builtin:miniature/{role}"), tmp_path / role))


def check(model: Path, role: str, *overrides: str) -> None:
    check_weights(load_recipe("miniature", [f"{role}.path={model}", *overrides]))


def edit(model: Path, **values: Any) -> None:
    """Change fields of config.json; None removes one."""
    fields = {**json.loads((model / "config.json").read_text()), **values}
    (model / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))


def rewrite(model: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> dict[str, torch.Tensor]:
    """Change the weights. Returns them."""
    weights = load_file(model / WEIGHTS)
    change(weights)
    save_file(weights, model / WEIGHTS, metadata={"format": "pt"})
    return weights


def split(model: Path) -> None:
    """The weights in two shards, and an index that places one weight in the wrong shard."""
    weights = list(load_file(model / WEIGHTS).items())
    (model / WEIGHTS).unlink()
    names = {}
    for number, part in ((1, weights[:3]), (2, weights[3:])):
        save_file(dict(part), model / f"part-{number}.safetensors", metadata={"format": "pt"})
        names |= {name: f"part-{number}.safetensors" for name, _ in part}
    names[weights[0][0]] = "part-2.safetensors"
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": names}))


def cut(model: Path) -> None:
    content = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(content[: len(content) - 100])


def lengthen(model: Path) -> None:
    with (model / WEIGHTS).open("ab") as file:
        file.write(b"more")


def quantised(model: Path) -> None:
    def pack(weights: dict[str, torch.Tensor]) -> None:
        del weights["model.layers.0.mlp.up_proj.weight"]
        weights["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(2, dtype=torch.int32)

    rewrite(model, pack)


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "awq": (
        lambda model: edit(model, quantization_config={"quant_method": "awq", "bits": 4}),
        r"has quantised weights \(config\.json has quantization_config, awq\), .*; give the model in bfloat16",
    ),
    "packed": (quantised, r"has quantised weights \(model\.layers\.0\.mlp\.up_proj\.qweight has the type I32\)"),
    "fp8": (
        lambda model: rewrite(model, lambda w: w.update({EMBEDDING: w[EMBEDDING].to(torch.float8_e4m3fn)})),
        r"has quantised weights \(model\.embed_tokens\.weight has the type F8_E4M3\)",
    ),
    "vision": (
        lambda model: edit(model, model_type="qwen2_5_vl", vision_config={"depth": 1}),
        r"is a model that also sees or hears \(vision_config in config\.json\); give a text model",
    ),
    "unknown": (lambda model: edit(model, model_type="own9"), "no causal language model can be made from .*own9"),
    "encoder": (lambda model: edit(model, model_type="t5"), "no causal language model can be made from .*T5"),
    "cut short": (cut, r"model\.safetensors is cut short or damaged \(.*not fully covered\); download the model again"),
    "too long": (lengthen, r"model\.safetensors is cut short or damaged \(.*not fully covered\); download"),
    "empty": (lambda model: (model / WEIGHTS).write_bytes(b""), r"is cut short or damaged \(.*header too small\)"),
    "index": (split, r"part-2\.safetensors lacks .*, which model\.safetensors\.index\.json places there; download"),
    "lacking": (
        lambda model: rewrite(model, lambda w: w.pop("model.norm.weight")),
        r"lacks 1 weights of a Qwen2.*norm",
    ),
    "layers": (lambda model: edit(model, num_hidden_layers=9, layer_types=None), r"lacks \d+ weights of a Qwen2ForCau"),
    "shape": (lambda model: edit(model, vocab_size=99), r"embed_tokens\.weight has the shape \[\d+, \d+\], config\.js"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_cannot_be_loaded_is_found_at_once(fault: str, model: Path, role: str) -> None:
    spoil, told = FAULTS[fault]
    spoil(model)
    with pytest.raises(ModelError, match=told) as caught:
        check(model, role)
    assert str(model) in str(caught.value)
    assert "\n" not in str(caught.value)
    if fault == "fp8":
        return  # transformers would take the numbers without their scales
    with pytest.raises(ModelError):
        load_model(model)  # the check refuses nothing that could be loaded


def test_it_is_part_of_the_check_before_a_run(tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(resolve_path("builtin:miniature/teacher"), tmp_path / "teacher"))
    check_inputs(load_recipe("miniature", [f"teacher.path={teacher}"]))
    cut(teacher)
    with pytest.raises(ModelError, match=r"model\.safetensors is cut short"):
        check_inputs(load_recipe("miniature", [f"teacher.path={teacher}"]))


def test_a_gguf_file_without_the_package_that_reads_it_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "accelerate", None)  # as if it were not installed
    with pytest.raises(ModelError, match=r"reading a\.gguf needs more packages: pip install 'kdrl\[gguf\]'"):
        prepared_model(ModelConfig(path=str(tmp_path), gguf_file="a.gguf"), tmp_path / "artifacts" / "runs" / "r")


def test_what_vllm_may_know_is_left_to_it(tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(resolve_path("builtin:miniature/teacher"), tmp_path / "teacher"))
    edit(teacher, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ModelError, match=r"teacher\.path=.*, or set teacher\.engine=vllm if vLLM knows it$"):
        check(teacher, "teacher")
    check(teacher, "teacher", "teacher.engine=vllm")
    cut(teacher)
    with pytest.raises(ModelError, match="cut short"):
        check(teacher, "teacher", "teacher.engine=vllm")


def test_files_of_a_base_model_are_known_by_their_shorter_names(role: str, model: Path) -> None:
    def shorten(weights: dict[str, torch.Tensor]) -> None:
        for name in [*weights]:
            weights[name.removeprefix("model.")] = weights.pop(name)

    rewrite(model, shorten)
    check(model, role)
    load_model(model)


def own_head(weights: dict[str, torch.Tensor]) -> None:
    weights[HEAD] = weights[EMBEDDING] + 1.0


def test_a_head_of_its_own_beside_a_tied_config_counts_and_is_told(
    model: Path, role: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(model, tie_word_embeddings=True)
    weights = rewrite(model, own_head)
    check(model, role)
    assert (
        f"{role}.path={model}: config.json ties lm_head.weight to model.embed_tokens.weight, but the files hold both, "
        "and they differ. lm_head.weight counts: it is used, trained and exported, with tie_word_embeddings=false"
    ) in caplog.text
    loaded = load_model(model)
    assert torch.equal(loaded.get_output_embeddings().weight, weights[HEAD])
    loaded.save_pretrained(tmp_path / "export")
    assert json.loads((tmp_path / "export" / "config.json").read_text())["tie_word_embeddings"] is False
    exported = load_file(tmp_path / "export" / WEIGHTS)
    assert torch.equal(exported[HEAD], weights[HEAD])
    assert torch.equal(exported[EMBEDDING], weights[EMBEDDING])
    again = load_model(tmp_path / "export")
    load_weights_into(again, tmp_path / "export")
    assert torch.equal(again.get_output_embeddings().weight, weights[HEAD])


@pytest.mark.parametrize("field", ["teacher.engine=vllm", "rollout.engine=vllm"])
def test_vllm_would_leave_that_head_out(field: str, model: Path, role: str) -> None:
    edit(model, tie_word_embeddings=True)
    rewrite(model, own_head)
    if field.startswith("rollout") != (role == "student"):
        pytest.skip("the engine of the other model")
    with pytest.raises(ModelError, match=r"vLLM would leave lm_head\.weight out: set tie_word_embeddings to false"):
        check(model, role, field)


def test_a_copy_of_the_embedding_as_head_is_nothing_to_tell(
    model: Path, role: str, caplog: pytest.LogCaptureFixture
) -> None:
    edit(model, tie_word_embeddings=True)
    rewrite(model, lambda weights: weights.update({HEAD: weights[EMBEDDING].clone()}))
    with caplog.at_level(logging.WARNING):
        check(model, role)
    assert caplog.text == ""
    assert load_model(model).config.tie_word_embeddings is True
