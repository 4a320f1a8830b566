"""From per-token values to one number. The denominators are those of the whole optimiser step, passed in.

    token_mean  Σ_i Σ_t x_{i,t} / Σ_i |o_i|, over all responses of the step (the default; verl's token-mean)
    group_mean  mean over groups of the same ratio within the group: Eq. 2 to the letter, whose Σ runs over one question

With the global counts given, the results of micro-batches (or of ranks, summed) add up to the whole batch's. Sums are
taken in float32 at least, and returned so.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor

from kdrl_core.objectives.checks import as_float, as_is_response, check_counts, check_num_dims, check_shape
from kdrl_core.objectives.inputs import Totals, check_group_size, check_positive
from kdrl_core.objectives.kinds import AGGREGATIONS


def token_mean(values: Tensor, response_mask: Tensor, *, total_tokens: float | Tensor | None = None) -> Tensor:
    """Sum over response tokens divided by their count, a scalar.

    Args:
        values: [B, T]; the gradient flows through. Where `response_mask` is 0 they may be anything.
        response_mask: [B, T], 1 on response tokens.
        total_tokens: the optimiser step's response tokens, for micro-batches; None counts this mask.

    Raises:
        ValueError: shapes differ, a mask entry is neither 0 nor 1, `total_tokens` is no positive number, or neither it
            nor a single response token is given.
    """
    check_num_dims("values", values, "[B, T]")
    is_response = as_is_response(response_mask, values.shape)
    if total_tokens is None:
        total_tokens = count_tokens(is_response)
    check_positive("total_tokens", total_tokens)
    return unchecked_token_mean(values, is_response, total_tokens)


def group_mean(
    values: Tensor,
    response_mask: Tensor,
    group_size: int | None = None,
    *,
    num_groups: float | None = None,
    group_tokens: Tensor | None = None,
) -> Tensor:
    """Mean over groups of (sum over the group's response tokens / their count); a group without tokens is 0. A scalar.

    Args:
        values: [B, T]; the gradient flows through. Where `response_mask` is 0 they may be anything.
        response_mask: [B, T], 1 on response tokens.
        group_size: G ≥ 2; groups contiguous. Not needed with `group_tokens`.
        num_groups: the optimiser step's groups, for micro-batches; None: B / G.
        group_tokens: [B] for each response the response tokens of its whole group, for micro-batches that split or
            reorder groups; needs `num_groups`.

    Raises:
        ValueError: shapes do not match, a mask entry is neither 0 nor 1, `group_size` does not divide B or is below 2,
            `num_groups` is no positive number, an entry of `group_tokens` is negative or not finite, or neither way of
            telling the groups is given.
    """
    check_num_dims("values", values, "[B, T]")
    is_response = as_is_response(response_mask, values.shape)
    num_groups, group_tokens = count_groups(is_response, group_size, num_groups, group_tokens)
    return unchecked_group_mean(values, is_response, num_groups, group_tokens)


def unchecked_token_mean(values: Tensor, is_response: Tensor, total_tokens: float | Tensor) -> Tensor:
    """`token_mean` of what was checked before."""
    return torch.where(is_response, as_float(values), 0.0).sum() / total_tokens


def unchecked_group_mean(values: Tensor, is_response: Tensor, num_groups: float, group_tokens: Tensor) -> Tensor:
    """`group_mean` of what was checked before."""
    return (torch.where(is_response, as_float(values), 0.0).sum(1) / group_tokens.clamp(min=1)).sum() / num_groups


def count_tokens(is_response: Tensor) -> int:
    """Response tokens of the whole batch. Raises ValueError if there is none."""
    total = int(is_response.sum())
    if total == 0:
        raise ValueError("response_mask: expected at least one response token, given none")
    return total


def count_groups(
    is_response: Tensor, group_size: int | None, num_groups: float | None, group_tokens: Tensor | None
) -> tuple[float, Tensor]:
    """`num_groups` and `group_tokens` of `group_mean`, checked, or counted where they are None. Raises as it does."""
    if group_tokens is None:
        if group_size is None:
            raise ValueError("group_size: expected an integer of at least 2, or group_tokens, given None")
        check_group_size(group_size, len(is_response))
        group_tokens = is_response.sum(1).reshape(-1, group_size).sum(1).repeat_interleave(group_size)
        num_groups = len(is_response) / group_size if num_groups is None else num_groups
    else:
        check_shape("group_tokens", group_tokens, is_response.shape[:1], "[B]")
        check_counts("group_tokens", group_tokens)
    if num_groups is None:
        raise ValueError("num_groups: expected the number of groups of the step beside group_tokens, given None")
    check_positive("num_groups", num_groups)
    return num_groups, group_tokens


def _over_tokens(is_response: Tensor, group_size: int | None, totals: Totals) -> Callable[[Tensor], Tensor]:
    tokens = count_tokens(is_response) if totals.tokens is None else totals.tokens
    return partial(unchecked_token_mean, is_response=is_response, total_tokens=tokens)


def _over_groups(is_response: Tensor, group_size: int | None, totals: Totals) -> Callable[[Tensor], Tensor]:
    group_tokens = cast("Tensor | None", totals.group_tokens)  # of a micro-batch; the whole step has a plain list
    groups, tokens = count_groups(is_response, group_size, totals.num_groups, group_tokens)
    return partial(unchecked_group_mean, is_response=is_response, num_groups=groups, group_tokens=tokens)


MEANS = {"token_mean": _over_tokens, "group_mean": _over_groups}
"""From the response mask, G and the global counts to the mean of values [B, T]. Raise ValueError as `group_mean`."""
assert MEANS.keys() == AGGREGATIONS.keys()
