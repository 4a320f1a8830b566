"""The results of a sweep aggregated over seeds: means with 95 % intervals, ranks, differences, accuracy at equal time.

From `SweepResults` to `SweepTable`, without reading a file. kdrl_core.evaluation.statistics computes the intervals.

A claim says that one variant has more of a quantity than another. Its measure is the difference, paired by seed (for
accuracy also by problem), with its 95 % interval. If the interval lies above zero, the claim holds; below zero, it does
not; around zero, it is unclear. There is no correction for the number of claims: of twenty real ties, about one is
judged to hold, or not to hold, by chance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kdrl_core.evaluation.statistics import Accuracy, Scores, over_seeds, paired_difference
from kdrl_core.look.sweeps.equality import unequal_notes
from kdrl_core.look.sweeps.results import CellResult, ModelScores, SweepResults, by_label
from kdrl_core.look.sweeps.spec import ACCURACY, LENGTH, Claim
from kdrl_core.look.sweeps.table import AVERAGE, VALIDATION, ClaimVerdict, JudgedClaim, Row, Score, SweepTable, TimedRow


def build_table(results: SweepResults) -> SweepTable:
    variants = list(dict.fromkeys(status.variant for status in results.statuses))
    by_variant = {variant: {c.seed: c for c in results.cells if c.variant == variant} for variant in variants}
    models = [cell.model for cell in results.cells] + [reference.model for reference in results.references]
    benchmarks = list(dict.fromkeys(name for model in models for name in model.scores))
    planned = {v: sum(status.variant == v for status in results.statuses) for v in variants}
    averaged = [name for name in benchmarks if name != VALIDATION and all(name in model.scores for model in models)]
    rows = [_variant_row(v, by_variant[v], planned[v], averaged) for v in variants]
    rows = _with_differences(_ranked(rows), by_variant, variants)
    references = [
        _row(label, models_of, len(models_of.keys() | seeds), averaged, is_reference=True)
        for label, (models_of, seeds) in by_label(results).items()
    ]
    equal_time_s, timed = _equal_time(by_variant)
    return SweepTable(
        name=results.name,
        description=results.description,
        recipe=results.recipe,
        benchmarks=benchmarks,
        averaged=averaged,
        rows=[*references, *rows],
        equal_time_s=equal_time_s,
        timed=timed,
        cells=[_cell_record(cell) for cell in results.cells],
        missing=[status.to_json() for status in results.missing],
        notes=unequal_notes(results.recipes),
        claims=judge_claims(results.claims, results),
    )


def _cell_record(cell: CellResult) -> dict[str, Any]:
    shown = {name: getattr(cell, name) for name in ("run", "variant", "seed", "steps", "train_s")}
    return {**shown, "scores": {name: float(np.mean([*found.values()])) for name, found in cell.model.scores.items()}}


def _variant_row(label: str, cells: dict[int, CellResult], num_planned: int, averaged: Sequence[str]) -> Row:
    models = {seed: cells[seed].model for seed in sorted(cells)}
    return replace(
        _row(label, models, num_planned, averaged, is_reference=False),
        steps=_mean([cells[seed].steps for seed in models]),
        train_s=_mean([cells[seed].train_s for seed in models]),
    )


def _row(
    label: str, models: dict[int, ModelScores], num_planned: int, averaged: Sequence[str], *, is_reference: bool
) -> Row:
    return Row(
        label=label,
        is_reference=is_reference,
        seeds=sorted(models),
        num_planned=num_planned,
        scores=_scores([*models.values()], averaged),
        length_mean=_mean([model.length_mean for model in models.values()]),
    )


def _scores(models: Sequence[ModelScores], averaged: Sequence[str] = ()) -> dict[str, Score]:
    """Scores by benchmark, and their mean over the `averaged` benchmarks."""
    arrays = _arrays(models)
    found = {name: over_seeds({name: array}) for name, array in arrays.items()}
    if len(averaged) > 1 and all(name in arrays for name in averaged):
        found[AVERAGE] = over_seeds({name: arrays[name] for name in averaged})
    return {name: _score(accuracy) for name, accuracy in found.items()}


def _arrays(models: Sequence[ModelScores], problems: dict[str, list[str]] | None = None) -> dict[str, Scores]:
    """Benchmark → [seeds, problems], over the problems that all models have."""
    problems = _common(models) if problems is None else problems
    return {
        name: np.array([[model.scores[name][problem] for problem in ids] for model in models])
        for name, ids in problems.items()
    }


def _common(models: Sequence[ModelScores]) -> dict[str, list[str]]:
    """Benchmark → the problems that all models have, in one order."""
    if not models:
        return {}
    found = {
        name: sorted(set.intersection(*(set(model.scores.get(name, {})) for model in models)))
        for name in models[0].scores
    }
    return {name: ids for name, ids in found.items() if ids}


def _ranked(rows: list[Row]) -> list[Row]:
    ranks: dict[tuple[str, str], int] = {}
    for name in dict.fromkeys(name for row in rows for name in row.scores):
        means = sorted({row.scores[name].mean for row in rows if name in row.scores}, reverse=True)
        for row in rows:
            if len(means) > 1 and name in row.scores and row.scores[name].mean in means[:2]:
                ranks[row.label, name] = 1 + means.index(row.scores[name].mean)
    return [
        replace(row, scores={n: replace(s, rank=ranks.get((row.label, n))) for n, s in row.scores.items()})
        for row in rows
    ]


def _with_differences(
    rows: list[Row], by_variant: dict[str, dict[int, CellResult]], variants: Sequence[str]
) -> list[Row]:
    first = by_variant[variants[0]] if variants else {}
    found = []
    for row in rows:
        cells = by_variant[row.label]
        seeds = sorted(cells.keys() & first.keys())
        if row.label != variants[0] and seeds:
            ours, theirs = [cells[s].model for s in seeds], [first[s].model for s in seeds]
            problems = _common([*ours, *theirs])
            left, right = _arrays(ours, problems), _arrays(theirs, problems)
            differences = {n: _score(paired_difference({n: left[n]}, {n: right[n]})) for n in problems}
            row = replace(row, differences=differences)
        found.append(row)
    return found


def _equal_time(by_variant: dict[str, dict[int, CellResult]]) -> tuple[float | None, list[TimedRow]]:
    """Every variant at its last periodic evaluation within the total time of the fastest variant. Times are means over
    seeds, so that all seeds of a variant are compared at the same step."""
    paces = {variant: _pace(list(cells.values())) for variant, cells in by_variant.items()}
    paces = {variant: pace for variant, pace in paces.items() if pace}
    if len(paces) < 2:
        return None, []
    limit = min(max(pace.values()) for pace in paces.values())
    rows = []
    for variant, pace in paces.items():
        cells = by_variant[variant]
        step = max((step for step, seconds in pace.items() if seconds <= limit), default=None)
        models = [w.model for seed in sorted(cells) for w in cells[seed].watched if w.step == step]
        seeds = sorted(cells) if models else []
        rows.append(TimedRow(label=variant, seeds=seeds, step=step, scores=_scores(models)))
    return limit, rows


def _pace(cells: Sequence[CellResult]) -> dict[int, float]:
    """Step that every seed has evaluated → mean seconds until then."""
    steps = set.intersection(*({w.step for w in cell.watched} for cell in cells)) if cells else set()
    return {step: float(np.mean([w.seconds for c in cells for w in c.watched if w.step == step])) for step in steps}


def _score(accuracy: Accuracy) -> Score:
    return Score(mean=accuracy.mean, low=accuracy.low, high=accuracy.high)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def judge_claims(claims: Sequence[Claim], results: SweepResults) -> list[JudgedClaim]:
    """Judge every claim, over the seeds that both of its sides have."""
    cells: dict[str, dict[int, CellResult]] = {}
    for cell in results.cells:
        cells.setdefault(cell.variant, {})[cell.seed] = cell
    models = {label: {seed: cell.model for seed, cell in found.items()} for label, found in cells.items()}
    for label, (references, _) in by_label(results).items():
        models.setdefault(label, references)
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
