"""From ragged token lists to padded tensors: prompts left-padded, responses right-padded.

B = responses, P = longest prompt, T = longest response of the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kdrl_core.types import ScoreRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedBatch:
    """Tensors of one forward pass."""

    input_ids: torch.Tensor
    """[B, P + T] int64."""
    attention_mask: torch.Tensor
    """[B, P + T] int64."""
    position_ids: torch.Tensor
    """[B, P + T] int64."""
    response_ids: torch.Tensor
    """[B, T] int64, 0 where padded."""
    response_mask: torch.Tensor
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

    Args:
        lengths: prompt and response tokens per row.
        max_tokens: bound on rows × (longest prompt + longest response) of a batch.
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


def deal_batches(batches: Sequence[Sequence[int]], *, ranks: int) -> tuple[list[list[list[int]]], list[int]]:
    """Deal micro-batches to ranks, to each the same number of passes, which sharded training needs.

    Neighbours in `batches`, which are alike in length, run at the same time. Where the number of batches is no multiple
    of the ranks, the longest ones are halved; where rows run out, ranks repeat a row as an idle pass.

    Returns:
        the passes of every rank; how many of its last ones are idle.
    """
    parts = [list(rows) for rows in batches]
    while len(parts) % ranks:
        longest = max(range(len(parts)), key=lambda index: (len(parts[index]), index))
        if len(parts[longest]) == 1:
            break
        rows = parts[longest]
        parts[longest : longest + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    missing = -len(parts) % ranks
    dealt = [parts[rank::ranks] for rank in range(ranks)]
    idle = [int(rank >= ranks - missing) for rank in range(ranks)]
    for rank in range(ranks):
        dealt[rank] += [parts[0]] * idle[rank]
    return dealt, idle
