"""The files of some runs at one time, and the database over them. A state never changes: a refresh makes a new one.

The numbers of a step are its summary from the index and its metrics from the stage.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from kdrl_core.errors import DataError, KdrlError
from kdrl_core.ledger import RunPaths
from kdrl_core.ledger.artifact import DERIVED
from kdrl_core.look.rollouts.database import Database
from kdrl_core.look.rollouts.filters import RolloutFilter
from kdrl_core.look.rollouts.index_rows import SUMMARY, IndexedStep, finite
from kdrl_core.look.rollouts.record import TIMINGS
from kdrl_core.look.rollouts.sources import StepFiles
from kdrl_core.look.rollouts.views import IndexedRun, files_sql
from kdrl_core.tables.files import METRICS, read_table

Key = tuple[str, str, int]
"""Run, stage and step."""
_KEPT_SEARCHES = 8


class State:
    """The steps of some runs, by run, stage and step."""

    def __init__(self, runs: Sequence[IndexedRun]) -> None:
        self.runs = [IndexedRun(run.name, run.index.snapshot()) for run in runs]
        self.metrics_stamps = metrics_stamps(self.runs)
        """Stamps of the files with metrics and timings: like the index, a source of the numbers."""
        self.steps = step_rows(self.runs)
        """Every step in numbers."""
        self._metrics: dict[Key, dict[str, Any]] = {
            (row["run"], row["stage"], row["step"]): row["metrics"] for row in self.steps
        }
        self.database = Database(self.runs, partial(steps_table, self.steps))
        self._indexed = {(run.name, *step.key): step for run in self.runs for step in run.index.steps}
        self._searches: OrderedDict[tuple[Any, ...], pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def files(self, key: Key) -> tuple[StepFiles, IndexedStep]:
        """The files of a step, and its entry in the index. Raises DataError if there is no such step."""
        run, stage, step = key
        indexed = self._indexed.get(key)
        if indexed is None:
            raise DataError(f"run {run} has no rollouts of {stage} step {step}; {self._there_are(run, stage)}")
        return StepFiles(stage=stage, step=step, folder=self.root(run) / indexed.folder, stamps=indexed.stamps), indexed

    def root(self, run: str) -> Path:
        """The folder of a run that is open."""
        return next(one.index.root for one in self.runs if one.name == run)

    def metrics(self, key: Key) -> dict[str, Any]:
        """Metrics and timings of a step."""
        return self._metrics.get(key, {})

    def source(self, cursor: duckdb.DuckDBPyConnection, where: RolloutFilter) -> str:
        """The SQL source for `where`: the index, without rows that lack the filter's text."""
        if not where.text:
            return "indexed"
        cursor.register("hits", self._search(where))
        return "indexed join hits using (run, stage, step, row)"

    def _search(self, where: RolloutFilter) -> pa.Table:
        """Run, stage, step and row of the rollouts whose prompt or response has the text. Reads only steps in which a
        rollout meets the other conditions. The latest results are kept, for their next page."""
        condition, parameters = where.conditions()
        assert where.text
        with self.database.cursor() as cursor:
            steps: list[Key] = cursor.execute(
                f"select distinct run, stage, step from indexed where {condition} order by all", parameters
            ).fetchall()
        asked = (where.text.lower(), tuple(steps))
        with self._lock:
            if asked in self._searches:
                self._searches.move_to_end(asked)
                return self._searches[asked]
        with self.database.cursor() as cursor:
            hits = cursor.sql(self._search_sql(set(steps)), params={"text": where.text}).to_arrow_table()
        with self._lock:
            self._searches[asked] = hits
            while len(self._searches) > _KEPT_SEARCHES:
                self._searches.popitem(last=False)
        return hits

    def _search_sql(self, steps: set[Key]) -> str:
        scans = [f"select * from {_NO_TEXTS}"]
        for run in self.runs:
            found = [step for step in run.index.steps if (run.name, *step.key) in steps]
            files = [run.index.path(step, "rollouts") for step in found if "rollouts" in step.bulky]
            if files:
                scans.append(files_sql(run.name, "rollouts", ("prompt", "response"), files))
        return " union all ".join(
            f"select run, stage, step, row from ({scan}) "
            "where contains(lower(response), lower($text)) or contains(lower(prompt), lower($text))"
            for scan in scans
        )

    def _there_are(self, run: str, stage: str) -> str:
        """Runs, stages or steps that do exist, for the error about a missing step."""
        if run not in {one.name for one in self.runs}:
            return f"runs that are open: {', '.join(one.name for one in self.runs)}"
        if steps := [key[2] for key in self._indexed if key[:2] == (run, stage)]:
            return f"it has steps {min(steps)} to {max(steps)}"
        stages = sorted({key[1] for key in self._indexed if key[0] == run})
        return f"stages with rollouts: {', '.join(stages) or 'none'}"


_NO_TEXTS = "(select '' as run, '' as stage, 0 as step, 0 as row, '' as prompt, '' as response) where false"


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
            for row in read_table(path, most_bytes=METRICS).to_pylist() if path.is_file() else []:
                values = {name: finite(float(value)) for name, value in row.items() if isinstance(value, int | float)}
                values.pop("step", None)
                found.setdefault(row["step"], {}).update(values)
    return found


def _kind(name: str) -> pa.DataType:
    if name in _TEXT_COLUMNS:
        return pa.string()
    return pa.int64() if name in _COUNTS else pa.float64()
