"""Weight sync with two proofs: after an update the engine must sample with the trainer's probabilities.

An engine that keeps old weights, or a mixture of old and new, raises no error, but its rollouts are off-policy.

- The digest of the engine's weights must be that of the exported files. It notices a copy that is one update behind: at
  a learning rate of 1e-6 an update changes a hundredth of the weights in bfloat16, and logprobs by less than the noise
  of bfloat16.
- The engine samples a few short responses, and the trainer computes the logprobs of the same tokens. This probe notices
  gross faults that have the right weights: another temperature, a wrong kernel, weights that were exchanged.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy import float32
from numpy.typing import NDArray

from kdrl_core.engines.protocols import RolloutEngine
from kdrl_core.engines.weight_digest import folder_digest
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

    def digests(self) -> Mapping[str, str]:
        """Who holds a copy of the weights → digest of the copy; empty where it cannot be compared with a folder's."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """Duration and result of a weight sync."""

    seconds: float
    """Loading, comparing digests, and probing."""
    digest: str
    """Digest of the weights, the same in the engine and in the exported folder; empty if vLLM holds the weights of this
    model in a form that cannot be compared."""
    gap_mean: float
    """Mean absolute difference between engine and trainer logprobs on the probe's tokens, in nats."""
    gap_max: float
    rebuilt: bool
    """Whether the engine had to be started again."""


def sync_weights(
    engine: RebuildableEngine,
    weights: Path,
    probe: Sequence[RolloutRequest],
    score: Score,
    *,
    tolerance: float,
    dtype: str = "float32",
) -> SyncReport:
    """Have the engine load `weights`, which the trainer has exported, and prove that it samples with them.

    Args:
        probe: requests for short responses.
        score: gives the trainer's logprobs of the responses' tokens.
        tolerance: largest mean gap that is accepted, in nats; above it the engine is rebuilt once.
        dtype: the engine's; of another one the digest is computed after the load, not beside it.

    Raises:
        EngineError: the engine has other weights, or the gap is above the tolerance, even after it was rebuilt.
    """
    started = time.perf_counter()
    digest_in = cache(partial(folder_digest, weights))
    with ThreadPoolExecutor(1) as beside:
        beside.submit(digest_in, dtype)
        engine.load_weights(weights)
    found = _tried(engine, digest_in, probe, score, tolerance)
    if rebuilt := found.fault != "":
        _logger.warning("%s after it took %s; it is started anew", found.fault, weights)
        needs_digest = found.is_stale
        engine.rebuild(weights)
        found = _tried(engine, digest_in, probe, score, tolerance)
        if found.fault or (needs_digest and not found.digest):
            fault = found.fault or "the engine's weights have no digest that could be compared"
            raise EngineError(f"{fault}, though it was started anew from {weights}. {found.remedy}")
    if not found.digest:
        _logger.warning(
            "the weights of this model in vLLM have no digest that could be compared with %s; the probe alone tests "
            "the sync, and does not notice an engine that is one small update behind",
            weights,
        )
    return SyncReport(
        seconds=time.perf_counter() - started,
        digest=found.digest,
        gap_mean=found.mean,
        gap_max=found.largest,
        rebuilt=rebuilt,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What digest and probe say of an engine."""

    digest: str
    """Digest that engine and folder share; empty if they cannot be compared, or differ."""
    mean: float
    largest: float
    fault: str = ""
    is_stale: bool = False
    """Whether the digest told the fault."""
    remedy: str = ""


def _tried(
    engine: RebuildableEngine,
    digest_in: Callable[[str], str],
    probe: Sequence[RolloutRequest],
    score: Score,
    tolerance: float,
) -> _Found:
    told = {where: digest for where, digest in engine.digests().items() if digest}
    exported = {digest: digest_in(digest.partition(":")[0]) for digest in told.values()}
    stale = [f"{where} has {digest}" for where, digest in told.items() if digest != exported[digest]]
    if stale:
        return _Found(
            digest="",
            mean=math.nan,
            largest=math.nan,
            fault=f"the engine has other weights than those that were exported: the digest of these is "
            f"{' and '.join(sorted(set(exported.values())))}, {'; '.join(stale)}",
            is_stale=True,
            remedy="Its copy is old, or a mixture. Do replicas see the same files, at once, under the same path?",
        )
    mean, largest = _gap(engine, probe, score)
    digest = " ".join(sorted(set(told.values()))) if len(told) == len(engine.digests()) else ""
    if mean <= tolerance:
        return _Found(digest=digest, mean=mean, largest=largest)
    return _Found(
        digest=digest,
        mean=mean,
        largest=largest,
        fault=f"the engine's logprobs are {mean:.3g} nats from the trainer's in the mean, {largest:.3g} at most",
        remedy=f"rollout.sync_tolerance is {tolerance:g}. "
        + ("Its weights are those that were exported, so e" if digest else "E")
        + "ngine and trainer have to agree in model, dtype and temperature",
    )


def _gap(engine: RolloutEngine, probe: Sequence[RolloutRequest], score: Score) -> tuple[float, float]:
    """Mean and largest absolute difference in logprobs; NaN if a logprob is NaN."""
    rollouts = engine.generate(probe, max_response_tokens=PROBE_TOKENS)
    ours = np.concatenate([np.asarray(rollout.logprobs, float32) for rollout in rollouts])
    requests = [ScoreRequest(prompt_token_ids=r.prompt_token_ids, token_ids=r.token_ids) for r in rollouts]
    gap = np.abs(ours - np.concatenate(list(score(requests))))
    return float(gap.mean()), float(gap.max())
