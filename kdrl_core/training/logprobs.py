"""Logprobs and entropy of response tokens under softmax(logits / T), the policy that is sampled."""

import torch
from transformers import PreTrainedModel

from kdrl_core.training.batch import PaddedBatch


def response_logits(model: PreTrainedModel, batch: PaddedBatch, *, temperature: float) -> torch.Tensor:
    """Forward `batch`: logits / T [B, T, V] float32 of its response tokens, with gradient; padding holds anything."""
    width = batch.response_ids.shape[1]
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=width + 1,
    ).logits[:, :-1]
    scaled: torch.Tensor = logits.float() / temperature
    return scaled


def response_logprobs(
    logits: torch.Tensor, batch: PaddedBatch, *, with_entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Read off the response tokens of `batch` from `response_logits` [B, T, V].

    Returns:
        logprobs [B, T] float32 with gradient, 0 on padding; entropy [B, T] in nats likewise, or None.
    """
    log_probabilities = logits.log_softmax(-1)
    is_response = batch.response_mask.bool()
    logprobs = log_probabilities.gather(-1, batch.response_ids[..., None]).squeeze(-1)
    logprobs = torch.where(is_response, logprobs, 0.0)
    if not with_entropy:
        return logprobs, None
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
    return logprobs, torch.where(is_response, entropy, 0.0)
