"""How kdrl calls transformers models of any architecture, and what it asks of them: padding must not change logits."""

import inspect
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from kdrl_core.errors import ModelError

_MAX_GAP = {torch.float32: 0.01, torch.float64: 0.01}
"""Largest mean gap between logits that should be the same, relative to their spread."""
_MAX_COARSE_GAP = 0.3
"""The same for 16-bit dtypes."""


def forward(model: torch.nn.Module, **arguments: Any) -> Any:
    """A forward pass with those of the arguments that the model knows. Models without `position_ids` find positions by
    the attention mask; those without `logits_to_keep` give the logits of all positions."""
    known = _parameters(type(model).forward)
    return model(**arguments if known is None else {name: arguments[name] for name in arguments.keys() & known})


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str] | None:
    """Names of the arguments of a function; None if it takes any."""
    parameters = inspect.signature(function).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return None if takes_any else frozenset(parameters)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Have the model recompute activations in the backward pass. Raises ModelError if it cannot.

    Layers decide by their `training` flag whether to recompute. The flag is off while their own code runs, so that it
    switches on no dropout.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers or not model.supports_gradient_checkpointing:
        raise ModelError(
            f"{type(model).__name__} cannot recompute activations; set trainer.activation_checkpointing=false"
        )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in layers:
        layer.forward = _in_eval_mode(layer)


def set_checkpointing(model: PreTrainedModel, mode: bool) -> None:
    """Put the model into eval mode; with `mode` the layers of `checkpoint_activations` recompute nevertheless."""
    model.eval()
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            layer.training = mode


def _in_eval_mode(layer: torch.nn.Module) -> Callable[..., Any]:
    """The layer's forward function, with `layer.training` off while it runs."""
    own = layer.forward

    @wraps(own)
    def run(*args: Any, **kwargs: Any) -> Any:
        mode, layer.training = layer.training, False
        try:
            return own(*args, **kwargs)
        finally:
            layer.training = mode

    return run


def refuse_padding_fault(model: PreTrainedModel) -> None:
    """Raise ModelError for a model whose logits depend on padding before the prompt, tried on a few tokens. Trainers
    and engines batch prompts of several lengths. Draws nothing from torch's random stream."""
    (short, long), _ = probe_batch(model)
    width = len(long)
    ids = torch.zeros(2, width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate((short, long)):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.tensor(prompt), 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    alone = torch.tensor([short])
    places = torch.arange(len(short))[None]
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            padded, plain = (
                forward(
                    model,
                    input_ids=each.to(model.device),
                    attention_mask=known.to(model.device),
                    position_ids=where.to(model.device),
                    use_cache=False,
                ).logits
                for each, known, where in ((ids, mask, positions), (alone, torch.ones_like(alone), places))
            )
    finally:
        for module, mode in was_training.items():
            module.training = mode
    if not agree(padded[0, -len(short) :], plain[0]):
        raise ModelError(
            f"{type(model).__name__} gives other logits where a prompt is padded on the left, so kdrl can neither "
            "sample from it nor train it in batches; use a model of another architecture"
        )


def probe_batch(model: PreTrainedModel) -> tuple[tuple[list[int], list[int]], Tensor]:
    """Two short prompts of different lengths, and five tokens [5] to follow them, of the first ids of the model."""
    size = int(model.get_input_embeddings().num_embeddings)
    ids = [number % size for number in range(11)]
    return (ids[1:3], ids[2:6]), torch.tensor(ids[6:], device=model.device)


def agree(found: Tensor, expected: Tensor) -> bool:
    """Whether logits are the same up to rounding. NaN is equal to NaN here: broken weights are reported elsewhere."""
    if found.shape != expected.shape:
        return False
    limit = _MAX_GAP.get(expected.dtype, _MAX_COARSE_GAP)
    found, expected = found.double(), expected.double()
    if not torch.equal(found.isfinite(), expected.isfinite()):
        return False
    is_fine = expected.isfinite()
    found, expected = found[is_fine], expected[is_fine]
    if len(expected) < 2:
        return True
    return bool((found - expected).abs().mean() <= limit * expected.std() + 1e-6)
