"""Checks of tensors, made before any arithmetic: a `ValueError` names the argument, what was expected, what was given.

What is no tensor at all is a `TypeError`. The checks of plain values are in scalars.py.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


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
    """No NaN or infinity in `values` ([B] or [B, T]), on padding apart: `where` is True on response tokens."""
    is_bad = ~torch.isfinite(values)
    if where is not None:
        is_bad &= where
    if is_bad.any():
        position = is_bad.nonzero()[0].tolist()
        place = ", ".join(f"{name} {i}" for name, i in zip(("row", "token", "entry"), position, strict=False))
        on = "" if where is None else " on every response token"
        raise ValueError(f"{argument}: expected finite values{on}, given {values[tuple(position)].item()} at {place}")


def check_finite_together(arguments: Iterable[tuple[str, Tensor | None, Tensor]]) -> None:
    """`check_finite` of each (argument, values, where), None left out, at the cost of one: a GPU is waited for once."""
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
