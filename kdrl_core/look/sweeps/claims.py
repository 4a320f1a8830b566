"""Claims of a sweep, judged by its runs: does a finding of the paper hold here, does it not, or is it unclear?

A claim says that one variant has more of a quantity than another. Its measure is the difference, paired by seed (for
accuracy also by problem), with the 95 % interval of evaluation/statistics.py. If the interval lies above zero, the
claim holds; below zero, it does not; around zero, it is unclear. There is no correction for the number of claims: of
twenty real ties, about one is judged to hold, or not to hold, by chance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from kdrl_core.evaluation.statistics import Accuracy, paired_difference
from kdrl_core.look.sweeps.results import CellResult, ModelScores, SweepResults, by_label
from kdrl_core.look.sweeps.spec import ACCURACY, LENGTH, Claim


class ClaimVerdict(StrEnum):
    """What the runs say about a claim."""

    HOLDS = "holds"
    DOES_NOT = "does not hold"
    UNCLEAR = "unclear"
    MISSING = "missing"


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedClaim:
    """A claim with its measure."""

    text: str
    source: str
    what: str
    """The comparison in short: `KDRL > GRPO, accuracy on test`."""
    expected: str
    """What the source says."""
    verdict: ClaimVerdict
    difference: Accuracy | None
    """More − less, in the quantity's own unit; None if a variant is missing."""
    num_seeds: int
    is_share: bool
    """Whether the quantity is an accuracy, shown in points."""


def judge_claims(claims: Sequence[Claim], results: SweepResults) -> list[JudgedClaim]:
    """Every claim over the seeds that both of its sides have."""
    cells: dict[str, dict[int, CellResult]] = {}
    for cell in results.cells:
        cells.setdefault(cell.variant, {})[cell.seed] = cell
    models = {label: {seed: cell.model for seed, cell in found.items()} for label, found in cells.items()}
    for label, group in by_label(results).items():
        models.setdefault(label, group.models)
    return [_judge(claim, cells, models) for claim in claims]


def _judge(
    claim: Claim, cells: Mapping[str, Mapping[int, CellResult]], models: Mapping[str, Mapping[int, ModelScores]]
) -> JudgedClaim:
    kind, _, name = claim.measure.partition(":")
    if kind == ACCURACY:
        left, right = _answers(models.get(claim.more, {}), name), _answers(models.get(claim.less, {}), name)
    elif kind == LENGTH:
        left, right = _lengths(models.get(claim.more, {})), _lengths(models.get(claim.less, {}))
    else:
        left, right = _means(cells.get(claim.more, {}), kind), _means(cells.get(claim.less, {}), kind)
    seeds = sorted(left.keys() & right.keys())
    problems = sorted(set.intersection(*(set(side[seed]) for seed in seeds for side in (left, right)))) if seeds else []
    difference = None
    if problems:
        ours, theirs = (
            np.array([[side[seed][problem] for problem in problems] for seed in seeds]) for side in (left, right)
        )
        difference = paired_difference({name: ours}, {name: theirs})
    return JudgedClaim(
        text=claim.text,
        source=claim.source,
        what=f"{claim.more} > {claim.less}, {f'accuracy on {name}' if kind == ACCURACY else kind}",
        expected=claim.expected,
        verdict=_verdict(difference, can_tell=kind == ACCURACY or len(seeds) > 1),
        difference=difference,
        num_seeds=len(seeds) if problems else 0,
        is_share=kind == ACCURACY,
    )


def _verdict(difference: Accuracy | None, *, can_tell: bool) -> ClaimVerdict:
    if difference is None:
        return ClaimVerdict.MISSING
    if not can_tell:  # one seed, one number: its interval says nothing
        return ClaimVerdict.UNCLEAR
    if difference.low > 0.0:
        return ClaimVerdict.HOLDS
    return ClaimVerdict.DOES_NOT if difference.high < 0.0 else ClaimVerdict.UNCLEAR


def _answers(models: Mapping[int, ModelScores], benchmark: str) -> dict[int, Mapping[str, float]]:
    """Seed → problem → share of right samples."""
    return {seed: model.scores[benchmark] for seed, model in models.items() if benchmark in model.scores}


def _lengths(models: Mapping[int, ModelScores]) -> dict[int, Mapping[str, float]]:
    """Seed → the mean length of the answers to all benchmarks."""
    return {seed: {"": model.length_mean} for seed, model in models.items()}


def _means(cells: Mapping[int, CellResult], metric: str) -> dict[int, Mapping[str, float]]:
    """Seed → the metric's mean over the last fifth of the steps."""
    return {seed: {"": cell.late[metric]} for seed, cell in cells.items() if metric in cell.late}
