"""Accuracy in training at one time: every variant is read after the same seconds of its last stage.

Between two evaluations the accuracy is taken to be linear in time, for each seed and problem, so that intervals stay
paired. Times are means over seeds, so that all seeds of a variant are read between the same two steps. The model before
the stage is step 0, if it was evaluated on the benchmark as a model for reference. Nothing is read beyond the last
evaluation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kdrl_core.look.sweeps.results import CellResult, ModelScores, SweepResults, starts_of

Answers = Mapping[str, Mapping[str, float]]
"""Benchmark → problem → share of right samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedAnswers:
    """A variant at one time."""

    steps: tuple[int, ...] = ()
    """The two steps around it, or the one at it; none if the time is before the first evaluation."""
    answers: dict[int, Answers] = field(default_factory=dict)
    """By seed, interpolated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """The evaluations of a variant that all of its seeds have."""

    seconds: dict[int, float]
    """Step → seconds of the stage until then, mean over seeds. Step 0 is the model before the stage."""
    models: dict[int, dict[int, ModelScores]]
    """Step → seed → the model."""

    @property
    def last_s(self) -> float:
        return max(self.seconds.values())

    def at(self, seconds: float) -> TimedAnswers:
        """The variant after `seconds` of its last stage; empty before its first and after its last evaluation."""
        if (found := around(self.seconds, seconds)) is None:
            return TimedAnswers()
        before, after, weight = found
        ends = self.models[before], self.models[after]
        seeds = sorted(ends[0].keys() & ends[1].keys())
        steps = (before,) if before == after else (before, after)
        return TimedAnswers(
            steps=steps if seeds else (), answers={s: _between(ends[0][s], ends[1][s], weight) for s in seeds}
        )


def pace_of(results: SweepResults, variant: str) -> Pace | None:
    """None if no step is evaluated by all finished cells of the variant."""
    cells = [cell for cell in results.cells if cell.variant == variant]
    steps = set.intersection(*({w.step for w in cell.watched} for cell in cells)) if cells else set()
    if not steps:
        return None
    seconds = {step: _mean_seconds(cells, step) for step in sorted(steps)}
    models = {step: {c.seed: w.model for c in cells for w in c.watched if w.step == step} for step in seconds}
    starts = {seed: model for seed, model in starts_of(results, variant).items() if seed in {c.seed for c in cells}}
    watched = set.intersection(*({*model.scores} for of_step in models.values() for model in of_step.values()))
    if starts and all(watched <= model.scores.keys() for model in starts.values()):
        seconds = {0: float(np.mean([cell.start_s for cell in cells])), **seconds}
        models[0] = starts
    return Pace(seconds=seconds, models=models)


def around(seconds_of: Mapping[int, float], seconds: float) -> tuple[int, int, float] | None:
    """The steps before and after a time, and how far between them it lies, from 0 to 1. At an evaluation both are its
    step. None before the first evaluation and after the last one. Until step 0 ends, the model is the one before the
    stage: SFT first samples its teacher."""
    if seconds <= seconds_of.get(0, -1.0):
        return 0, 0, 0.0
    before = max((step for step, at in seconds_of.items() if at <= seconds), default=None)
    after = min((step for step, at in seconds_of.items() if at >= seconds), default=None)
    if before is None or after is None:
        return None
    if before >= after:
        return before, before, 0.0
    return before, after, (seconds - seconds_of[before]) / (seconds_of[after] - seconds_of[before])


def _mean_seconds(cells: Sequence[CellResult], step: int) -> float:
    return float(np.mean([w.seconds for cell in cells for w in cell.watched if w.step == step]))


def _between(before: ModelScores, after: ModelScores, weight: float) -> Answers:
    """The scores of the problems that both have."""
    return {
        name: {
            problem: (1.0 - weight) * before.scores[name][problem] + weight * right
            for problem, right in scores.items()
            if problem in before.scores[name]
        }
        for name, scores in after.scores.items()
        if name in before.scores
    }
