"""Logprobs, entropy and Top-K KL of response tokens under softmax(logits / T), the policy that is sampled.

The model gives the hidden states that predict the response tokens, without padding; `token_statistics` does the rest.
This is right only if the logits are the output layer applied to the last hidden states of the base model.
`LogprobModel` tests the model for this, once. For any other model (scaled or soft-capped logits, as in Gemma 2; an
output layer that is wrapped or quantised) it takes the model's own logits [B, T, V].

The model always runs in eval mode, in training too: the policy that is trained is the one that was sampled, so no kind
of dropout is on. Its config keeps the dropout values.

Ragged token lists become padded tensors first. B = responses, T = longest response, W = width of a padded row.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, Self

import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from kdrl_core.errors import ModelError
from kdrl_core.logprobs.chunked import BestTokens, LogprobHead, TokenStatistics, best_tokens, use_float32_logits
from kdrl_core.objectives import topk_kl
from kdrl_core.types import ScoreRequest

MASKED_UP_TO = 1024
"""Widest batch, in tokens of a row, that is padded on both sides and masked on a CPU. Earlier versions padded all so;
short rows gain nothing without a mask, and their runs come out the same to the bit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedBatch:
    """Tensors of one forward pass."""

    input_ids: Tensor
    """[B, W] int64."""
    attention_mask: Tensor | None
    """[B, W] int64; None: all padding comes after a row's tokens, which never attend to it."""
    position_ids: Tensor
    """[B, W] int64."""
    sources: Tensor
    """[B, T] int64: where in its row the hidden state is that predicts a response token; any place where padded."""
    response_ids: Tensor
    """[B, T] int64, 0 where padded."""
    response_mask: Tensor
    """[B, T] float32, 1 on response tokens, EOS included."""


def pad_sequences(
    sequences: Sequence[ScoreRequest], *, device: torch.device | str = "cpu", is_masked: bool | None = None
) -> PaddedBatch:
    """Pad prompts and responses into one batch.

    Without a mask, every row begins at the left and ends in padding. A causal model gives its tokens the same logits,
    and attention keeps what a mask turns off: torch's flash kernel, and key-value heads that are not repeated.

    Args:
        is_masked: pad prompts on the left and responses on the right, with a mask. None: on a CPU, for rows up to
            `MASKED_UP_TO`.
    """
    prompts = torch.tensor([len(s.prompt_token_ids) for s in sequences])
    responses = torch.tensor([len(s.token_ids) for s in sequences])
    num_targets = int(responses.max())
    width = int(prompts.max()) + num_targets
    if is_masked is None:
        is_masked = torch.device(device).type == "cpu" and width <= MASKED_UP_TO
    starts = prompts.max() - prompts
    if not is_masked:
        starts, width = torch.zeros_like(prompts), int((prompts + responses).max())
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (start, sequence) in enumerate(zip(starts.tolist(), sequences, strict=True)):
        tokens = torch.tensor([*sequence.prompt_token_ids, *sequence.token_ids])
        ids[row, start : start + len(tokens)] = tokens
        mask[row, start : start + len(tokens)] = 1
    targets = ((starts + prompts)[:, None] + torch.arange(num_targets)).clamp(max=width - 1)
    response_mask = torch.arange(num_targets) < responses[:, None]
    positions = (mask.cumsum(1) - 1).clamp(min=0) if is_masked else torch.arange(width).expand_as(ids)
    return PaddedBatch(
        input_ids=ids.to(device),
        attention_mask=mask.to(device) if is_masked else None,
        position_ids=positions.to(device),
        sources=(targets - 1).to(device),
        response_ids=torch.where(response_mask, ids.gather(1, targets), 0).to(device),
        response_mask=response_mask.float().to(device),
    )


def pad_values(values: Sequence[NDArray[Any]] | None, rows: Sequence[int], padded: PaddedBatch) -> Tensor | None:
    """Ragged per-token values [T_i] or [T_i, K] of `rows` as [b, T] or [b, T, K], 0 on padding; None stays None."""
    if values is None:
        return None
    parts = [torch.from_numpy(values[row]) for row in rows]
    kind = torch.float32 if parts[0].is_floating_point() else torch.int64
    result = torch.zeros(*padded.response_mask.shape, *parts[0].shape[1:], dtype=kind)
    for index, part in enumerate(parts):
        result[index, : len(part)] = part
    return result.to(padded.response_mask.device)


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


def batches_of(sequences: Sequence[ScoreRequest], *, max_tokens: int) -> list[list[int]]:
    """`token_budget_batches` of sequences: the rows of each batch."""
    lengths = [(len(each.prompt_token_ids), len(each.token_ids)) for each in sequences]
    return token_budget_batches(lengths, max_tokens=max_tokens)


def padded_batches(
    sequences: Sequence[ScoreRequest], *, max_tokens: int, device: torch.device
) -> Iterator[tuple[list[int], PaddedBatch]]:
    """`batches_of` sequences, each with its tensors."""
    for rows in batches_of(sequences, max_tokens=max_tokens):
        yield rows, pad_sequences([sequences[row] for row in rows], device=device)


class LogprobModel(torch.nn.Module):
    """A causal language model that returns statistics of response tokens instead of logits. `model` itself is put into
    eval mode and stays there.

    Args:
        recomputes: recompute the model's activations in the backward pass.

    Raises:
        ModelError: padding changes the model's logits, or it cannot recompute activations.
    """

    def __init__(self, model: PreTrainedModel, *, temperature: float, recomputes: bool = False) -> None:
        from kdrl_core.logprobs.trial import has_linear_logits, refuse_padding_fault  # which runs passes of this file

        super().__init__()
        self.model = model.eval()
        refuse_padding_fault(model)
        self.temperature = temperature
        self.head: LogprobHead | None = None
        """None: the model's own logits are used."""
        if has_linear_logits(model):
            self.head = LogprobHead(model.get_output_embeddings(), temperature=temperature)
        else:
            use_float32_logits(model)
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
            _response_hidden(self.model, batch, places),
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
            _response_hidden(self.model, batch, places),
            self.head.layer,
            batch.response_ids.flatten()[places],
            k,
            num_tokens=num_tokens,
        )
        return BestTokens(*(_unpack(values, places, batch) for values in found))


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
    first = int(batch.sources.min())
    num_kept = batch.input_ids.shape[1] - first
    logits = forward(
        model,
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=num_kept,
    ).logits[:, -num_kept:]
    rows = torch.arange(len(logits), device=logits.device)[:, None]
    scaled: Tensor = logits[rows, batch.sources - first].float() / temperature
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


def _response_hidden(model: PreTrainedModel, batch: PaddedBatch, places: Tensor) -> Tensor:
    """[N, H] last hidden states, with gradient, that predict the response tokens at `places` [N] of [B · T]."""
    hidden: Tensor = forward(
        model.base_model,
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state
    num_rows, width = batch.input_ids.shape
    sources = batch.sources + width * torch.arange(num_rows, device=hidden.device)[:, None]
    return hidden.flatten(0, 1).index_select(0, sources.flatten()[places])


def _unpack(values: Tensor, places: Tensor, batch: PaddedBatch) -> Tensor:
    """Values [N, ...] of the response tokens as [B, T, ...], 0 on padding."""
    shape = batch.response_ids.shape
    result = values.new_zeros(shape.numel(), *values.shape[1:]).index_copy(0, places, values)
    return result.unflatten(0, shape)
