"""The last stage of a sweep's cells: metrics by step, time by phase, a few responses."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from kdrl_core.config import Recipe
from kdrl_core.config.paths import read_json
from kdrl_core.errors import KdrlError
from kdrl_core.ledger import Run, adopted, is_published, open_run
from kdrl_core.look.reporting.run_report import filter_reports
from kdrl_core.look.reporting.run_summary import is_spent, sample_responses, summarize
from kdrl_core.look.sweeps.equality import differences
from kdrl_core.look.sweeps.fifths import says_something
from kdrl_core.look.sweeps.results import SweepResults
from kdrl_core.look.sweeps.state import CellState
from kdrl_core.tables.files import load_metrics

_NUM_SAMPLES = 2

Line = tuple[list[float], list[float]]
"""x and y."""


@dataclass(slots=True, kw_only=True)
class VariantDynamics:
    """One variant, means over its seeds."""

    label: str
    metrics: dict[str, Line] = field(default_factory=dict)
    """By metric; x is the step of the last stage. From all cells that have begun it, finished or not."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of the last stage by phase, from finished cells."""
    differences: list[str] = field(default_factory=list)
    """Recipe fields that differ from the first variant's."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """Rows of EVALUATION, of the first finished cell: right ones first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepDynamics:
    """All variants, and what they have in common."""

    variants: list[VariantDynamics]
    filters: dict[str, str]
    """The filter's counts by stage, from the first cell that has them."""
    environments: dict[str, list[str]]
    """Versions, as text → the runs made with them, and the parts made with them that a run took over from another."""


def read_dynamics(results: SweepResults) -> SweepDynamics:
    """Read the runs of a sweep, finished or not. Runs that cannot be read are left out; the tables name them."""
    found: dict[str, list[Run]] = {status.variant: [] for status in results.statuses}
    finished: dict[str, list[Run]] = {status.variant: [] for status in results.statuses}
    for status in results.statuses:
        if status.state is not CellState.PENDING:
            with suppress(KdrlError):
                run = open_run(status.run)
                found[status.variant].append(run)
                if status.state is CellState.FINISHED:
                    finished[status.variant].append(run)
    runs = [run for several in found.values() for run in several]
    return SweepDynamics(
        variants=[_variant(label, several, finished[label], results.recipes) for label, several in found.items()],
        filters=next((report for run in runs if (report := _filters(run))), {}),
        environments=_environments(runs),
    )


def _variant(
    label: str, runs: Sequence[Run], finished: Sequence[Run], recipes: Mapping[str, Recipe]
) -> VariantDynamics:
    dynamics = VariantDynamics(label=label)
    rows: list[list[dict[str, Any]]] = []
    spent: list[dict[str, float]] = []
    for run in runs:
        with suppress(KdrlError):
            rows.append(load_metrics(run, run.recipe.stages[-1]))
            if run in finished:
                spent.append(_phases(run, rows[-1]))
    dynamics.metrics = mean_lines(rows)
    names = dict.fromkeys(name for phases in spent for name in phases)
    dynamics.phases = {name: fmean(phases.get(name, 0.0) for phases in spent) for name in names}
    if label in recipes:
        dynamics.differences = differences(next(iter(recipes.values())), recipes[label])
    if finished:
        with suppress(KdrlError):
            dynamics.samples = sample_responses(finished[0], _NUM_SAMPLES)
    return dynamics


def mean_lines(runs: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Line]:
    """Metric → steps, and the mean over the runs that have each step. Missing and void values are left out."""
    values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for rows in runs:
        for row in rows:
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float) and says_something(row, name):
                    values[name][int(row["step"])].append(float(value))
    return {
        name: ([float(step) for step in sorted(steps)], [fmean(steps[step]) for step in sorted(steps)])
        for name, steps in values.items()
    }


def _phases(run: Run, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of the last stage by phase, including the teacher's sampling before SFT's first step."""
    totals: dict[str, float] = defaultdict(float)
    for stage in summarize(run).stages:
        if stage.stage == run.recipe.stages[-1] and stage.samples is not None:
            totals["teacher_sample"] += stage.samples["sample_s"]
            totals["verify"] += stage.samples["verify_s"]
    for row in rows:
        for name, value in row.items():
            if is_spent(name) and isinstance(value, int | float):
                totals[name.removeprefix("time/").removesuffix("_s")] += float(value)
    return {name: seconds for name, seconds in totals.items() if seconds > 0.0}


def _filters(run: Run) -> dict[str, str]:
    if not is_published(run.paths.filter_report):
        return {}
    try:
        return {stage: report.to_text() for stage, report in filter_reports(run).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}  # damaged: `kdrl check` names it


def _environments(runs: Sequence[Run]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for run in runs:
        with suppress(KdrlError, OSError, ValueError):
            manifest = read_json(run.paths.manifest)
            found[_versions(manifest)].append(run.name)
            for part in adopted(run):
                if _versions(part) != _versions(manifest):
                    found[_versions(part)].append(f"{part['what']} of {run.name} (taken over from {part['run']})")
    return dict(found)


def _versions(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in values.get("versions", {}).items())
