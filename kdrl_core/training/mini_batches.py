"""Several optimiser steps on the responses of one step, as PPO and DAPO train; the paper makes one.

    θ_0 ── observe ──▶ old_logprobs ── update on mini-batch 1 ──▶ θ_1 ── update on mini-batch 2 ──▶ θ_2 …

θ_0 is the policy that sampled. Its `old_logprobs` are those of the trainer, not of the engine, whose probabilities may
differ (`tis_cap` corrects for that). They are computed before the first optimiser step, for every mini-batch but the
first: there π_θ is π_θold, so ρ is 1 without them. A mini-batch is observed in the same micro-batches as it is trained
on, so that a policy that has not moved has ρ = 1, on a CPU to the bit.

A mini-batch has whole groups, in the order of the step. Advantages and KD weights are those of the whole step; each
optimiser step divides by the counts of its own mini-batch.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kdrl_core.training.protocols import StepStats, Trainer, UpdateBatch
from kdrl_core.training.torch_trainer import totals_of

_OF_FIRST = {"ratio/mean": 1.0, "ratio/clipped_frac": 0.0}
"""Metrics that the first mini-batch, which is on-policy, does not measure."""


def update_in_turn(trainer: Trainer, batch: UpdateBatch, num_updates: int) -> StepStats:
    """Make `num_updates` optimiser steps on equal parts of `batch`, whose number of groups they divide.

    Returns:
        Logprobs and entropies are those of the policy that sampled. Metrics of the loss are those that each optimiser
        step had, as a mean over all response tokens (kd/kl_unmasked: those on which KD acts; with group_mean: over all
        groups). `ratio/max` is the largest ρ of any token. `optim/grad_norm` is the largest, `optim/learning_rate` the
        last.

    Raises:
        EngineError: loss or gradient norm is not finite; the optimiser steps before that one are made.
    """
    size = len(batch.sequences) // num_updates
    first, *later = (batch.take(range(start, start + size)) for start in range(0, size * num_updates, size))
    olds = [trainer.observe(part) for part in later]
    parts = [first, *(replace(part, old_logprobs=old.logprobs) for part, old in zip(later, olds, strict=True))]
    stats = [trainer.update(part) for part in parts]
    sampled = [stats[0], *olds]
    entropies = [row for each in sampled for row in each.entropies or ()]
    return StepStats(
        metrics={**_combined(stats, parts), "ratio/max": _largest_ratio(stats, parts)},
        logprobs=[row for each in sampled for row in each.logprobs],
        entropies=entropies or None,
    )


def _combined(stats: Sequence[StepStats], parts: Sequence[UpdateBatch]) -> dict[str, float]:
    """One value for each metric of the parts."""
    totals = [totals_of(part) for part in parts]
    tokens = [0.0 if each.loss_mask is not None and not any(each.loss_mask) else 1.0 for each in parts]
    counts = [total.tokens if total.num_groups is None else total.num_groups for total in totals]
    tokens = [weight * float(count or 0) for weight, count in zip(tokens, counts, strict=True)]
    kd_tokens = [float(total.kd_tokens or 0) for total in totals]
    combined: dict[str, float] = {}
    for name in stats[-1].metrics:
        values = [each.metrics.get(name, _OF_FIRST.get(name, 0.0)) for each in stats]
        if name == "optim/learning_rate":
            combined[name] = values[-1]
        elif name.startswith(("optim/", "memory/")):
            combined[name] = max(values)
        else:
            combined[name] = _mean(values, kd_tokens if name == "kd/kl_unmasked" else tokens)
    return combined


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """0 where all weights are."""
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / (math.fsum(weights) or 1.0)


def _largest_ratio(stats: Sequence[StepStats], parts: Sequence[UpdateBatch]) -> float:
    """max ρ over the tokens that take part in the loss; those of the first mini-batch have 1."""
    largest = 0.0
    for each, part in zip(stats, parts, strict=True):
        kept = part.loss_mask or [1.0] * len(part.sequences)
        for new, old, is_kept in zip(each.logprobs, part.old_logprobs or (), kept, strict=False):
            if is_kept:
                largest = max(largest, float(np.max(new - old)))
    return math.exp(largest)
