"""The results of a sweep aggregated over seeds: means with 95 % intervals, ranks, differences, accuracy at equal time.

From `SweepResults` to `SweepTable`, without reading a file. kdrl_core.evaluation.statistics computes the intervals.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kdrl_core.evaluation.statistics import Accuracy, Scores, accuracy_difference, over_seeds
from kdrl_core.look.sweeps.claims import AVERAGE, VALIDATION
from kdrl_core.look.sweeps.equal_time import Answers, pace_of
from kdrl_core.look.sweeps.equality import unequal_notes
from kdrl_core.look.sweeps.judging import judge_claims
from kdrl_core.look.sweeps.results import CellResult, ModelScores, SweepResults, by_label
from kdrl_core.look.sweeps.table import PlacedAccuracy, Row, SweepTable, TimedRow


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
    equal_time_s, timed = _equal_time(results, variants)
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
        claims=judge_claims(results),
        left_out=results.judged.left_out,
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
        scores=_scores([model.scores for model in models.values()], averaged),
        length_mean=_mean([model.length_mean(AVERAGE) for model in models.values()]),
    )


def _scores(models: Sequence[Answers], averaged: Sequence[str] = ()) -> dict[str, PlacedAccuracy]:
    """Scores by benchmark, and their mean over the `averaged` benchmarks."""
    arrays = _arrays(models)
    found = {name: over_seeds({name: array}) for name, array in arrays.items()}
    if len(averaged) > 1 and all(name in arrays for name in averaged):
        found[AVERAGE] = over_seeds({name: arrays[name] for name in averaged})
    return {name: _score(accuracy) for name, accuracy in found.items()}


def _arrays(models: Sequence[Answers], problems: dict[str, list[str]] | None = None) -> dict[str, Scores]:
    """Benchmark → [seeds, problems], over the problems that all models have."""
    problems = _common(models) if problems is None else problems
    return {
        name: np.array([[model[name][problem] for problem in ids] for model in models])
        for name, ids in problems.items()
    }


def _common(models: Sequence[Answers]) -> dict[str, list[str]]:
    """Benchmark → the problems that all models have, in one order."""
    if not models:
        return {}
    found = {name: sorted(set.intersection(*(set(model.get(name, {})) for model in models))) for name in models[0]}
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
            ours, theirs = [cells[s].model.scores for s in seeds], [first[s].model.scores for s in seeds]
            problems = _common([*ours, *theirs])
            left, right = _arrays(ours, problems), _arrays(theirs, problems)
            differences = {n: _score(accuracy_difference({n: left[n]}, {n: right[n]})) for n in problems}
            row = replace(row, differences=differences)
        found.append(row)
    return found


def _equal_time(results: SweepResults, variants: Sequence[str]) -> tuple[float | None, list[TimedRow]]:
    """Every variant, read at the total time of the fastest one."""
    paces = {variant: pace for variant in variants if (pace := pace_of(results, variant)) is not None}
    if len(paces) < 2:
        return None, []
    limit = min(pace.last_s for pace in paces.values())
    rows = []
    for variant, pace in paces.items():
        reading = pace.at(limit)
        rows.append(
            TimedRow(
                label=variant,
                seeds=sorted(reading.answers),
                steps=list(reading.steps),
                first_step=min(pace.seconds),
                scores=_scores([reading.answers[seed] for seed in sorted(reading.answers)]),
            )
        )
    return limit, rows


def _score(accuracy: Accuracy) -> PlacedAccuracy:
    return PlacedAccuracy(mean=accuracy.mean, low=accuracy.low, high=accuracy.high)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
