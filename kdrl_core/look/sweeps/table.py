"""The results of a sweep as tables: one row a variant, mean over its seeds with 95 % interval; shows what is missing.

Pure: from `SweepResults` to `SweepTable`, which prints, serialises, and is what a report draws. How the intervals come
about says kdrl_core.evaluation.over_seeds.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from kdrl_core.evaluation.over_seeds import Scores, over_seeds, paired_difference
from kdrl_core.evaluation.statistics import Accuracy
from kdrl_core.look.reporting.tables import Table
from kdrl_core.look.sweeps.claims import JudgedClaim, judge
from kdrl_core.look.sweeps.results import CellResult, ModelScores, SweepResults, by_label

AVERAGE = "avg"
"""Mean of the benchmarks that every row has, but for `VALIDATION`."""
VALIDATION = "validation"
"""The benchmark by which learning rates and checkpoints are chosen, by its name; no choice may lift an average."""
_MISSING = "–"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Accuracy in [0, 1], its interval, and whether it is the best or second best of the variants."""

    mean: float
    low: float
    high: float
    rank: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One variant, or a model for reference."""

    label: str
    is_reference: bool
    seeds: list[int]
    """That are in its numbers."""
    num_planned: int
    scores: dict[str, Score]
    """By benchmark, and their mean as `avg` where there is one; empty if no seed is finished."""
    differences: dict[str, Score] = field(default_factory=dict)
    """To the first variant, over the seeds that both have: paired by problem and seed."""
    length_mean: float | None = None
    steps: float | None = None
    train_s: float | None = None
    """Seconds of the last stage, mean over seeds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedRow:
    """A variant when each has trained for as long as the fastest did in all."""

    label: str
    seeds: list[int]
    step: int | None
    """Of the last evaluation in that time."""
    scores: dict[str, Score]
    """Empty if there was none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepTable:
    """What a sweep has come to."""

    name: str
    description: str
    recipe: str
    benchmarks: list[str]
    averaged: list[str]
    """What `avg` is the mean of; with fewer than two there is none."""
    rows: list[Row]
    equal_time_s: float | None
    """What every variant with periodic evaluations has trained for, in `timed`."""
    timed: list[TimedRow]
    cells: list[dict[str, Any]]
    """Finished cells: run, variant, seed, steps, train_s, scores (means)."""
    missing: list[dict[str, Any]]
    """Cells that are not finished: run, variant, seed, state, detail."""
    claims: list[JudgedClaim] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def accuracy_table(self, *, marked: bool = False) -> Table:
        """Accuracies in %; with `marked` in Markdown, the best bold and the second best in italics."""
        columns = [*self.benchmarks, *([AVERAGE] if len(self.averaged) > 1 else [])]
        rows = [
            [
                row.label,
                *(_cell(row.scores.get(column), marked=marked) for column in columns),
                f"{len(row.seeds)}/{row.num_planned}",
            ]
            for row in self.rows
        ]
        return Table(title="Accuracy, % (95 % interval)", header=["variant", *columns, "seeds"], rows=rows)

    def cost_table(self) -> Table:
        """Length of the responses, steps and time of the last stage, means over seeds."""
        rows = [[row.label, *map(_number, (row.length_mean, row.steps, row.train_s))] for row in self.rows]
        return Table(title="Cost, means over seeds", header=["variant", "tokens", "steps", "time, s"], rows=rows)

    def difference_table(self) -> Table:
        """Differences to the first variant, in points; no rows without two variants."""
        rows = [
            [row.label, *(_signed(row.differences.get(name)) for name in self.benchmarks)]
            for row in self.rows
            if row.differences
        ]
        first = next((row.label for row in self.rows if not row.is_reference), "")
        return Table(
            title=f"Difference to {first}, points (95 % interval, paired)",
            header=["variant", *self.benchmarks],
            rows=rows,
        )

    def equal_time_table(self) -> Table:
        """Periodic accuracy after equal training time, in %."""
        names = list(dict.fromkeys(name for row in self.timed for name in row.scores))
        rows = [
            [row.label, *(_cell(row.scores.get(name)) for name in names), _number(row.step), str(len(row.seeds))]
            for row in self.timed
        ]
        title = f"Accuracy in training, % after {self.equal_time_s or 0.0:.3g} s of the last stage each"
        return Table(title=title, header=["variant", *names, "step", "seeds"], rows=rows)

    def claim_table(self) -> Table:
        """The sweep's claims, judged."""
        rows = [
            [
                *(claim.text, claim.source, claim.expected, str(claim.verdict), claim.what),
                *(_measured(claim), str(claim.num_seeds)),
            ]
            for claim in self.claims
        ]
        return Table(
            title="Claims (more − less, 95 % interval, paired)",
            header=["claim", "source", "there", "here", "comparison", "difference", "seeds"],
            rows=rows,
            num_text=5,
        )

    def missing_table(self) -> Table:
        """What is not finished, and why."""
        rows = [[one["run"], one["state"], one["detail"]] for one in self.missing]
        return Table(title="Not finished", header=["run", "state", "detail"], rows=rows, num_text=3)

    def tables(self, *, marked: bool = False) -> list[Table]:
        """The tables that have something to say."""
        found = (
            self.accuracy_table(marked=marked),
            self.cost_table(),
            self.difference_table(),
            self.equal_time_table(),
            self.claim_table(),
        )
        return [table for table in (*found, self.missing_table()) if table.rows]

    def to_markdown(self) -> str:
        """The whole as a Markdown document."""
        parts = [f"# {self.name}", self.description, f"Recipe: {self.recipe}."]
        parts = [part for part in parts if part]
        for table in self.tables(marked=True):
            parts += [f"## {_plain(table.title)}", _escaped(table).to_markdown()]
        parts.append(NOTE)
        return "\n\n".join(parts) + "\n"

    def to_csv(self) -> str:
        """One line per row and benchmark, shares in place of per cent."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        fields = ["variant", "is_reference", "benchmark", "mean", "low", "high", "rank", "num_seeds", "num_planned"]
        writer.writerow([*fields, "length_mean", "steps", "train_s"])
        for row in self.rows:
            for name in row.scores or [""]:
                score = row.scores.get(name)
                values = [score.mean, score.low, score.high, score.rank] if score else [None] * 4
                counts = [len(row.seeds), row.num_planned]
                writer.writerow(
                    [row.label, row.is_reference, name, *values, *counts, row.length_mean, row.steps, row.train_s]
                )
        return text.getvalue()


NOTE = (
    "**Bold**: the best variant, *italics*: the second best, by their means; – is missing. Intervals: over problems "
    "and seeds, which are crossed (docs/sweeps.md); `avg`: of the benchmarks that all rows have, without validation. "
    "`tokens`: mean length of the responses. `time`: training in the last stage, longer where cells ran side by side."
)


def build_table(results: SweepResults) -> SweepTable:
    """Aggregate over seeds."""
    variants = list(dict.fromkeys(status.variant for status in results.statuses))
    by_variant = {variant: {c.seed: c for c in results.cells if c.variant == variant} for variant in variants}
    models = [cell.model for cell in results.cells] + [reference.model for reference in results.references]
    benchmarks = list(dict.fromkeys(name for model in models for name in model.scores))
    planned = {v: sum(status.variant == v for status in results.statuses) for v in variants}
    averaged = [name for name in benchmarks if name != VALIDATION and all(name in model.scores for model in models)]
    rows = [_variant_row(v, by_variant[v], planned[v], averaged) for v in variants]
    rows = _with_differences(_ranked(rows), by_variant, variants)
    equal_time_s, timed = _equal_time(by_variant)
    return SweepTable(
        name=results.name,
        description=results.description,
        recipe=results.recipe,
        benchmarks=benchmarks,
        averaged=averaged,
        rows=[*_reference_rows(results, averaged), *rows],
        equal_time_s=equal_time_s,
        timed=timed,
        cells=[_cell_record(cell) for cell in results.cells],
        missing=[status.to_json() for status in results.missing],
        claims=judge(results.claims, results),
    )


def _cell_record(cell: CellResult) -> dict[str, Any]:
    means = {name: float(np.mean(list(found.values()))) for name, found in cell.model.scores.items()}
    return {
        "run": cell.run,
        "variant": cell.variant,
        "seed": cell.seed,
        "steps": cell.steps,
        "train_s": cell.train_s,
        "scores": means,
    }


def _variant_row(label: str, cells: dict[int, CellResult], num_planned: int, averaged: Sequence[str]) -> Row:
    found = [cells[seed] for seed in sorted(cells)]
    return Row(
        label=label,
        is_reference=False,
        seeds=sorted(cells),
        num_planned=num_planned,
        scores=_scores([cell.model for cell in found], averaged),
        length_mean=_mean([cell.model.length_mean for cell in found]),
        steps=_mean([cell.steps for cell in found]),
        train_s=_mean([cell.train_s for cell in found]),
    )


def _reference_rows(results: SweepResults, averaged: Sequence[str]) -> list[Row]:
    rows = []
    for label, group in by_label(results).items():
        models = list(group.models.values())
        rows.append(
            Row(
                label=label,
                is_reference=True,
                seeds=sorted(group.models),
                num_planned=len(group.models.keys() | group.planned),
                scores=_scores(models, averaged),
                length_mean=_mean([model.length_mean for model in models]),
            )
        )
    return rows


def _scores(models: Sequence[ModelScores], averaged: Sequence[str] = ()) -> dict[str, Score]:
    """By benchmark, and the mean of those that are `averaged`."""
    arrays = _arrays(models)
    found = {name: over_seeds({name: array}) for name, array in arrays.items()}
    if len(averaged) > 1 and all(name in arrays for name in averaged):
        found[AVERAGE] = over_seeds({name: arrays[name] for name in averaged})
    return {name: _score(accuracy) for name, accuracy in found.items()}


def _arrays(models: Sequence[ModelScores], problems: dict[str, list[str]] | None = None) -> dict[str, Scores]:
    """Benchmark → [seeds, problems], of the problems that all models have."""
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
    """Every variant at its last periodic evaluation within the time that the fastest took to its end: times are means
    over seeds, so that all seeds of a variant are looked at after equally many steps."""
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
    """Step that every seed has evaluated → seconds until then, mean over seeds."""
    steps = set.intersection(*({w.step for w in cell.watched} for cell in cells)) if cells else set()
    return {step: float(np.mean([w.seconds for c in cells for w in c.watched if w.step == step])) for step in steps}


def _score(accuracy: Accuracy) -> Score:
    return Score(mean=accuracy.mean, low=accuracy.low, high=accuracy.high)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _cell(score: Score | None, *, marked: bool = False) -> str:
    if score is None:
        return _MISSING
    mean = f"{100 * score.mean:.1f}"
    if score.rank is not None:
        # Plain text says it with signs, where Markdown has its own.
        mean = {1: f"**{mean}**", 2: f"*{mean}*"}[score.rank] if marked else {1: f"▲{mean}", 2: f"△{mean}"}[score.rank]
    return f"{mean} ({100 * score.low:.1f}–{100 * score.high:.1f})"


def _signed(score: Score | None) -> str:
    if score is None:
        return _MISSING
    return f"{100 * score.mean:+.1f} ({100 * score.low:+.1f} to {100 * score.high:+.1f})"


def _measured(claim: JudgedClaim) -> str:
    found = claim.difference
    if found is None:
        return _MISSING
    if claim.is_share:
        return _signed(Score(mean=found.mean, low=found.low, high=found.high)) + " points"
    interval = f"{found.low:+.3g} to {found.high:+.3g}" if claim.num_seeds > 1 else "one seed"
    return f"{found.mean:+.3g} ({interval})"


def _number(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.0f}"


def _escaped(table: Table) -> Table:
    """Without what would end a cell of a Markdown table, or be HTML: reasons quote what others wrote."""
    return replace(table, rows=[[_plain(cell) for cell in row] for row in table.rows])


def _plain(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
