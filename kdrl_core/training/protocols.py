"""What a trainer must do, and the plain records that go in and out of it.

A trainer knows no algorithm: advantages, weights and coefficients come with the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from numpy import float32, int32
from numpy.typing import NDArray

from kdrl_core.types import ScoreRequest

Float32s = NDArray[float32]
Int32s = NDArray[int32]

STATE_DIR = "trainer"
"""Folder of a checkpoint with optimiser, scheduler and step; apart from the weights, whose folder engines may glob."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKTeacher:
    """The teacher's K best tokens at every response token, for Top-K (A.3); ragged, [T_i, K] a response."""

    token_ids: Sequence[Int32s]
    logprobs: Sequence[Float32s]
    """Under softmax(logits / T) over the whole vocabulary."""
    floor: float
    """Log-probability of every other token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateBatch:
    """Everything of one optimiser step: B responses, each with T_i tokens. Per-token values are ragged lists."""

    sequences: Sequence[ScoreRequest]
    advantages: Sequence[float]
    """[B] Â of (2); zeros for KD-RKL."""
    kd_weights: Sequence[float]
    """[B] 1 where KD applies (Sec. 3.4)."""
    loss: Literal["kdrl", "sft"] = "kdrl"
    """The joint loss (8), or the likelihood of the sequences (14), for which nothing below matters."""
    teacher_logprobs: Sequence[Float32s] | None = None
    """Of π_T; None without a teacher."""
    topk: TopKTeacher | None = None
    """For `kl_estimator` topk."""
    ref_logprobs: Sequence[Float32s] | None = None
    """Of the stage's frozen initial policy; None without the penalty."""
    rollout_logprobs: Sequence[Float32s] | None = None
    """The engine's, for truncated importance weights; with `tis_cap`."""
    tis_cap: float | None = None
    beta: float = 0.0
    kl_estimator: str = "k2"
    ref_beta: float = 0.0
    ref_kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    aggregation: str = "token_mean"
    group_size: int | None = None
    """G, for `aggregation` group_mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """What an optimiser step found out."""

    metrics: dict[str, float]
    """Of the loss, over all tokens of the step, and `optim/grad_norm`, `optim/learning_rate`."""
    logprobs: Sequence[Float32s]
    """The trainer's own logprobs of the sampled tokens, before the update."""
    entropies: Sequence[Float32s] | None = None
    """The entropy, in nats, of the policy at each of those tokens, before the update; None of SFT, which needs none."""


class Trainer(Protocol):
    """Holds the policy and its optimiser."""

    @property
    def step(self) -> int:
        """Updates done so far."""
        ...

    def update(self, batch: UpdateBatch) -> StepStats:
        """One optimiser step."""
        ...

    def score(self, sequences: Sequence[ScoreRequest]) -> list[Float32s]:
        """Logprobs of response tokens under the policy as it is, [len(token_ids)] each, in one forward pass."""
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

    def close(self) -> None:
        """Let go of models and processes; nothing may be asked of it afterwards."""
        ...
