"""Loading weights into a model that is there: what fits is taken as it is, what does not fit is named."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdrl_core.errors import ModelError
from kdrl_core.miniature.models import MiniatureModel, build_model, build_tokenizer
from kdrl_core.models.loading import load_model, load_weights_into, stop_token_ids

TOKENS = torch.tensor([[2, 8, 17, 9, 3, 4]])


def tiny(*, is_tied: bool, seed: int = 0, hidden_size: int = 16) -> Any:
    spec = MiniatureModel(
        hidden_size=hidden_size, num_layers=1, tie_word_embeddings=is_tied, sft_steps=0, learning_rate=1.0
    )
    return build_model(spec, build_tokenizer(), seed=seed).eval()


def saved(model: Any, path: Path, *, without: str | None = None, **changed: torch.Tensor) -> Path:
    """The model's directory, one weight left out or some replaced."""
    model.save_pretrained(path)
    file = path / "model.safetensors"
    weights = {name: value for name, value in load_file(file).items() if name != without}
    save_file({**weights, **changed}, file, metadata={"format": "pt"})
    return path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("is_tied", [True, False])
def test_weights_are_taken(tmp_path: Path, is_tied: bool) -> None:
    source, target = tiny(is_tied=is_tied, seed=1), tiny(is_tied=is_tied, seed=2)
    assert not torch.equal(logits(source), logits(target))
    load_weights_into(target, saved(source, tmp_path))
    assert torch.equal(logits(source), logits(target))
    assert (target.lm_head.weight is target.model.embed_tokens.weight) == is_tied


def test_sharded_weights_are_taken(tmp_path: Path) -> None:
    source, target = tiny(is_tied=False, seed=1), tiny(is_tied=False, seed=2)
    source.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    load_weights_into(target, tmp_path)
    assert torch.equal(logits(source), logits(target))


@pytest.mark.parametrize("missing", ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_missing_weight_is_named(tmp_path: Path, missing: str) -> None:
    path = saved(tiny(is_tied=False), tmp_path, without=missing)
    with pytest.raises(ModelError, match=rf"does not fit the model: missing \['{missing}'\]"):
        load_weights_into(tiny(is_tied=False, seed=1), path)


def test_missing_embedding_of_a_tied_model_is_named(tmp_path: Path) -> None:
    path = saved(tiny(is_tied=True), tmp_path, without="model.embed_tokens.weight")
    with pytest.raises(ModelError, match=r"missing \['model.embed_tokens.weight'\]"):
        load_weights_into(tiny(is_tied=True, seed=1), path)


def test_unknown_weight_is_named(tmp_path: Path) -> None:
    path = saved(tiny(is_tied=True), tmp_path, stranger=torch.zeros(2))
    with pytest.raises(ModelError, match="stranger"):
        load_weights_into(tiny(is_tied=True), path)


def test_wrong_shape_is_named(tmp_path: Path) -> None:
    path = saved(tiny(is_tied=True, hidden_size=32), tmp_path)
    with pytest.raises(ModelError, match=r"does not fit the model: .*size mismatch for model\.embed_tokens\.weight"):
        load_weights_into(tiny(is_tied=True), path)


def test_untied_head_does_not_fit_a_tied_model(tmp_path: Path) -> None:
    """Loaded one after the other into the same memory, the last would win without a word."""
    path = saved(tiny(is_tied=False), tmp_path)
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        load_weights_into(tiny(is_tied=True), path)


def test_equal_copies_of_a_tied_weight_fit(tmp_path: Path) -> None:
    source, target = tiny(is_tied=True, seed=1), tiny(is_tied=True, seed=2)
    copy = source.model.embed_tokens.weight.detach().clone()
    load_weights_into(target, saved(source, tmp_path, **{"lm_head.weight": copy}))
    assert torch.equal(logits(source), logits(target))


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_weights_into(tiny(is_tied=True), tmp_path)


def test_truncated_file_is_an_error(tmp_path: Path) -> None:
    file = saved(tiny(is_tied=True), tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_weights_into(tiny(is_tied=True), tmp_path)


def test_load_model_names_the_directory(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"no model can be loaded from {tmp_path}"):
        load_model(tmp_path)


def test_load_model_refuses_random_numbers_for_missing_weights(tmp_path: Path) -> None:
    path = saved(tiny(is_tied=False), tmp_path, without="model.norm.weight")
    with pytest.raises(ModelError, match=r"lacks 1 weights of a Qwen2ForCausalLM, the first is model\.norm\.weight"):
        load_model(path)


@pytest.mark.parametrize("is_tied", [True, False])
def test_load_model_takes_what_was_saved(tmp_path: Path, is_tied: bool) -> None:
    model = tiny(is_tied=is_tied)
    assert torch.equal(logits(load_model(saved(model, tmp_path))), logits(model))


def test_load_model_of_a_truncated_file(tmp_path: Path) -> None:
    file = saved(tiny(is_tied=True), tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=f"no model can be loaded from {tmp_path}"):
        load_model(tmp_path)


def test_load_model_of_weights_of_another_shape(tmp_path: Path) -> None:
    path = saved(tiny(is_tied=True), tmp_path, **{"model.norm.weight": torch.ones(7)})
    with pytest.raises(ModelError, match=f"no model can be loaded from {tmp_path}"):
        load_model(path)


def test_stop_ids_are_the_generation_configs_and_the_tokenizers(student_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(student_dir, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [9, 4]}))
    tokenizer = build_tokenizer()
    assert stop_token_ids(load_model(tmp_path / "m"), tokenizer) == (tokenizer.eos_token_id, 4, 9)
    tokenizer.eos_token = None
    assert stop_token_ids(load_model(tmp_path / "m"), tokenizer) == (4, 9)
    model = load_model(tmp_path / "m")
    model.generation_config.eos_token_id = None
    with pytest.raises(ModelError, match="no end-of-sequence token; set eos_token"):
        stop_token_ids(model, tokenizer)
