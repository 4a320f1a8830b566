"""Logprobs, entropy and Top-K KL of response tokens under softmax(logits / T), the policy that is sampled.

The model gives the hidden states that predict the response tokens, without padding; `token_statistics` does the rest.
This is right only if the logits are the output layer applied to the last hidden states of the base model.
`LogprobModel` tests the model for this, once. For any other model (scaled or soft-capped logits, as in Gemma 2; an
output layer that is wrapped or quantised) it takes the model's own logits [B, T, V].

The model always runs in eval mode, in training too: the policy that is trained is the one that was sampled, so no kind
of dropout is on. Its config keeps the dropout values.

Ragged token lists become padded tensors first: prompts left-padded, responses right-padded. B = responses, P = longest
prompt, T = longest response of the batch.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from kdrl_core.errors import ModelError
from kdrl_core.logprobs.chunked import BestTokens, LogprobHead, TokenStatistics, best_tokens
from kdrl_core.objectives import topk_kl
from kdrl_core.types import ScoreRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedBatch:
    """Tensors of one forward pass."""

    input_ids: Tensor
    """[B, P + T] int64."""
    attention_mask: Tensor
    """[B, P + T] int64."""
    position_ids: Tensor
    """[B, P + T] int64."""
    response_ids: Tensor
    """[B, T] int64, 0 where padded."""
    response_mask: Tensor
    """[B, T] float32, 1 on response tokens, EOS included."""


def pad_sequences(sequences: Sequence[ScoreRequest], *, device: torch.device | str = "cpu") -> PaddedBatch:
    """Pad prompts and responses into one batch."""
    prompt_width = max(len(s.prompt_token_ids) for s in sequences)
    response_width = max(len(s.token_ids) for s in sequences)
    ids = torch.zeros(len(sequences), prompt_width + response_width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        start, end = prompt_width - len(sequence.prompt_token_ids), prompt_width + len(sequence.token_ids)
        ids[row, start:end] = torch.tensor([*sequence.prompt_token_ids, *sequence.token_ids])
        mask[row, start:end] = 1
    return PaddedBatch(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(device),
        response_ids=ids[:, prompt_width:].to(device),
        response_mask=mask[:, prompt_width:].float().to(device),
    )


def token_budget_batches(lengths: Sequence[tuple[int, int]], *, max_tokens: int) -> list[list[int]]:
    """Split rows into batches of similar length with at most `max_tokens` padded tokens (at least one row each).

    `lengths` has prompt and response tokens per row; a batch has rows × (longest prompt + longest response) tokens.
    """
    order = sorted(range(len(lengths)), key=lambda row: (sum(lengths[row]), row))
    batches: list[list[int]] = []
    prompt_width = response_width = 0
    for row in order:
        prompt, response = lengths[row]
        widths = max(prompt_width, prompt), max(response_width, response)
        if not batches or (len(batches[-1]) + 1) * sum(widths) > max_tokens:
            batches.append([])
            widths = prompt, response
        batches[-1].append(row)
        prompt_width, response_width = widths
    return batches


class LogprobModel(torch.nn.Module):
    """A causal language model that returns statistics of response tokens instead of logits. `model` itself is put into
    eval mode and stays there.

    Args:
        recomputes: recompute the model's activations in the backward pass.

    Raises:
        ModelError: padding changes the model's logits, or it cannot recompute activations.
    """

    def __init__(self, model: PreTrainedModel, *, temperature: float, recomputes: bool = False) -> None:
        super().__init__()
        self.model = model.eval()
        refuse_padding_fault(model)
        self.temperature = temperature
        self.head: LogprobHead | None = None
        """None: the model's own logits are used."""
        if has_linear_logits(model):
            self.head = LogprobHead(model.get_output_embeddings(), temperature=temperature)
        if recomputes:
            _recompute_activations(model)

    def train(self, mode: bool = True) -> Self:
        """Only this module learns the mode: the model stays in eval mode."""
        self.training = mode
        return self

    def forward(
        self,
        batch: PaddedBatch,
        topk_ids: Tensor | None = None,
        topk_logits: Tensor | None = None,
        *,
        with_entropy: bool = False,
        floor: float = 0.0,
    ) -> TokenStatistics:
        """Statistics [B, T] of the response tokens of `batch`, float32 with gradient, 0 on padding.

        Args:
            topk_ids: [B, T, K] the teacher's K best tokens, for the Top-K KL; padding holds anything.
            topk_logits: [B, T, K] their logits (or logprobs) / T.
            floor: log-probability of the teacher's other tokens.

        Raises:
            ValueError: as `token_statistics`.
        """
        if self.head is None:
            logits = response_logits(self.model, batch, temperature=self.temperature)
            logprobs, entropy = response_logprobs(logits, batch, with_entropy=with_entropy)
            if topk_ids is None or topk_logits is None:
                return TokenStatistics(logprobs, entropy, None)
            kl = topk_kl(logits, topk_ids, topk_logits, floor=floor, response_mask=batch.response_mask)
            return TokenStatistics(logprobs, entropy, kl)
        places = batch.response_mask.flatten().nonzero().squeeze(1)
        found = self.head(
            _response_hidden(self.model, batch).index_select(0, places),
            batch.response_ids.flatten()[places],
            None if topk_ids is None else topk_ids.flatten(0, 1)[places],
            None if topk_logits is None else topk_logits.flatten(0, 1)[places],
            with_entropy=with_entropy,
            floor=floor,
        )
        return TokenStatistics(
            _unpack(found.logprobs, places, batch),
            None if found.entropy is None else _unpack(found.entropy, places, batch),
            None if found.topk_kl is None else _unpack(found.topk_kl, places, batch),
        )

    @torch.no_grad()
    def best_tokens(self, batch: PaddedBatch, k: int, *, num_tokens: int) -> BestTokens:
        """Logprobs [B, T] of the response tokens and the `k` likeliest [B, T, K] of the first `num_tokens` ids.

        Without gradient; padding holds anything. Raises ValueError if `k` is above the number of tokens.
        """
        if self.head is None:
            logits = response_logits(self.model, batch, temperature=self.temperature)
            best = logits.log_softmax(-1)[..., :num_tokens].topk(k, dim=-1)
            return BestTokens(response_logprobs(logits, batch)[0], best.indices, best.values)
        places = batch.response_mask.flatten().nonzero().squeeze(1)
        found = best_tokens(
            _response_hidden(self.model, batch).index_select(0, places),
            self.head.layer,
            batch.response_ids.flatten()[places],
            k,
            num_tokens=num_tokens,
        )
        return BestTokens(*(_unpack(values, places, batch) for values in found))


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
    """Raise ModelError if logits of a model in eval mode depend on padding before the prompt; tried on a few tokens.
    Engines and trainers batch prompts of several lengths."""
    ids = probe_ids(model)
    short, long = (ScoreRequest(prompt_token_ids=prompt, token_ids=ids[6:9]) for prompt in (ids[1:3], ids[2:6]))
    with torch.no_grad():
        padded, alone = (
            response_logits(model, pad_sequences(batch, device=model.device), temperature=1.0)[0]
            for batch in ([short, long], [short])
        )
    if not agree(padded, alone, dtype=model.dtype):
        raise ModelError(
            f"{type(model).__name__} gives other logits where a prompt is padded on the left, so kdrl can neither "
            "sample from it nor train it in batches; use a model of another architecture"
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


def _recompute_activations(model: PreTrainedModel) -> None:
    """Have the model recompute activations in the backward pass. Raises ModelError if it cannot.

    A layer recomputes if its `training` flag is on. The flag is off while the layer's own code runs: it would switch
    dropout on.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers or not model.supports_gradient_checkpointing:
        raise ModelError(
            f"{type(model).__name__} cannot recompute activations; set trainer.activation_checkpointing=false"
        )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in layers:
        layer.forward, layer.training = _in_eval_mode(layer), True


def _in_eval_mode(layer: torch.nn.Module) -> Callable[..., Any]:
    own = layer.forward

    @wraps(own)
    def run(*args: Any, **kwargs: Any) -> Any:
        layer.training = False
        try:
            return own(*args, **kwargs)
        finally:
            layer.training = True

    return run


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


def response_logits(model: PreTrainedModel, batch: PaddedBatch, *, temperature: float) -> Tensor:
    """Forward `batch`: logits / T [B, T, V] float32 of its response tokens, with gradient; padding holds anything."""
    width = batch.response_ids.shape[1]
    logits = forward(
        model,
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=width + 1,
    ).logits[:, -width - 1 : -1]
    scaled: Tensor = logits.float() / temperature
    return scaled


def response_logprobs(
    logits: Tensor, batch: PaddedBatch, *, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """From `response_logits` [B, T, V]: logprobs [B, T] float32 with gradient, 0 on padding; likewise the entropy in
    nats, or None.
    """
    log_probabilities = logits.log_softmax(-1)
    is_response = batch.response_mask.bool()
    logprobs = log_probabilities.gather(-1, batch.response_ids[..., None]).squeeze(-1)
    logprobs = torch.where(is_response, logprobs, 0.0)
    if not with_entropy:
        return logprobs, None
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
    return logprobs, torch.where(is_response, entropy, 0.0)


def _response_hidden(model: PreTrainedModel, batch: PaddedBatch) -> Tensor:
    """[B · T, H] last hidden states that predict the response tokens, with gradient."""
    hidden: Tensor = forward(
        model.base_model,
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state
    return hidden[:, -batch.response_ids.shape[1] - 1 : -1].flatten(0, 1)


def _unpack(values: Tensor, places: Tensor, batch: PaddedBatch) -> Tensor:
    """Values [N, ...] of the response tokens as [B, T, ...], 0 on padding."""
    shape = batch.response_ids.shape
    result = values.new_zeros(shape.numel(), *values.shape[1:]).index_copy(0, places, values)
    return result.unflatten(0, shape)
