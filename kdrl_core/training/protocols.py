"""What a trainer must do, and the plain records that go in and out of it.

A trainer knows no algorithm: the objective, the advantages and the weights come with the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from numpy import float32, float64, int32
from numpy.typing import NDArray

from kdrl_core.config import StageConfig
from kdrl_core.ledger import Listing
from kdrl_core.objectives.inputs import Objective
from kdrl_core.types import ScoreRequest

if TYPE_CHECKING:
    from kdrl_core.models.lora import FrozenAdapter

Float32s = NDArray[float32]
Int32s = NDArray[int32]

STATE_DIR = "trainer"
"""Folder of a checkpoint with optimiser, scheduler and step; not beside the weights, because engines may glob there."""


PER_RESPONSE = {"advantages": float64, "kd_weights": float64, "loss_mask": float64}
PER_TOKEN = {
    "old_logprobs": float32,
    "teacher_logprobs": float32,
    "ref_logprobs": float32,
    "rollout_logprobs": float32,
    "topk_ids": int32,
    "topk_logprobs": float32,
}
"""Fields of an `UpdateBatch` and the kind of number in them. All of them are sent to the ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """How a trainer updates the policy, the same for every step of a stage; the fields are those of `StageConfig`."""

    temperature: float
    """T of every logprob; `StageConfig.update_temperature`."""
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    """Linear warm-up, in optimiser steps; the first already has a learning rate above 0."""
    max_grad_norm: float
    micro_batch_tokens: int
    """Padded tokens per forward and backward pass, of each rank."""
    seed: int = 0
    """Seed of random draws that the model's code may make; each step derives its own. Dropout is off."""

    @classmethod
    def of(cls, stage: StageConfig, *, seed: int) -> Self:
        own: dict[str, Any] = {"seed": seed, "temperature": stage.update_temperature}
        return cls(**own, **{each.name: getattr(stage, each.name) for each in fields(cls) if each.name not in own})


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateBatch:
    """Everything of one optimiser step: B responses, each with T_i tokens. Per-token values are ragged lists."""

    sequences: Sequence[ScoreRequest]
    objective: Objective = field(default_factory=Objective)
    advantages: Sequence[float]
    """[B] Â of (2); zeros for KD-RKL."""
    kd_weights: Sequence[float]
    """[B] 1 where KD applies (Sec. 3.4)."""
    loss_mask: Sequence[float] | None = None
    """[B] 1 where the response takes part in the loss, 0 where it does not; None: all do."""
    old_logprobs: Sequence[Float32s] | None = None
    """[T_i] of the policy that sampled, by this trainer, where it has been updated since; None: on-policy."""
    teacher_logprobs: Sequence[Float32s] | None = None
    """[T_i] of π_T; None without a teacher."""
    ref_logprobs: Sequence[Float32s] | None = None
    """[T_i] of the stage's frozen initial policy; None without the penalty."""
    rollout_logprobs: Sequence[Float32s] | None = None
    """[T_i] the engine's, for truncated importance weights; with `Objective.tis_cap`."""
    topk_ids: Sequence[Int32s] | None = None
    """[T_i, K] the teacher's K best tokens, for Top-K (A.3)."""
    topk_logprobs: Sequence[Float32s] | None = None
    """[T_i, K] their logprobs under softmax(logits / T) over the whole vocabulary."""

    def take(self, rows: Sequence[int]) -> Self:
        """The same step with only these responses."""

        def pick(name: str) -> Any:
            values = getattr(self, name)
            return None if values is None else [values[row] for row in rows]

        return replace(self, **{name: pick(name) for name in ("sequences", *PER_RESPONSE, *PER_TOKEN)})


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """Results of an optimiser step."""

    metrics: dict[str, float]
    """Metrics of the loss over all tokens of the step, and `optim/grad_norm`, `optim/learning_rate`; on GPUs also
    `memory/peak_gib` and `memory/reserved_gib` of the update, the most of any rank."""
    logprobs: Sequence[Float32s]
    """The trainer's own logprobs of the sampled tokens, before the update."""
    entropies: Sequence[Float32s] | None = None
    """The entropy, in nats, of the policy at each of those tokens, before the update; None for SFT."""


class Trainer(Protocol):
    """Holds the policy and its optimiser."""

    saves_aside: bool
    """Whether `save` is the work of other processes, so that it may run in a thread beside other work."""

    @property
    def step(self) -> int:
        """Optimiser steps done so far."""
        ...

    def update(self, batch: UpdateBatch) -> StepStats:
        """One optimiser step."""
        ...

    def observe(self, batch: UpdateBatch) -> StepStats:
        """Logprobs and entropies that `update` would return, without an update and without metrics."""
        ...

    def score(self, sequences: Sequence[ScoreRequest]) -> list[Float32s]:
        """Logprobs of response tokens under the policy as it is, [len(token_ids)] each, in one forward pass."""
        ...

    def score_frozen(self, sequences: Sequence[ScoreRequest], adapter: "FrozenAdapter") -> list[Float32s]:
        """As `score`, with this adapter in place of the one that is trained; only with `student.lora`."""
        ...

    def save(self, path: Path) -> Listing:
        """Write weights and trainer state to an existing empty folder. Returns a listing for `publish_directory`: the
        files that are hashed already, and on the disk."""
        ...

    def load(self, path: Path) -> None:
        """Take weights and trainer state from a folder that `save` wrote."""
        ...

    def export_hf(self, path: Path, dtype: str = "float32") -> Listing:
        """Write an ordinary Hugging Face model directory with weights of this dtype: weights, config, tokenizer, chat
        template. bfloat16 weights have the bits that an engine makes of float32 ones. Returns a listing as `save`."""
        ...

    def close(self) -> None:
        """Release models and processes; the trainer cannot be used afterwards."""
        ...
