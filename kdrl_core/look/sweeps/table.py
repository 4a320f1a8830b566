"""The tables of a sweep: one row per variant, mean over its seeds with 95 % interval. Unfinished cells are listed.

`SweepTable` holds the numbers and gives them as text, Markdown, CSV and JSON. aggregate.py computes them.
"""

import csv
import io
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from kdrl_core.evaluation.statistics import Accuracy
from kdrl_core.look.reporting.run_summary import Table
from kdrl_core.look.sweeps.claims import AVERAGE

_MISSING = "–"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedAccuracy(Accuracy):
    """Accuracy in [0, 1], its interval, and whether it is the best or second best of the variants."""

    rank: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One variant, or one reference model."""

    label: str
    is_reference: bool
    seeds: list[int]
    """Seeds in its numbers."""
    num_planned: int
    scores: dict[str, PlacedAccuracy]
    """By benchmark; `avg` is their mean, if there is one. Empty if no seed is finished."""
    differences: dict[str, PlacedAccuracy] = field(default_factory=dict)
    """To the first variant, over the seeds that both have: paired by problem and seed."""
    length_mean: float | None = None
    steps: float | None = None
    train_s: float | None = None
    """Seconds of the last stage, mean over seeds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedRow:
    """A variant, at the total training time of the fastest variant."""

    label: str
    seeds: list[int]
    steps: list[int]
    """The two evaluations around that time, or the one at it; empty if the time is before the first one."""
    first_step: int
    """Step of the first evaluation."""
    scores: dict[str, PlacedAccuracy]
    """Interpolated between the two; empty if there are none."""


class ClaimVerdict(StrEnum):
    """What the runs say about a claim. A difference that is expected holds; that there is none to speak of agrees."""

    HOLDS = "holds"
    AGREES = "agrees"
    DOES_NOT = "does not hold"
    UNCLEAR = "unclear"
    MISSING = "missing"


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedClaim:
    """A claim with its measured difference and its verdict."""

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
    """Seeds in the difference."""
    num_planned: int
    """Seeds that both sides will have."""
    is_share: bool
    """Whether the quantity is a share, shown in points."""

    @property
    def seeds(self) -> str:
        """`8`, or `3 of 8` where some are missing."""
        return str(self.num_seeds) if self.num_seeds == self.num_planned else f"{self.num_seeds} of {self.num_planned}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepTable:
    """The result of a sweep."""

    name: str
    description: str
    recipe: str
    benchmarks: list[str]
    averaged: list[str]
    """Benchmarks in `avg`, which needs two at least."""
    rows: list[Row]
    equal_time_s: float | None
    """Training time of every row of `timed`."""
    timed: list[TimedRow]
    cells: list[dict[str, Any]]
    """Finished cells: run, variant, seed, steps, train_s, scores (means)."""
    missing: list[dict[str, Any]]
    """Cells that are not finished: run, variant, seed, state, detail."""
    notes: list[str] = field(default_factory=list)
    """In what the rows were not trained alike: steps, learning rates."""
    claims: list[JudgedClaim] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Why → claims of a shipped list that the sweep cannot judge."""

    def to_json(self) -> dict[str, Any]:
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
        """Accuracy in training after equal time, in %."""
        names = list(dict.fromkeys(name for row in self.timed for name in row.scores))
        rows = [
            [row.label, *(_cell(row.scores.get(name)) for name in names), _between(row), str(len(row.seeds))]
            for row in self.timed
        ]
        title = f"Accuracy in training, % after {self.equal_time_s or 0.0:.3g} s of the last stage each"
        return Table(title=title, header=["variant", *names, "between steps", "seeds"], rows=rows)

    def claim_table(self) -> Table:
        rows = [
            [claim.text, claim.source, claim.expected, str(claim.verdict), claim.what, _measured(claim), claim.seeds]
            for claim in self.claims
        ]
        verdicts = [claim.verdict for claim in self.claims]
        told = ", ".join(f"{each} {verdicts.count(each)}" for each in ClaimVerdict if each in verdicts)
        return Table(
            title=f"Claims: {told} (more − less, 95 % interval, paired)",
            header=["claim", "source", "the paper says", "here", "comparison", "difference", "seeds"],
            rows=rows,
            num_text=5,
        )

    def left_out_table(self) -> Table:
        """Claims of the shipped list that are about something which this sweep does not have."""
        rows = [[why, "; ".join(texts), str(len(texts))] for why, texts in self.left_out.items()]
        total = sum(map(len, self.left_out.values()))
        return Table(
            title=f"Claims left out: {total} of {total + len(self.claims)}",
            header=["this sweep has", "claims", "number"],
            rows=rows,
            num_text=2,
        )

    def missing_table(self) -> Table:
        """The cells that are not finished, and why."""
        rows = [[one["run"], one["state"], one["detail"]] for one in self.missing]
        return Table(title="Not finished", header=["run", "state", "detail"], rows=rows, num_text=3)

    def tables(self, *, marked: bool = False) -> list[Table]:
        """The tables that have rows."""
        found = (
            self.accuracy_table(marked=marked),
            self.cost_table(),
            self.difference_table(),
            self.equal_time_table(),
            self.claim_table(),
            self.left_out_table(),
        )
        return [table for table in (*found, self.missing_table()) if table.rows]

    def to_markdown(self) -> str:
        """The whole as a Markdown document."""
        parts = [f"# {self.name}", self.description, f"Recipe: {self.recipe}."]
        parts = [part for part in parts if part]
        for number, table in enumerate(self.tables(marked=True)):
            parts += [f"## {_plain(table.title)}", _escaped(table).to_markdown()]
            parts += [_plain(note) for note in self.notes if number == 0]
        parts.append(NOTE)
        return "\n\n".join(parts) + "\n"

    def to_csv(self) -> str:
        """One line per row and benchmark, with shares instead of per cent."""
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
    "and seeds, which are crossed; `avg`: of the benchmarks that all rows have, without validation. "
    "`tokens`: mean length of the responses. `time`: training in the last stage, longer where cells ran side by side."
)


def _cell(score: PlacedAccuracy | None, *, marked: bool = False) -> str:
    if score is None:
        return _MISSING
    mean = f"{100 * score.mean:.1f}"
    if score.rank is not None:
        # Plain text has signs for this, Markdown has bold and italics.
        mean = {1: f"**{mean}**", 2: f"*{mean}*"}[score.rank] if marked else {1: f"▲{mean}", 2: f"△{mean}"}[score.rank]
    return f"{mean} ({100 * score.low:.1f}–{100 * score.high:.1f})"


def _signed(score: Accuracy | None) -> str:
    if score is None:
        return _MISSING
    return f"{100 * score.mean:+.1f} ({100 * score.low:+.1f} to {100 * score.high:+.1f})"


def _measured(claim: JudgedClaim) -> str:
    found = claim.difference
    if found is None:
        return _MISSING
    if claim.num_seeds == 1 and found.low == found.high:  # a number of one run
        return f"{100 * found.mean:+.1f} points (one seed)" if claim.is_share else f"{found.mean:+.3g} (one seed)"
    return (
        _signed(found) + " points" if claim.is_share else f"{found.mean:+.3g} ({found.low:+.3g} to {found.high:+.3g})"
    )


def _between(row: TimedRow) -> str:
    if not row.steps:
        return f"before step {row.first_step}"
    return "–".join(map(str, row.steps))


def _number(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.0f}"


def _escaped(table: Table) -> Table:
    """Escaped for Markdown, since reasons quote foreign text: no cell ends early, no HTML gets through."""
    return replace(table, rows=[[_plain(cell) for cell in row] for row in table.rows])


def _plain(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
