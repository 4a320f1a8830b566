"""Checks of tensors, made before any arithmetic: a `ValueError` names the argument, what was expected, what was given.

A value that is not a tensor raises a `TypeError`. The checks of plain values are in inputs.py.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kdrl_core.objectives.inputs import (
    Objective,
    Responses,
    Totals,
    check_choice,
    check_group_size,
    check_not_negative,
    check_positive,
)
from kdrl_core.objectives.kinds import AGGREGATIONS, MASKINGS, OBJECTIVES

_PER_TOKEN = ("teacher_logprobs", "old_logprobs", "rollout_logprobs", "ref_logprobs", "entropy", "topk")


def check_shape(argument: str, values: Tensor, shape: Sequence[int], legend: str) -> None:
    """`values` has exactly this shape; nothing is broadcast."""
    _check_tensor(argument, values, legend)
    if tuple(values.shape) != tuple(shape):
        raise ValueError(f"{argument}: expected shape {legend} = {tuple(shape)}, given {tuple(values.shape)}")


def check_num_dims(argument: str, values: Tensor, legend: str) -> None:
    """`values` has as many dimensions as `legend`, e.g. "[B, T]", names."""
    _check_tensor(argument, values, legend)
    if values.ndim != legend.count(",") + 1:
        raise ValueError(f"{argument}: expected shape {legend}, given {tuple(values.shape)}")


def check_finite(argument: str, values: Tensor, where: Tensor | None = None) -> None:
    """No NaN or infinity in `values` ([B] or [B, T]), except on padding: `where` is True on response tokens."""
    is_bad = ~torch.isfinite(values)
    if where is not None:
        is_bad &= where
    if is_bad.any():
        position = is_bad.nonzero()[0].tolist()
        place = ", ".join(f"{name} {i}" for name, i in zip(("row", "token", "entry"), position, strict=False))
        on = "" if where is None else " on every response token"
        raise ValueError(f"{argument}: expected finite values{on}, given {values[tuple(position)].item()} at {place}")


def check_finite_together(arguments: Iterable[tuple[str, Tensor | None, Tensor]]) -> None:
    """`check_finite` of each (argument, values, where) whose values are not None, with one wait for the GPU."""
    given = [(argument, values, where) for argument, values, where in arguments if values is not None]
    if given and torch.stack([(~torch.isfinite(values) & where).any() for _, values, where in given]).any():
        for argument, values, where in given:
            check_finite(argument, values, where)


def check_counts(argument: str, values: Tensor) -> None:
    """Every entry of `values` [B] is a finite number of at least 0."""
    is_bad = ~(torch.isfinite(values) & (values >= 0))
    if is_bad.any():
        row = int(is_bad.nonzero()[0])
        raise ValueError(f"{argument}: expected finite numbers of at least 0, given {values[row].item()} at row {row}")


def as_is_response(response_mask: Tensor, shape: Sequence[int]) -> Tensor:
    """`response_mask` as bool [B, T], after checking shape and content (0 or 1)."""
    check_shape("response_mask", response_mask, shape, "[B, T]")
    if response_mask.dtype is torch.bool:
        return response_mask
    is_bad = (response_mask != 0) & (response_mask != 1)
    if is_bad.any():
        row, token = is_bad.nonzero()[0].tolist()
        raise ValueError(
            f"response_mask: expected 0 or 1, given {response_mask[row, token].item()} at row {row}, token {token}"
        )
    return response_mask != 0


def as_float(values: Tensor) -> Tensor:
    """`values` in the precision to compute in: float32 for half precision, integers and bool; otherwise its own."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _check_tensor(argument: str, values: object, legend: str) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{argument}: expected a tensor {legend}, given {values!r:.50}")


def refuse_bad_input(responses: Responses, objective: Objective, totals: Totals) -> Tensor:
    """The response mask of a joint loss as bool [B, T]. Raises as `joint_loss`, which checks the estimators itself."""
    _check_plain_values(objective, totals)
    _check_nothing_missing(responses, objective)
    check_num_dims("logprobs", responses.logprobs, "[B, T]")
    is_response = as_is_response(responses.response_mask, responses.logprobs.shape)
    _check_groups(responses, objective, totals)
    _check_rows(responses)
    _check_tokens(responses, objective, is_response)
    return is_response


