"""One optimiser step in float64 for the tests of the objectives, and its gradient through `kdrl_loss`."""

from typing import Any

import torch
from torch import Tensor

from kdrl_core.objectives import group_advantages, kdrl_loss

B, T, G = 8, 6, 4
BETA = 0.3


def make_batch() -> dict[str, Any]:
    """Two groups, one of which failed altogether; ragged lengths; on-policy."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return -3.0 * torch.rand(B, T, generator=generator, dtype=torch.float64)

    lengths = torch.tensor([6, 1, 3, 4, 2, 6, 5, 1])
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    return {
        "logprobs": draw().requires_grad_(),
        "teacher_logprobs": draw(),
        "response_mask": (torch.arange(T) < lengths[:, None]).double(),
        "rewards": rewards,
        "advantages": group_advantages(rewards, G),
        "group_size": G,
        "beta": BETA,
    }


def gradient(batch: dict[str, Any], **changes: Any) -> Tensor:
    """∂ loss / ∂ logprobs: the factor of ∇log π_θ at each token."""
    arguments = {**batch, **changes}
    loss, _ = kdrl_loss(arguments.pop("logprobs"), **arguments)
    (result,) = torch.autograd.grad(loss, batch["logprobs"])
    return result


def log_ratio(batch: dict[str, Any]) -> Tensor:
    return batch["teacher_logprobs"] - batch["logprobs"].detach()


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15)
