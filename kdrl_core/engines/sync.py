"""Weight sync with a proof: after an update the engine must sample with the trainer's probabilities.

An engine that keeps old weights, or a mixture of old and new, raises no error, but its rollouts are off-policy. So
the engine samples a few short responses, and the trainer computes the logprobs of the same tokens.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy import float32
from numpy.typing import NDArray

from kdrl_core.engines.protocols import RolloutEngine
from kdrl_core.errors import EngineError
from kdrl_core.types import RolloutRequest, ScoreRequest

PROBE_RESPONSES = 8
PROBE_TOKENS = 32
_logger = logging.getLogger("kdrl")

Score = Callable[[Sequence[ScoreRequest]], Sequence[NDArray[float32]]]
"""`Trainer.score`."""


class RebuildableEngine(RolloutEngine, Protocol):
    """An engine whose weights are a copy of the trainer's."""

    def rebuild(self, checkpoint_dir: Path) -> None:
        """Start again from a model directory."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """Duration and result of a weight sync."""

    seconds: float
    """Loading and probing."""
    gap_mean: float
    """Mean absolute difference between engine and trainer logprobs on the probe's tokens, in nats."""
    gap_max: float
    rebuilt: bool
    """Whether the engine had to be started again."""


def sync_weights(
    engine: RebuildableEngine, weights: Path, probe: Sequence[RolloutRequest], score: Score, *, tolerance: float
) -> SyncReport:
    """Have the engine load `weights`, which the trainer has exported, and prove that it samples with them.

    Args:
        probe: requests for short responses.
        score: gives the trainer's logprobs of the responses' tokens.
        tolerance: largest mean gap that is accepted, in nats; above it the engine is rebuilt once.

    Raises:
        EngineError: the gap is above the tolerance even after the engine was rebuilt.
    """
    started = time.perf_counter()
    engine.load_weights(weights)
    mean, largest = _gap(engine, probe, score)
    rebuilt = not mean <= tolerance
    if rebuilt:
        _logger.warning(
            "the engine's logprobs are %.3g nats from the trainer's after it took %s; it is started anew", mean, weights
        )
        engine.rebuild(weights)
        mean, largest = _gap(engine, probe, score)
        if not mean <= tolerance:
            raise EngineError(
                f"the engine's logprobs are {mean:.3g} nats from the trainer's in the mean, {largest:.3g} at most, "
                f"though it was started anew from {weights}; rollout.sync_tolerance is {tolerance:g}. Engine and "
                "trainer have to agree in model, dtype and temperature"
            )
    return SyncReport(seconds=time.perf_counter() - started, gap_mean=mean, gap_max=largest, rebuilt=rebuilt)


def _gap(engine: RolloutEngine, probe: Sequence[RolloutRequest], score: Score) -> tuple[float, float]:
    """Mean and largest absolute difference in logprobs; NaN if a logprob is NaN."""
    rollouts = engine.generate(probe, max_response_tokens=PROBE_TOKENS)
    ours = np.concatenate([np.asarray(rollout.logprobs, float32) for rollout in rollouts])
    requests = [ScoreRequest(prompt_token_ids=r.prompt_token_ids, token_ids=r.token_ids) for r in rollouts]
    gap = np.abs(ours - np.concatenate(list(score(requests))))
    return float(gap.mean()), float(gap.max())
