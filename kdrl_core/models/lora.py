"""LoRA (Hu et al., 2021): a target layer computes W x + (alpha / rank) · B (A x). W is frozen, A and B are trained.

A [rank, in] is drawn from a seed of its own, and B [out, rank] is 0. So training begins with exactly the base's logits.
A and B are float32 and can move by less than a bfloat16 base could. peft wraps the layers of the model in place: the
model stays one of transformers, with its own `base_model` and output layer.

Engines and exports get merged weights, W + (alpha / rank) · B A, added in float32 and rounded once.

    <checkpoint>/adapter/{adapter_model.safetensors, adapter_config.json}      as peft loads them
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kdrl_core.config import LoraConfig, did_you_mean
from kdrl_core.config.models import ALL_LINEAR
from kdrl_core.errors import ModelError
from kdrl_core.ledger import derive_seed
from kdrl_core.models.loading import export_weights

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ADAPTER_DIR = "adapter"
"""Folder of a checkpoint, and of an exported student, with the adapter."""
NOT_INSTALLED = "peft is not installed; install the extra with pip install 'kdrl[lora]', or set student.lora=null"
FrozenAdapter = Literal["initial", "none"]
"""The adapter that a stage began with, or none: the base."""
_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_NAME = "default"
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """Which adapter a trainer begins with."""

    config: LoraConfig
    base: Path
    """Directory of the model that is wrapped. The adapter's own config names it."""
    initial: Path | None = None
    """Folder of the checkpoint whose adapter is trained further; None: a new one, which changes nothing yet."""

    def wrap(self, model: "PreTrainedModel", *, seed: int) -> "Adapter":
        """`Adapter` of `model`."""
        return Adapter(model, self, seed=seed)

    def told(self) -> dict[str, Any]:
        """As JSON, for another process."""
        initial = None if self.initial is None else str(self.initial.resolve())
        return {"config": self.config.model_dump(mode="json"), "base": str(self.base.resolve()), "initial": initial}

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> "AdapterSpec":
        """From `told`."""
        initial = None if told["initial"] is None else Path(told["initial"])
        return cls(config=LoraConfig.model_validate(told["config"]), base=Path(told["base"]), initial=initial)


class Adapter:
    """The adapter of `model`, which it wraps in place; all other weights are frozen.

    Args:
        seed: of the run.

    Raises:
        ModelError: no layer has the name of a target, peft is not installed, or the initial adapter does not fit.
    """

    def __init__(self, model: "PreTrainedModel", spec: AdapterSpec, *, seed: int) -> None:
        self._model, self._spec = model, spec
        self._targets = targets_of(model, spec.config, where="field 'student")
        _wrap(model, self._config(), seed=derive_seed(seed, "lora") % 2**63)
        self.weights = {name: each for name, each in model.named_parameters() if each.requires_grad}
        """A and B of each layer, by their names in the model."""
        for weight in self.weights.values():
            weight.data = weight.data.float()
        self._initial = self._copies()
        if spec.initial is not None:
            self.load(spec.initial)
            self._initial = self._copies()

    def save(self, folder: Path, weights: "Mapping[str, torch.Tensor] | None" = None) -> None:
        """Write the adapter, or these weights of it, below `folder`."""
        from safetensors.torch import save_file

        (folder / ADAPTER_DIR).mkdir()
        own = self.weights if weights is None else weights
        stored = {_stored(name): weight.detach().cpu().contiguous() for name, weight in own.items()}
        save_file(stored, folder / ADAPTER_DIR / _WEIGHTS, metadata={"format": "pt"})
        values = {name: sorted(v) if isinstance(v, set) else v for name, v in self._config().to_dict().items()}
        (folder / ADAPTER_DIR / _CONFIG).write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")

    def load(self, folder: Path) -> None:
        """Take the adapter below `folder`. Raises ModelError as `read`."""
        self.take(self.read(folder))

    def read(self, folder: Path) -> "dict[str, torch.Tensor]":
        """The adapter below `folder`, by names of the model. Raises ModelError if it cannot be read or does not fit."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = folder / ADAPTER_DIR / _WEIGHTS
        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be read ({error}); write or copy the checkpoint again") from error
        wanted = {_stored(name): tuple(weight.shape) for name, weight in self._initial.items()}
        if {name: tuple(weight.shape) for name, weight in found.items()} != wanted:
            raise ModelError(f"{path} does not fit student.lora: it has other layers, or another rank")
        return {name: found[_stored(name)] for name in self.weights}

    def take(self, weights: "Mapping[str, torch.Tensor]") -> None:
        """Set the adapter."""
        import torch

        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(weights[name])

    def export(self, folder: Path, dtype: str) -> None:
        """Write the model with merged weights of this dtype."""
        import torch

        export_weights(self._model, merged_weights(self._model, getattr(torch, dtype)), folder)

    @contextmanager
    def replaced(self, by: FrozenAdapter) -> Iterator[None]:
        """Inside, the model is the stage's initial policy, or the base: its adapter is 0."""
        import torch

        now = {name: weight.data for name, weight in self.weights.items()}
        try:
            for name, weight in self.weights.items():
                initial = self._initial[name].to(weight)  # ranks may compute elsewhere, and in bfloat16
                weight.data = initial if by == "initial" else torch.zeros_like(initial)
            yield
        finally:
            for name, weight in self.weights.items():
                weight.data = now[name]

    def _copies(self) -> "dict[str, torch.Tensor]":
        return {name: weight.detach().clone() for name, weight in self.weights.items()}

    def _config(self) -> Any:
        """peft's configuration of this adapter. Raises ModelError without peft."""
        try:
            from peft import LoraConfig as PeftConfig
        except ImportError as error:
            raise ModelError(NOT_INSTALLED) from error
        config = self._spec.config
        return PeftConfig(
            base_model_name_or_path=str(self._spec.base.resolve()),
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=self._targets,
            task_type="CAUSAL_LM",
        )