def _check_plain_values(objective: Objective, totals: Totals) -> None:
    check_choice("kind", objective.kind, OBJECTIVES)
    check_choice("kd_masking", objective.kd_masking, MASKINGS)
    check_choice("aggregation", objective.aggregation, AGGREGATIONS)
    for name in ("beta", "ref_beta", "entropy_coef"):
        check_not_negative(name, getattr(objective, name))
    for name in ("clip_low", "clip_high"):
        if (bound := getattr(objective, name)) is not None:
            check_not_negative(name, bound)
    counts = {"tis_cap": objective.tis_cap, "total_tokens": totals.tokens, "num_groups": totals.num_groups}
    for name, count in counts.items():
        if count is not None:
            check_positive(name, count)
    if totals.kd_tokens is not None:
        check_not_negative("kd_tokens", totals.kd_tokens)


def _check_nothing_missing(responses: Responses, objective: Objective) -> None:
    beta, masks = objective.kd_beta, responses.kd_weights is None and objective.kd_masking != "none"
    masking = f"kd_masking={objective.kd_masking!r} without kd_weights"
    for name, value, is_needed, reader in (
        ("teacher_logprobs", responses.teacher_logprobs, beta > 0.0 and not objective.needs_topk, f"beta={beta}"),
        ("topk", responses.topk, beta > 0.0 and objective.needs_topk, f"kl_estimator={objective.kl_estimator!r}"),
        ("ref_logprobs", responses.ref_logprobs, objective.ref_beta > 0.0, f"ref_beta={objective.ref_beta}"),
        ("entropy", responses.entropy, objective.entropy_coef > 0.0, f"entropy_coef={objective.entropy_coef}"),
        ("rewards", responses.rewards, masks, masking),
        ("group_size", objective.group_size, masks and MASKINGS[objective.kd_masking].needs_groups, masking),
        ("tis_cap", objective.tis_cap, responses.rollout_logprobs is not None, "rollout_logprobs"),
        ("rollout_logprobs", responses.rollout_logprobs, objective.tis_cap is not None, "tis_cap"),
    ):
        if is_needed and value is None:
            raise ValueError(f"{name}: expected a value with {reader}, given None")


def _check_groups(responses: Responses, objective: Objective, totals: Totals) -> None:
    """A micro-batch may split groups where nothing needs them whole."""
    if objective.group_size is None:
        return
    is_micro_batch = totals.tokens is not None or totals.num_groups is not None
    needs_whole = (MASKINGS[objective.kd_masking].needs_groups and responses.kd_weights is None) or (
        AGGREGATIONS[objective.aggregation].needs_groups and totals.group_tokens is None
    )
    may_split = is_micro_batch or responses.kd_weights is not None
    check_group_size(objective.group_size, len(responses.logprobs) if needs_whole or not may_split else None)


def _check_rows(responses: Responses) -> None:
    num_rows, weights = responses.logprobs.shape[:1], responses.kd_weights
    check_shape("advantages", responses.advantages, num_rows, "[B]")
    for name in ("advantages", "rewards", "kd_weights"):
        if (values := getattr(responses, name)) is not None:
            check_shape(name, values, num_rows, "[B]")
            check_finite(name, values)
    if weights is not None and (weights < 0).any():
        raise ValueError(f"kd_weights: expected weights of at least 0, given {weights.min().item()}")


def _check_tokens(responses: Responses, objective: Objective, is_response: Tensor) -> None:
    given = {name: values for name in _PER_TOKEN if (values := getattr(responses, name)) is not None}
    for name, values in given.items():
        check_shape(name, values, responses.logprobs.shape, "[B, T]")
    # Where the student has diverged, the caller sees it in the loss. Terms that are switched off need not be finite.
    is_sane = is_response & torch.isfinite(responses.logprobs)
    where = {
        "entropy": is_sane & (objective.entropy_coef > 0.0),
        "topk": is_sane & (objective.kd_beta > 0.0 and objective.needs_topk),
    }
    check_finite_together((name, values, where.get(name, is_response)) for name, values in given.items())
