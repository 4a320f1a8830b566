"""What config.json and the headers of safetensors files say of a model's weights, before any weight is read.

Checked here: files that are cut short, quantised and vision-language models, weights that the architecture lacks or has
in another shape, and an output layer that the config ties to the embedding although the files hold one of its own.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrl_core.config.outside import WEIGHTS, shards, weight_map
from kdrl_core.errors import ModelError

_MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""
_FLOATS = ("F64", "F32", "F16", "BF16")
_PACKED = re.compile(r"\.(weight|qweight|weight_packed)$")
_OTHER_SENSES = ("vision_config", "audio_config", "vision_tower_config")
_BLOCK = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight:
    """A tensor in a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    """Of its bytes in the file."""
    size: int
    """In bytes."""


def stored_weights(path: Path) -> dict[str, StoredWeight]:
    """The weights of a model directory by name, from the headers of its files.

    Raises:
        ModelError: a file is cut short or has no valid header, or lacks a weight that the index places there.
    """
    found: dict[str, StoredWeight] = {}
    for name in shards(path) or [WEIGHTS[0]]:
        found |= _header(path / name)
    for weight, name in weight_map(path).items():
        if weight not in found or found[weight].file.name != name:
            raise ModelError(f"{path / name} lacks {weight}, which {WEIGHTS[1]} places there; download the model again")
    return found


def _header(file: Path) -> dict[str, StoredWeight]:
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 0 < length <= min(_MAX_HEADER, size - 8):
                raise ValueError("it has no valid header")
            header = json.loads(opened.read(length))
        found = {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                place = {"file": file, "start": 8 + length + start, "size": end - start}
                found[name] = StoredWeight(dtype=entry["dtype"], shape=tuple(entry["shape"]), **place)
        needed = max((weight.start + weight.size for weight in found.values()), default=8 + length)
        if needed > size:
            raise ValueError(f"it is cut short: it has {size:,} bytes, and its header needs {needed:,}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read ({error}); download the model again") from error
    return found


def other_kind(path: Path, config: Mapping[str, Any]) -> str | None:
    """Why a model with this parsed config.json is not a plain text model, and what to give instead; None if it is one.

    Raises:
        ModelError: as `stored_weights`.
    """
    found = stored_weights(path)
    packed = next((name for name in found if _PACKED.search(name) and found[name].dtype not in _FLOATS), None)
    part = config.get("quantization_config") or config.get("compression_config")
    if part or packed is not None:
        method = f", {part['quant_method']}" if isinstance(part, dict) and "quant_method" in part else ""
        said = f"config.json has quantization_config{method}"
        if packed is not None:
            said = f"{packed} has the type {found[packed].dtype}{method}"
        return (
            f"has quantised weights ({said}), which are not loaded here; give the model in bfloat16, float16 or float32"
        )
    if senses := [name for name in _OTHER_SENSES if config.get(name)]:
        return (
            f"is a model that also sees or hears ({senses[0]} in config.json); give a text model, such as its language "
            "model saved on its own"
        )
    return None


def compare_architecture(path: Path, *, where: str) -> tuple[str, str] | None:
    """Compare the stored weights with the architecture of config.json, which is built without memory for its weights.

    Returns:
        names of an output layer and of the embedding that the architecture ties it to, if the files hold both and they
        differ; transformers then uses the output layer of the files. Else None.

    Raises:
        ModelError: there is no such architecture, or a weight is missing or of another shape.
    """
    stored = stored_weights(path)
    model, is_converted = _architecture(path, where=where)
    tied: dict[str, str] = model.all_tied_weights_keys
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters(remove_duplicate=False)}
    names = {_plain(name, model): weight for name, weight in stored.items()}
    again = "download the model again, or correct its config.json"
    missing = sorted(name for name in shapes.keys() - tied.keys() if _plain(name, model) not in names)
    if missing and not is_converted:
        raise ModelError(
            f"{where}: {path} lacks {len(missing)} weights of a {type(model).__name__}, the first is {missing[0]}; "
            f"{again}"
        )
    for name, shape in shapes.items():
        weight = names.get(_plain(name, model))
        if weight is not None and weight.shape != shape and not is_converted:
            raise ModelError(
                f"{where}: {path}: {name} has the shape {list(weight.shape)}, config.json asks for {list(shape)}; "
                f"{again}"
            )
    for head, source in tied.items():
        own, shared = names.get(_plain(head, model)), names.get(_plain(source, model))
        if own is not None and shared is not None and not _equal(own, shared):
            return head, source
    return None


def _plain(name: str, model: Any) -> str:
    """The name without the prefix that files of a base model lack."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def _architecture(path: Path, *, where: str) -> tuple[Any, bool]:
    """The model without weights, and whether transformers renames or joins stored weights when it loads them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # each kind of broken config fails in its own way
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{where}: no causal language model can be made from {path / 'config.json'} ({reason}); "
            "give another model, or correct that file"
        ) from error
    return model, get_checkpoint_conversion_mapping(config.model_type) is not None


def _equal(one: StoredWeight, other: StoredWeight) -> bool:
    """Whether two tensors have the same bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(a == b for a, b in zip(_blocks(one), _blocks(other), strict=True))


def _blocks(weight: StoredWeight) -> Iterable[bytes]:
    with weight.file.open("rb") as file:
        file.seek(weight.start)
        for start in range(0, weight.size, _BLOCK):
            yield file.read(min(_BLOCK, weight.size - start))