def _wrap(model: "PreTrainedModel", config: Any, *, seed: int) -> None:
    """Put the adapter into the model. torch's random stream is afterwards where it was."""
    import torch
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, _NAME)
    model.eval()


def _stored(name: str) -> str:
    """The name of an adapter's weight in its file."""
    return _PREFIX + name.replace(f".{_NAME}.", ".")


def merged_weights(model: "PreTrainedModel", dtype: "torch.dtype") -> "dict[str, torch.Tensor]":
    """The weights of a wrapped model by the names of its base, merged with its adapter in float32, then cast."""
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "base_layer")}
    merged: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        owner, is_wrapped, leaf = name.rpartition(".base_layer.")
        if is_wrapped:
            name = f"{owner}.{leaf}"
            if leaf == "weight":
                value = value.float() + layers[owner].get_delta_weight(_NAME).detach()
        elif any(f".lora_{part}." in name for part in "AB"):
            continue
        merged[name] = value.to(dtype) if value.is_floating_point() else value
    return merged


# --- which layers -----------------------------------------------------------------------------------------------------


def targets_of(model: "PreTrainedModel", config: LoraConfig, *, where: str) -> list[str]:
    """The names of the layers that are wrapped, as peft takes them: `q_proj` stands for every layer of this name.

    Raises ModelError if a target is no linear layer of the model, or is its output layer.
    """
    layers = linear_layers(model)
    names = sorted({name.rpartition(".")[2] for name in layers})
    if config.targets == [ALL_LINEAR] and names:
        return names
    for target in config.targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            raise ModelError(
                f"{where}.lora.targets': {type(model).__name__} has no linear layer {target!r} "
                f"below its output layer{did_you_mean(target, names)}; "
                + (f"give some of {', '.join(names)}, or [{ALL_LINEAR}]" if names else "it has none, so set lora=null")
            )
    return list(config.targets)


def linear_layers(model: "PreTrainedModel") -> dict[str, Any]:
    """Name → linear layer, except the output layer."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    kinds = (torch.nn.Linear, Conv1D)
    return {name: each for name, each in model.named_modules() if isinstance(each, kinds) and each is not head}


def adapter_size(shapes: Mapping[str, Sequence[int]], config: LoraConfig) -> int:
    """Numbers in A and B of an adapter to a model whose weights have these shapes. `all-linear` counts all matrices of
    numbered layers."""
    total = 0
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        is_numbered = any(part.isdigit() for part in layer.split("."))
        is_target = is_numbered if config.targets == [ALL_LINEAR] else layer.endswith(tuple(config.targets))
        if len(shape) == 2 and is_target:
            total += config.rank * sum(shape)
    return total
