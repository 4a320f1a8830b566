"""Reward-guided masking (Sec. 3.4): where the teacher's signal applies.

    none      R' = R
    response  R' = 1[r_i = 0] · R                    the response failed
    group     R' = 1[r_j = 0 for all j in the group] · R   every response to the prompt failed: there Â = 0

R' multiplies R and nothing else: the denominator Σ|o_i| of the objective still counts every response token.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kdrl_core.objectives.checks import as_float, check_finite, check_num_dims
from kdrl_core.objectives.kinds import MASKINGS
from kdrl_core.objectives.scalars import check_choice, check_group_size


def _none(has_failed: Tensor, group_size: int | None) -> Tensor:
    return torch.ones_like(has_failed)


def _response(has_failed: Tensor, group_size: int | None) -> Tensor:
    return has_failed


def _group(has_failed: Tensor, group_size: int | None) -> Tensor:
    assert group_size is not None
    return has_failed.reshape(-1, group_size).all(1).repeat_interleave(group_size)


KD_MASKINGS: dict[str, Callable[[Tensor, int | None], Tensor]] = {"none": _none, "response": _response, "group": _group}
"""From [B] "the response failed" to [B] "KD applies"."""
assert KD_MASKINGS.keys() == MASKINGS.keys()


def kd_mask(rewards: Tensor, group_size: int, level: str) -> Tensor:
    """1 where KD applies, 0 where it does not (Sec. 3.4). No gradient.

    Args:
        rewards: [B] outcome rewards r_i, groups contiguous; failed means exactly 0.
        group_size: G ≥ 2.
        level: "none" | "response" | "group".

    Returns:
        [B] in the dtype of `rewards`, float32 at least (as for integer or half-precision rewards).

    Raises:
        ValueError: unknown level, `rewards` is not [B] and finite, `group_size` does not divide B or is below 2.
    """
    check_choice("level", level, KD_MASKINGS)
    check_num_dims("rewards", rewards, "[B]")
    check_group_size(group_size, len(rewards))
    check_finite("rewards", rewards)
    rewards = as_float(rewards.detach())
    return KD_MASKINGS[level](rewards == 0, group_size).to(rewards.dtype)
