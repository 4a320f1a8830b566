"""What config.json and the headers of safetensors files say of a model's weights, before any weight is read.

Checked here: files that are cut short, quantised and vision-language models, weights that the architecture lacks or has
in another shape, and an output layer that the config ties to the embedding although the files hold one of its own.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrl_core.config.paths import WEIGHTS, weight_map
from kdrl_core.errors import ModelError

_FLOATS = ("F64", "F32", "F16", "BF16")
_PACKED = re.compile(r"\.(weight|qweight|weight_packed)$")
_OTHER_SENSES = ("vision_config", "audio_config", "vision_tower_config")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight:
    """A tensor in a safetensors file."""

    file: Path
    dtype: str
    """As safetensors names it: `BF16`."""
    shape: tuple[int, ...]


def stored_weights(path: Path) -> dict[str, StoredWeight]:
    """The weights of a model directory by name, from the headers of its files.

    Raises:
        ModelError: a file is cut short or has no valid header, or lacks a weight that the index places there.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, StoredWeight] = {}
    index = weight_map(path)
    for name in sorted(set(index.values())) or [WEIGHTS[0]]:
        file = path / name
        try:
            with safe_open(file, framework="pt") as opened:
                for weight in opened.keys():  # noqa: SIM118 (it cannot be iterated)
                    if index.get(weight, name) != name:
                        continue
                    header = opened.get_slice(weight)
                    found[weight] = StoredWeight(file=file, dtype=header.get_dtype(), shape=tuple(header.get_shape()))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} is cut short or damaged ({error}); download the model again") from error
    for weight, name in index.items():
        if weight not in found:
            raise ModelError(f"{path / name} lacks {weight}, which {WEIGHTS[1]} places there; download the model again")
    return found


def other_kind(stored: Mapping[str, StoredWeight], config: Mapping[str, Any]) -> str | None:
    """Why a model with these weights and this parsed config.json is not a plain text model, and what to give instead;
    None if it is one."""
    signs = []
    for key in ("quantization_config", "compression_config"):
        if part := config.get(key):
            method = part.get("quant_method") if isinstance(part, dict) else None
            signs.append(f"config.json has {key}" + (f", {method}" if method else ""))
    signs += [
        f"{name} has the type {weight.dtype}"
        for name, weight in stored.items()
        if _PACKED.search(name) and weight.dtype not in _FLOATS
    ]
    if signs:
        return (
            f"has quantised weights ({signs[0]}), which are not loaded here; "
            "give the model in bfloat16, float16 or float32"
        )
    if senses := [name for name in _OTHER_SENSES if config.get(name)]:
        return (
            f"is a model that also sees or hears ({senses[0]} in config.json); give a text model, such as its language "
            "model saved on its own"
        )
    return None


def compare_architecture(path: Path, stored: Mapping[str, StoredWeight], *, where: str) -> tuple[str, str] | None:
    """Compare the stored weights with the architecture of config.json, which is built without memory for its weights.

    Returns:
        names of an output layer and of the embedding that the architecture ties it to, if the files hold both and they
        differ; transformers then uses the output layer of the files. Else None.

    Raises:
        ModelError: there is no such architecture, or a weight is missing or of another shape.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    model = architecture(path, where=where)
    tied: dict[str, str] = model.all_tied_weights_keys
    names = {_plain(name, model): name for name in stored}
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters(remove_duplicate=False)}
    if get_checkpoint_conversion_mapping(model.config.model_type) is None:  # else stored weights are renamed or joined
        again = "download the model again, or correct its config.json"
        if missing := sorted(name for name in shapes.keys() - tied.keys() if _plain(name, model) not in names):
            raise ModelError(
                f"{where}: {path} lacks {len(missing)} weights of a {type(model).__name__}, the first is {missing[0]}; "
                f"{again}"
            )
        for name, shape in shapes.items():
            own = names.get(_plain(name, model))
            if own is not None and stored[own].shape != shape:
                raise ModelError(
                    f"{where}: {path}: {name} has the shape {list(stored[own].shape)}, config.json asks for "
                    f"{list(shape)}; {again}"
                )
    for head, source in tied.items():
        own, shared = names.get(_plain(head, model)), names.get(_plain(source, model))
        if own is not None and shared is not None and not _equal(stored, own, shared):
            return head, source
    return None


def _plain(name: str, model: Any) -> str:
    """The name without the prefix that files of a base model lack."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def architecture(path: Path, *, where: str) -> Any:
    """The model of a config.json, without memory for its weights. Raises ModelError if there is no such model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # each kind of broken config fails in its own way
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{where}: no causal language model can be made from {path / 'config.json'} ({reason}); "
            "give another model, or correct that file"
        ) from error


def _equal(stored: Mapping[str, StoredWeight], one: str, other: str) -> bool:
    """Whether two weights are the same numbers. Reads them."""
    import torch
    from safetensors import safe_open

    if (stored[one].dtype, stored[one].shape) != (stored[other].dtype, stored[other].shape):
        return False
    with safe_open(stored[one].file, framework="pt") as first, safe_open(stored[other].file, framework="pt") as second:
        return torch.equal(first.get_tensor(one), second.get_tensor(other))
