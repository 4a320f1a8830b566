"""Model directories with random weights, of the shape that a recipe's models have. Nothing is downloaded.

If the recipe's folder has a config.json, its shape is taken; its weights are not read. Else the planner knows the
published model of that name. If no folder has a tokenizer, the miniature's is filled up to the size of the vocabulary
with words that no text holds, so that sampling and scoring work on all of it.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrl_core.config import ModelConfig, resolve_path
from kdrl_core.config.outside import READ_WITH_WEIGHTS
from kdrl_core.config.paths import WEIGHTS
from kdrl_core.errors import KdrlError
from kdrl_core.look.planning.shapes import ModelShape, shape_of
from kdrl_core.models.loading import GENERATION

if TYPE_CHECKING:
    import torch

_SHARD_BYTES = 2 * 2**30
_POOL = 16_777_213
"""Random numbers that are drawn once and repeated. A prime, so that no two rows of a matrix are the same."""
_SPARE = 100_003
_STD = 0.02
"""Of Qwen's and Llama's own initialisation."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_TOKENIZER = "builtin:miniature/student"
_CONTEXT = 131_072
_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}<|user|>{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def own_folder(model: ModelConfig) -> Path | None:
    """The recipe's folder of a model, if its config.json is there; its weights need not be."""
    with suppress(KdrlError):
        path = resolve_path(model.path)
        if model.gguf_file is None and (path / "config.json").is_file():
            return path
    return None


def tokenizer_folder(models: Mapping[str, ModelConfig]) -> Path | None:
    """The first model's folder that has a tokenizer."""
    folders = [folder for model in models.values() if (folder := own_folder(model)) is not None]
    return next((folder for folder in folders if any((folder / name).is_file() for name in _TOKENIZER_FILES)), None)


def write_random_models(models: Mapping[str, ModelConfig], folder: Path, *, seed: int) -> dict[str, int]:
    """Write `folder/<role>` with random weights for each role; returns the bytes of the weights.

    All have one tokenizer: that of the first model that has one, else one that fits the smallest vocabulary.

    Raises:
        ModelError: neither a config.json nor a published model of that name is known.
    """
    configs = {role: _config(model, role=role) for role, model in models.items()}
    tokenizer = tokenizer_folder(models)
    sizes = {}
    for number, (role, model) in enumerate(models.items()):
        (place := folder / role).mkdir(parents=True)
        own = own_folder(model)
        if tokenizer is None:
            write_tokenizer(place, size=min(config.vocab_size for config in configs.values()))
        for source, patterns in ((tokenizer, READ_WITH_WEIGHTS), (own, ["*.py"])):
            for file in [] if source is None else [file for pattern in patterns for file in source.glob(pattern)]:
                shutil.copyfile(file, place / file.name)
        sizes[role] = _write_weights(
            configs[role], place, trust_remote_code=model.trust_remote_code, seed=seed + number
        )
    return sizes


def _config(model: ModelConfig, *, role: str) -> Any:
    """The config of the recipe's own folder, or of the published model."""
    if (source := own_folder(model)) is None:
        return _published_config(shape_of(model, role=role))
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(source, trust_remote_code=model.trust_remote_code, local_files_only=True)


def write_tokenizer(folder: Path, *, size: int) -> None:
    """A tokenizer with `size` ids: the miniature's characters, and words that no text holds."""
    source = resolve_path(_TOKENIZER)
    values = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = values["model"]["vocab"]
    taken = 1 + max([*vocabulary.values(), *(token["id"] for token in values["added_tokens"])])
    vocabulary.update({f"<{number}>": number for number in range(taken, size)})
    (folder / "tokenizer.json").write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    told = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    told |= {"chat_template": _TEMPLATE, "model_max_length": _CONTEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")
    generation = {"eos_token_id": vocabulary[told["eos_token"]], "pad_token_id": vocabulary[told["pad_token"]]}
    (folder / GENERATION).write_text(json.dumps(generation), encoding="utf-8")


def _published_config(shape: ModelShape) -> Any:
    """The config of a published model, from its shape. They are Qwen2 if queries and keys have biases, else Llama."""
    from transformers import LlamaConfig, Qwen2Config

    sizes: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.max_context or _CONTEXT,
        "tie_word_embeddings": shape.tied,
        "dtype": "bfloat16",
    }
    return Qwen2Config(**sizes) if shape.qkv_bias else LlamaConfig(**sizes, head_dim=shape.head_dim)


def _write_weights(config: Any, folder: Path, *, trust_remote_code: bool, seed: int) -> int:
    """Write config.json and safetensors files of at most 2 GiB."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    config.architectures, config.dtype = [type(shell).__name__], dtype
    config.save_pretrained(folder)
    tied = set(getattr(shell, "all_tied_weights_keys", {}))
    shapes = {name: value.shape for name, value in shell.state_dict().items() if name not in tied}
    most = max(shape.numel() for shape in shapes.values())
    pool = torch.randn(min(_POOL, most + _SPARE), generator=torch.Generator().manual_seed(seed)).mul_(_STD).to(dtype)
    files: dict[str, str] = {}
    total = 0
    for number, names in enumerate(_shards(shapes, dtype.itemsize)):
        tensors = {name: _values(name, shapes[name], pool, offset=len(files) + row) for row, name in enumerate(names)}
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / WEIGHTS[1]).write_text(json.dumps(index), encoding="utf-8")
    return total


def _shards(shapes: "dict[str, torch.Size]", width: int) -> Iterator[list[str]]:
    """Names of the weights of one file after the other."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + shape.numel() * width > _SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += shape.numel() * width
    yield names


def _values(name: str, shape: "torch.Size", pool: "torch.Tensor", *, offset: int) -> "torch.Tensor":
    """Ones for norms, zeros for other vectors, random numbers for matrices."""
    import torch

    if "norm" in name:
        return torch.ones(shape, dtype=pool.dtype)
    if len(shape) < 2:
        return torch.zeros(shape, dtype=pool.dtype)
    turned = torch.roll(pool, 7919 * offset)
    return turned.repeat(-(-shape.numel() // len(pool)))[: shape.numel()].reshape(shape).contiguous()
