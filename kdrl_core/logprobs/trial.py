"""What a model must be able to do, tried on a few tokens when it is loaded."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdrl_core.errors import ModelError
from kdrl_core.logprobs.model import pad_sequences, response_logits
from kdrl_core.types import ScoreRequest


def has_linear_logits(model: PreTrainedModel) -> bool:
    """Whether logits = output layer(last hidden states of the base model) of a model in eval mode, tested by two tiny
    forward passes.

    The output layer gets large random numbers in place of its input. The model's logits must be their linear map: with
    large logits, a soft cap or a scale shows. And the input that was replaced must be what the base model returns.
    Draws nothing from torch's random stream.
    """
    layer, base = model.get_output_embeddings(), model.base_model
    if type(layer) is not torch.nn.Linear or base is model:
        return False
    ids = torch.arange(4, device=model.device)[None] % layer.out_features
    generator = torch.Generator().manual_seed(0)
    loud = torch.randn(1, 4, layer.in_features, generator=generator).to(layer.weight)
    seen: list[Tensor] = []

    def replace_input(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        seen.append(inputs[0])
        return (loud,)

    hook = layer.register_forward_pre_hook(replace_input)
    try:
        with torch.no_grad():
            spread = (loud @ layer.weight.t()).float().std()
            if torch.isfinite(spread) and spread > 0:
                loud *= 100.0 / spread
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=4).logits
            hidden = base(input_ids=ids, use_cache=False).last_hidden_state
            hook.remove()
            expected = layer(loud)
    except TypeError:  # the model knows no logits_to_keep
        return False
    finally:
        hook.remove()
    # NaN is equal to NaN here: this test does not refuse a model with broken weights.
    return (
        len(seen) == 1
        and seen[0].shape == hidden.shape
        and torch.allclose(seen[0], hidden, rtol=1e-3, atol=1e-5, equal_nan=True)
        and logits.shape == expected.shape
        and torch.allclose(logits, expected, rtol=1e-3, atol=1e-2, equal_nan=True)
    )


def refuse_padding_fault(model: PreTrainedModel) -> None:
    """Raise ModelError if logits of a model in eval mode depend on padding, on the left with a mask or on the right
    without; tried on a few tokens. Engines and trainers batch prompts of several lengths."""
    ids = probe_ids(model)
    short, long = (ScoreRequest(prompt_token_ids=prompt, token_ids=ids[6:9]) for prompt in (ids[1:3], ids[2:6]))

    @torch.no_grad()
    def logits_of_short(*batch: ScoreRequest, is_masked: bool) -> Tensor:
        padded = pad_sequences(batch, device=model.device, is_masked=is_masked)
        return response_logits(model, padded, temperature=1.0)[0]

    alone = logits_of_short(short, is_masked=True)
    for side, is_masked in (("left", True), ("right", False)):
        if not agree(logits_of_short(short, long, is_masked=is_masked), alone, dtype=model.dtype):
            raise ModelError(
                f"{type(model).__name__} gives other logits where a prompt is padded on the {side}, so kdrl can "
                "neither sample from it nor train it in batches; use a model of another architecture"
            )


def probe_ids(model: PreTrainedModel) -> list[int]:
    """Eleven token ids to try a model with."""
    return [number % int(model.get_input_embeddings().num_embeddings) for number in range(11)]


def agree(found: Tensor, expected: Tensor, *, dtype: torch.dtype) -> bool:
    """Whether logits are the same up to the rounding of the model's dtype: their mean gap is small beside their spread.
    NaN is equal to NaN here: broken weights are reported elsewhere."""
    limit = 0.01 if dtype in (torch.float32, torch.float64) else 0.3
    found, expected = found.double(), expected.double()
    is_fine = expected.isfinite()
    if not torch.equal(found.isfinite(), is_fine):
        return False
    gap, spread = (found - expected)[is_fine].abs().mean(), expected[is_fine].std()
    return not bool(gap > limit * spread + 1e-6)
