"""Claims judged by the results of a sweep.

The measure is the difference more − less, paired by seed, for accuracies and lengths also by problem, with its 95 %
interval. With the claim's margin m (0 for most):

| the source says | the whole interval is | verdict |
| --- | --- | --- |
| more | above m / below m | holds / does not hold |
| similar | within −m to m / beyond one of them | agrees / does not hold |
| not much more | below m / above m | agrees / does not hold |

Everything else is unclear. A margin in % is that share of the observed mean, whose own uncertainty is left out. There
is no correction for the number of claims: of twenty real ties, about one is judged to hold, or not to hold, by chance.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from kdrl_core.evaluation.statistics import Accuracy, accuracy_difference, paired_difference
from kdrl_core.look.sweeps.claims import ACCURACY, AVERAGE, EQUAL_TIME, LENGTH, Claim, Measure
from kdrl_core.look.sweeps.equal_time import Answers, Pace, pace_of
from kdrl_core.look.sweeps.fifths import SPANS
from kdrl_core.look.sweeps.results import CellResult, ModelScores, SweepResults, benchmarks_of, by_label
from kdrl_core.look.sweeps.table import ClaimVerdict, JudgedClaim

Side = Mapping[int, Answers]
"""Seed → benchmark → problem → value. A number of a whole run is the value of one problem without a name."""


def judge_claims(results: SweepResults) -> list[JudgedClaim]:
    """Judge every claim of a sweep, over the seeds that both of its sides have."""
    judge = _Judge.of(results)
    return [judge.judge(claim) for claim in results.judged.claims]


@dataclass(frozen=True, slots=True)
class _Judge:
    """Results by the labels that claims use."""

    cells: dict[str, dict[int, CellResult]]
    models: dict[str, dict[int, ModelScores]]
    planned: dict[str, set[int]]
    paces: dict[str, Pace]
    judged_on: str

    @classmethod
    def of(cls, results: SweepResults) -> "_Judge":
        cells: dict[str, dict[int, CellResult]] = {}
        for cell in results.cells:
            cells.setdefault(cell.variant, {})[cell.seed] = cell
        models = {label: {seed: cell.model for seed, cell in found.items()} for label, found in cells.items()}
        planned: dict[str, set[int]] = {}
        for status in results.statuses:
            planned.setdefault(status.variant, set()).add(status.seed)
        for label, (references, seeds) in by_label(results).items():
            models.setdefault(label, references)
            planned.setdefault(label, seeds)
        paces = {label: pace for label in cells if (pace := pace_of(results, label)) is not None}
        return cls(cells, models, planned, paces, results.judged.benchmark)

    def judge(self, claim: Claim) -> JudgedClaim:
        measure, labels = claim.compared, [label for label in (claim.more, claim.less) if label]
        last = [self.paces[label].last_s for label in labels if label in self.paces]
        sides = [self._side(label, measure, min(last, default=0.0)) if label else None for label in claim.sides]
        found = _measured(sides, is_accuracy=measure.quantity in (ACCURACY, EQUAL_TIME))
        if found and measure.span:  # a growth is no size to take a share of
            level = _metric(self.cells[labels[0]], replace(measure, span=""))
            found = replace(found, base=fmean(value[""][""] for value in level.values()) if level else 0.0)
        planned = [self.planned[label] for label in labels if label in self.planned]
        num_seeds = found.num_seeds if found else 0
        names = found.benchmarks if found else []
        what = _words(measure, names, self.judged_on)
        if measure.quantity == EQUAL_TIME and last:
            what += f" after {min(last):.3g} s"
        return JudgedClaim(
            text=claim.text,
            source=claim.source,
            what=f"{claim.comparison}, {what}",
            expected=claim.says,
            verdict=_verdict(claim, found, can_tell=not measure.is_metric or num_seeds > 1),
            difference=found.difference if found else None,
            num_seeds=num_seeds,
            num_planned=max(len(set.intersection(*planned)) if planned else 0, num_seeds),
            is_share=measure.is_share,
        )

    def _side(self, label: str, measure: Measure, seconds: float) -> Side:
        """The values of a variant or reference model; empty if it has none."""
        if measure.is_metric:
            return _metric(self.cells.get(label, {}), measure)
        if measure.quantity == EQUAL_TIME:
            answers: Mapping[int, Answers] = self.paces[label].at(seconds).answers if label in self.paces else {}
        else:
            models = self.models.get(label, {})
            answers = {s: m.scores if measure.quantity == ACCURACY else m.lengths for s, m in models.items()}
        judged_on = AVERAGE if measure.quantity == LENGTH else self.judged_on
        found = {}
        for seed, by_benchmark in answers.items():
            names = benchmarks_of(by_benchmark, judged_on) if measure.benchmark is None else [measure.benchmark]
            found[seed] = {name: by_benchmark[name] for name in names if name in by_benchmark}
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    difference: Accuracy
    """More − less."""
    base: float
    """What a margin in % refers to: the mean of `more`, or of `less` if that is all there is."""
    num_seeds: int
    benchmarks: list[str]


def _measured(sides: list[Side | None], *, is_accuracy: bool) -> _Measured | None:
    """The difference of two sides over the seeds, benchmarks and problems that both have. None: no such. A side that is
    None is zero."""
    given = [side for side in sides if side is not None]
    seeds = sorted(set.intersection(*({*side} for side in given)))
    answers = [side[seed] for side in given for seed in seeds]
    names = [name for name in answers[0] if all(name in each for each in answers)] if answers else []
    problems = {name: sorted(set.intersection(*({*each[name]} for each in answers))) for name in names}
    problems = {name: ids for name, ids in problems.items() if ids}
    if not problems:
        return None
    zero = {name: np.zeros((len(seeds), len(ids))) for name, ids in problems.items()}
    more, less = (
        zero
        if side is None
        else {
            name: np.array([[side[seed][name][problem] for problem in ids] for seed in seeds])
            for name, ids in problems.items()
        }
        for side in sides
    )
    base = float(np.mean([array.mean() for array in (less if sides[0] is None else more).values()]))
    difference = (accuracy_difference if is_accuracy else paired_difference)(more, less)
    return _Measured(difference=difference, base=base, num_seeds=len(seeds), benchmarks=[*problems])


def _verdict(claim: Claim, found: _Measured | None, *, can_tell: bool) -> ClaimVerdict:
    if found is None:
        return ClaimVerdict.MISSING
    if not can_tell:  # one seed, one number: its interval says nothing
        return ClaimVerdict.UNCLEAR
    margin, low, high = claim.margin_of(found.base), found.difference.low, found.difference.high
    match claim.expected:
        case "similar":
            agrees, contradicts = -margin <= low and high <= margin, low > margin or high < -margin
        case "not much more":
            agrees, contradicts = high < margin, low > margin
        case _:
            agrees, contradicts = low > margin, high < margin
    if contradicts:
        return ClaimVerdict.DOES_NOT
    if not agrees:
        return ClaimVerdict.UNCLEAR
    return ClaimVerdict.AGREES if claim.expected in ("similar", "not much more") else ClaimVerdict.HOLDS


def _metric(cells: Mapping[int, CellResult], measure: Measure) -> Side:
    found = {}
    for seed, cell in cells.items():
        fifths = cell.metrics.get(measure.quantity)
        value = None if fifths is None else SPANS[measure.span](fifths)
        if value is not None:
            found[seed] = {"": {"": value}}
    return found


def _words(measure: Measure, names: list[str], judged_on: str) -> str:
    """`accuracy on test`, `accuracy on avg`, `early reward/mean`. Several benchmarks are `avg`, whatever the sweep is
    judged on: it may not be evaluated during training."""
    if measure.quantity not in (ACCURACY, EQUAL_TIME):
        return str(measure)
    shown = "accuracy" if measure.quantity == ACCURACY else "accuracy in training"
    told = {0: measure.benchmark or judged_on, 1: "".join(names)}
    return f"{shown} on {told.get(len(names), AVERAGE)}"
