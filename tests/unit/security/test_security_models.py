"""Model directories and checkpoints of others: no pickle is opened, and no code that comes with them is run unasked."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kdrl_core.config import ModelConfig, load_recipe
from kdrl_core.data.prompts import render_prompts
from kdrl_core.errors import ModelError
from kdrl_core.models.loading import check_model_dir, load_model, load_weights_into
from kdrl_core.models.tokenizer import read_tokenizer
from kdrl_core.training.protocols import STATE_DIR, OptimizerSettings
from kdrl_core.training.torch_trainer import TorchTrainer

Arm = Callable[[], None]


def edit_json(path: Path, **values: Any) -> None:
    """Add fields to a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def check(model: Path, **fields: Any) -> dict[str, Any]:
    return check_model_dir(ModelConfig(path=str(model), **fields), role="student")


def assert_refused_by_check_and_load(model: Path, reason: str) -> None:
    for attempt in (check, load_model):
        with pytest.raises(ModelError, match=reason):
            attempt(model)


def test_the_traps_work(model: Path, torch_bait: bytes, marker: Path) -> None:
    """Otherwise nothing below would mean anything."""
    (model / "pytorch_model.bin").write_bytes(torch_bait)
    torch.load(model / "pytorch_model.bin", weights_only=False)
    assert marker.exists()


