"""What a trainer must do, and the plain records that go in and out of it.

A trainer knows no algorithm: advantages, weights and coefficients come with the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from numpy import float32
from numpy.typing import NDArray

from kdrl_core.types import ScoreRequest

Float32s = NDArray[float32]

STATE_DIR = "trainer"
"""Folder of a checkpoint with optimiser, scheduler and step; apart from the weights, whose folder engines may glob."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateBatch:
    """Everything of one optimiser step: B responses, each with T_i tokens. Per-token values are ragged lists."""

    sequences: Sequence[ScoreRequest]
    advantages: Sequence[float]
    """[B] Â of (2); zeros for KD-RKL."""
    kd_weights: Sequence[float]
    """[B] 1 where KD applies (Sec. 3.4)."""
    teacher_logprobs: Sequence[Float32s] | None
    """Of π_T; None without a teacher."""
    ref_logprobs: Sequence[Float32s] | None
    """Of the stage's frozen initial policy; None without the penalty."""
    beta: float
    kl_estimator: str
    ref_beta: float
    ref_kl_estimator: str
    entropy_coef: float
    group_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """What an optimiser step found out."""

    metrics: dict[str, float]
    """Of the loss, over all tokens of the step, and `optim/grad_norm`, `optim/learning_rate`."""
    logprobs: Sequence[Float32s]
    """The trainer's own logprobs of the sampled tokens, before the update."""


class Trainer(Protocol):
    """Holds the policy and its optimiser."""

    @property
    def step(self) -> int:
        """Updates done so far."""
        ...

    def update(self, batch: UpdateBatch) -> StepStats:
        """One optimiser step."""
        ...

    def save(self, path: Path) -> None:
        """Write weights and trainer state to an existing empty folder."""
        ...

    def load(self, path: Path) -> None:
        """Take weights and trainer state from a folder that `save` wrote."""
        ...

    def export_hf(self, path: Path) -> None:
        """Write an ordinary Hugging Face model directory: weights, config, tokenizer, chat template."""
        ...
