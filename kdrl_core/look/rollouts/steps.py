"""The steps of runs in numbers: summaries from the index, joined with the stages' metrics."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from kdrl_core.errors import KdrlError
from kdrl_core.ledger import RunPaths
from kdrl_core.ledger.artifact import DERIVED
from kdrl_core.look.rollouts.record import TIMINGS
from kdrl_core.look.rollouts.step_summary import SUMMARY, finite
from kdrl_core.look.rollouts.views import IndexedRun
from kdrl_core.tables.schemas import read_table

_TEXT_COLUMNS = ("run", "stage")
_COUNTS = ("step", "num_rollouts", "num_groups", "num_groups_all_wrong", "num_groups_all_right")


def step_rows(runs: Sequence[IndexedRun]) -> list[dict[str, Any]]:
    """Every step with rollouts, by run, stage and step, with the stage's metrics and timings under `metrics`."""
    return [row for run in runs for row in _rows_of_run(run)]


def metrics_stamps(runs: Sequence[IndexedRun]) -> dict[Path, tuple[int, int]]:
    """Size and mtime of the files with the metrics and timings of runs."""
    stamps = {}
    for run in runs:
        for path in (path for row in DERIVED.values() for path in run.index.root.glob(row.glob)):
            with suppress(OSError):
                status = path.stat()
                stamps[path] = (status.st_size, status.st_mtime_ns)
    return stamps


def steps_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """`step_rows` as a table with a column for each metric and timing, null where a stage lacks it."""
    names = sorted({name for row in rows for name in row["metrics"]} | set(TIMINGS.values()))
    fixed = ["run", "stage", "step", *SUMMARY]
    columns = {name: pa.array([row[name] for row in rows], _kind(name)) for name in fixed}
    metrics = {name: pa.array([row["metrics"].get(name) for row in rows], pa.float64()) for name in names}
    return pa.table({**columns, **{name: metrics[name] for name in names if name not in columns}})


def _rows_of_run(run: IndexedRun) -> list[dict[str, Any]]:
    steps = [step for step in run.index.steps if step.num_rows]
    metrics = {stage: _metrics(run, stage) for stage in {step.stage for step in steps}}
    rows = []
    for step in steps:
        found = metrics[step.stage].get(step.step, {})
        summary = {name: step.summary.get(name) for name in SUMMARY}
        if found.get("entropy") is not None:
            summary["entropy"] = found["entropy"]
        rows.append({"run": run.name, "stage": step.stage, "step": step.step, **summary, "metrics": found})
    return rows


def _metrics(run: IndexedRun, stage: str) -> dict[int, dict[str, float]]:
    """Metrics and timings of a stage by step. Damaged files are skipped: they can be rebuilt at any time."""
    paths = RunPaths(run.index.root)
    found: dict[int, dict[str, float]] = {}
    for path in (paths.metrics(stage), paths.timings(stage)):
        with suppress(KdrlError, KeyError):
            for row in read_table(path).to_pylist() if path.is_file() else []:
                values = {name: finite(float(value)) for name, value in row.items() if isinstance(value, int | float)}
                values.pop("step", None)
                found.setdefault(row["step"], {}).update(values)
    return found


def _kind(name: str) -> pa.DataType:
    if name in _TEXT_COLUMNS:
        return pa.string()
    return pa.int64() if name in _COUNTS else pa.float64()