def test_a_pickle_in_place_of_weights_is_refused(model: Path, torch_bait: bytes, marker: Path, no_pickles: Arm) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(torch_bait)
    (model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    no_pickles()
    with pytest.raises(ModelError, match=r"has no model\.safetensors; only safetensors weights are loaded, convert"):
        check(model)
    with pytest.raises(ModelError, match=r"no file named model\.safetensors"):
        load_model(model)
    assert not marker.exists()


def test_a_pickle_beside_weights_is_not_opened(model: Path, torch_bait: bytes, marker: Path, no_pickles: Arm) -> None:
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt"):
        (model / name).write_bytes(torch_bait)
    (model / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    no_pickles()
    check(model)
    load_weights_into(load_model(model), model)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../model/pytorch_model.bin", "/etc/passwd", "../x.safetensors"])
def test_a_weight_index_names_no_other_files(
    name: str, model: Path, torch_bait: bytes, marker: Path, no_pickles: Arm
) -> None:
    """transformers opens what an index names, and as a pickle unless the name says safetensors."""
    (model / "model.safetensors").rename(model.parent / "x.safetensors")
    (model / "pytorch_model.bin").write_bytes(torch_bait)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    no_pickles()
    assert_refused_by_check_and_load(model, r"index\.json names '.*', which is no safetensors file beside it")
    assert not marker.exists()


def test_an_index_beside_whole_weights_changes_nothing(model: Path, torch_bait: bytes, no_pickles: Arm) -> None:
    """Planted in a checkpoint, whose manifest does not list it, it would otherwise give the policy other weights."""
    untouched = load_model(model)
    (model / "evil.safetensors").write_bytes(b"x")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "evil.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    no_pickles()
    again = load_model(model)
    load_weights_into(again, model)
    assert all(torch.equal(a, b) for a, b in zip(untouched.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("name", ["adapter_model.bin", "evil.safetensors.index.json"])
def test_config_names_no_other_weights(
    name: str, model: Path, torch_bait: bytes, marker: Path, no_pickles: Arm
) -> None:
    (model / "adapter_model.bin").write_bytes(torch_bait)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "adapter_model.bin"}}
    (model / "evil.safetensors.index.json").write_text(json.dumps(index))
    edit_json(model / "config.json", transformers_weights=name)
    no_pickles()
    assert_refused_by_check_and_load(model, "names weights of its own choice")
    assert not marker.exists()


def test_an_adapter_is_refused(model: Path) -> None:
    """With peft installed, transformers would fetch the model that it names."""
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/else"}))
    with pytest.raises(ModelError, match=r"is an adapter to another model .*; merge it into that model"):
        check(model)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 8, (2**62).to_bytes(8, "little") + b"{}", b"\x02" + b"\x00" * 7 + b"[]", b"\x80\x04." * 9],
)
def test_damaged_safetensors_are_told_in_one_line(content: bytes, model: Path) -> None:
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError) as caught:
        load_model(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", ["[" * 200_000, "null", '"x"', "[1]", "\x00"])
def test_hostile_json_is_told_in_one_line(file: str, content: str, model: Path) -> None:
    """Nesting that exhausts the parser, and values of another kind than expected."""
    if file.startswith("model"):
        (model / "model.safetensors").unlink()
    if file.startswith("tokenizer"):
        (model / "tokenizer.json").unlink()
    (model / file).write_text(content)
    with pytest.raises(ModelError) as caught:
        check(model)
    assert "\n" not in str(caught.value)


OWN_MODEL = """
from pathlib import Path
from transformers import Qwen2Config, Qwen2ForCausalLM
Path({marker!r}).mkdir()
class Config(Qwen2Config):
    model_type = "own"
class Model(Qwen2ForCausalLM):
    config_class = Config
"""


def with_own_code(model: Path, marker: Path) -> Path:
    """The model as one of a kind that transformers does not know, with the code for it."""
    (model / "own.py").write_text(OWN_MODEL.format(marker=str(marker)))
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    edit_json(model / "config.json", model_type="own", architectures=["Model"], auto_map=auto_map)
    return model


def test_code_of_a_model_is_not_run_unasked(model: Path, marker: Path) -> None:
    with_own_code(model, marker)
    with pytest.raises(ModelError, match=r"comes with code of its own .* set student\.trust_remote_code=true if you"):
        check(model)
    with pytest.raises(ModelError, match="trust_remote_code=true"):
        load_model(model)
    assert not marker.exists()


def test_code_of_a_model_is_run_when_asked(
    model: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # where transformers puts that folder
    with_own_code(model, marker)
    check(model, trust_remote_code=True)
    assert load_model(model, trust_remote_code=True).config.model_type == "own"
    assert marker.exists()


def test_code_beside_a_known_model_is_left_alone(model: Path, marker: Path) -> None:
    with_own_code(model, marker)
    edit_json(model / "config.json", model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).mkdir()\n")
    check(model)
    load_model(model)
    assert not marker.exists()


def test_code_of_a_tokenizer_is_not_run_unasked(model: Path, marker: Path) -> None:
    (model / "own.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).mkdir()\nclass Tokenizer: pass\n")
    edit_json(
        model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Tokenizer", None]}, tokenizer_class="Own"
    )
    check(model)
    assert read_tokenizer(model).encode("1+1")  # tokenizer.json says all that is needed
    (model / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"set student\.trust_remote_code=true"):
        check(model)
    for gguf_file in (None, "x.gguf"):
        with pytest.raises(ModelError):
            read_tokenizer(model, gguf_file=gguf_file)
    assert not marker.exists()


def test_a_checkpoint_is_json_and_safetensors_and_pickles_in_it_are_ignored(
    model: Path, bait: bytes, torch_bait: bytes, marker: Path, tmp_path: Path, no_pickles: Arm
) -> None:
    def trainer() -> TorchTrainer:
        settings = OptimizerSettings(
            temperature=1.0,
            learning_rate=1e-3,
            weight_decay=0.0,
            warmup_steps=0,
            max_grad_norm=1.0,
            micro_batch_tokens=64,
        )
        return TorchTrainer(load_model(model), read_tokenizer(model), settings)

    no_pickles()
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    trainer().save(checkpoint)
    assert {path.suffix for path in (checkpoint / STATE_DIR).iterdir()} == {".json", ".safetensors"}
    assert not [path for path in checkpoint.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    for folder in (checkpoint, checkpoint / STATE_DIR):
        for name in ("optimizer.pt", "trainer_state.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"):
            (folder / name).write_bytes(torch_bait)
        (folder / "state.pkl").write_bytes(bait)
    trainer().load(checkpoint)
    assert not marker.exists()


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.mkdir(MARKER) }}",
    "{{ raise_exception.__globals__['__builtins__']['__import__']('os').mkdir(MARKER) }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
]
FAILURES = [
    "{{ 1 / 0 }}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ messages[0].no.such }}",
    "{{ ",
    "{{ raise_exception('no\nsystem\x1b[2J turn') }}",
]


@pytest.mark.parametrize("template", [*ESCAPES, *FAILURES])
def test_a_chat_template_can_only_write_a_prompt(template: str, model: Path, marker: Path) -> None:
    """It runs in a sandbox, and whatever it raises is told as the template's fault, in one plain line."""
    tokenizer = read_tokenizer(model)
    recipe = load_recipe("miniature")
    tokenizer.chat_template = template.replace("MARKER", repr(str(marker)))
    with pytest.raises(
        ModelError, match=r"the chat template cannot be rendered .*; correct student\.chat_template"
    ) as e:
        render_prompts(["1+1"], tokenizer, recipe)
    assert str(e.value).isprintable()
    assert not marker.exists()
