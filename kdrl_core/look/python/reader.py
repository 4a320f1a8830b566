"""`kdrl.open_run`, `kdrl.runs`: what a run has recorded, as pandas DataFrames.

Files are read anew at each call, by the readers that the command line uses. So a run may be going on meanwhile. The
columns of each frame are in docs/python.md. Numbers are NumPy's, texts have pandas's own string type, values per token
are NumPy arrays. What a run does not have is NaN, NA or None.
"""

import operator
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from kdrl_core.alarms import Alarm, alarms_of, resume_command
from kdrl_core.config import Recipe, did_you_mean, load_recipe
from kdrl_core.errors import DataError, RunError
from kdrl_core.evaluation.outcome import RESPONSES
from kdrl_core.evaluation.results import read_results
from kdrl_core.ledger import Run, RunPaths, is_published, list_runs
from kdrl_core.ledger.graph import evaluated_labels, labelled_checkpoint
from kdrl_core.look.rollouts.files import record_schema
from kdrl_core.look.rollouts.query import RolloutFilter, RolloutStore
from kdrl_core.look.rollouts.record import RECORD
from kdrl_core.look.rollouts.sources import find_run, scan
from kdrl_core.look.rollouts.views import quoted
from kdrl_core.tables.files import LOOKED_AT, load_metrics, read_table

_SINGLE_VALUES = [field.name for field in RECORD if not pa.types.is_list(field.type)]
_ACCURACY: dict[str, str | None] = {
    **dict.fromkeys(["label", "stage"]),
    "step": "Int64",
    "benchmark": None,
    **dict.fromkeys(["accuracy", "low", "high", "stderr", "maj_at_k"], "float64"),
    **dict.fromkeys(["num_problems", "num_samples"], "Int64"),
    **dict.fromkeys(["length_mean", "clip_ratio"], "float64"),
}
"""Columns of `accuracy` and their types; None: text. The fields of a benchmark in results.json have these names."""
_ALARMS: dict[str, str | None] = {
    **dict.fromkeys(field.name for field in fields(Alarm)),
    "step": "int64",
    "since": "int64",
    "value": "float64",
    "threshold": "float64",
}
_RUNS = ("run", "recipe", "state", "progress", "reward", "alarms", "started", "path")


class RunReader:
    """A run, to be read: finished, going on, or imported from another trainer's dump.

    Every frame has the column `run` first, so frames of several runs can be put together with `pandas.concat`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        """The run's folder."""

    def __repr__(self) -> str:
        return f"<kdrl run {self.name!r} in {self.path}>"

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def recipe(self) -> Recipe:
        """The run's frozen recipe. Raises RunError for an imported dump, which has none."""
        return self._run.recipe

    @property
    def stages(self) -> list[str]:
        """The stages of the recipe; of an imported dump, those with rollouts."""
        if self._is_import:
            return list(dict.fromkeys(step.stage for step in scan(self.path)[0]))
        return list(self.recipe.stages)

    @property
    def student(self) -> Path:
        """The result: a Hugging Face model directory. Raises RunError if the run is not finished."""
        run = self._run
        if not is_published(run.paths.student):
            raise RunError(f"run {self.name} is not finished, so it has no student yet; {_way_on(run)}")
        return run.paths.student

    def status(self) -> dict[str, Any]:
        """How far the run is: `state`, `progress`, `reward`, `alarms`, `steps` and more, as `kdrl status --json`."""
        from kdrl_core.look.reporting.run_summary import run_status

        return run_status(self._run)

    def metrics(self, stage: str | None = None) -> pd.DataFrame:
        """One row per step: `run`, `stage`, `step`, and every metric and timing under its name in metrics.parquet and
        timings.parquet, e.g. `reward/mean` (float64; NaN where a stage lacks it)."""
        chosen, run = self._chosen(stage), self._run
        rows = [{"stage": one, **row} for one in chosen for row in load_metrics(run, one)]
        names = dict.fromkeys(name for row in rows for name in row if name not in ("stage", "step"))
        return self._frame(rows, {"stage": None, "step": "int64", **dict.fromkeys(names, "float64")})

    def alarms(self, stage: str | None = None) -> pd.DataFrame:
        """One row per alarm that was raised: `run`, and the fields of `kdrl_core.alarms.Alarm`."""
        chosen = self._chosen(stage)
        return self._frame([asdict(alarm) for alarm in alarms_of(self._run) if alarm.stage in chosen], _ALARMS)

    def rollouts(
        self,
        stage: str | None = None,
        steps: int | Iterable[int] | None = None,
        columns: Sequence[str] | None = None,
    ) -> pd.DataFrame:
        """One row per response, with what every file of its step says of it: the record of docs/inspecting.md.

        The first call on a run makes an index, which takes half a minute for a million responses. Damaged files are
        left out with a warning.

        Args:
            stage: default: every stage.
            steps: a step, several, or a range such as `range(140, 151)`; default: all.
            columns: of the record, in this order; default: all but those with values per token (`token_ids`,
                `logprobs`, …), which take a hundred times the memory.

        Raises:
            RunError: no such stage, or none of these steps has rollouts; the message says what there is.
            DataError: no such column.
        """
        names = [columns] if isinstance(columns, str) else columns
        schema = record_schema(_SINGLE_VALUES if names is None else names)
        self._chosen(stage)
        with self._store() as store:
            tables = [
                part.cast(schema)
                for low, high in _stretches(steps)
                for part in store.records(RolloutFilter(stage=stage, step_min=low, step_max=high), schema.names)
            ]
            if not tables and steps is not None:
                given = [row["step"] for row in store.steps(stage=stage)]
                there = f"its steps are {min(given)} to {max(given)}" if given else "there are none yet"
                raise RunError(f"run {self.name} has no rollouts of {stage or 'any stage'} at steps={steps}; {there}")
        return pa.concat_tables([schema.empty_table(), *tables]).to_pandas()

    def prompts(self, stage: str | None = None) -> pd.DataFrame:
        """One row per problem and stage: steps that trained on it, its rewards first and last (docs/inspecting.md)."""
        self._chosen(stage)
        condition = f"where stage = {quoted(stage)}" if stage is not None else ""
        return self.sql(f"select * from prompts {condition} order by stage, prompt_id")  # noqa: S608 (quoted)

    def sql(self, query: str) -> pd.DataFrame:
        """The result of DuckDB's SQL over the views `rollouts`, `steps` and `prompts` (docs/inspecting.md). DECIMAL and
        HUGEINT, of which sums of whole numbers are, become float64. Raises DataError if the query is not one SELECT, or
        DuckDB refuses it."""
        with self._store() as store:
            table = store.sql(query)
        for place, (name, kind) in enumerate(zip(table.schema.names, table.schema.types, strict=True)):
            if pa.types.is_decimal(kind):  # pandas would make objects of it
                table = table.set_column(place, name, table[place].cast(pa.float64()))
        return table.to_pandas()

    def accuracy(self) -> pd.DataFrame:
        """One row per evaluated model and benchmark, in [0, 1]: the student before training (`base`), its checkpoints,
        the student after each stage, the teacher. An unfinished run has those that it has evaluated so far."""
        run = self._run
        rows: list[dict[str, Any]] = []
        passes: dict[str, str | None] = {}
        for label in _evaluated(run):
            for benchmark, result in read_results(run.paths.evaluation(label))["benchmarks"].items():
                pass_at = {f"pass@{k}": value for k, value in result.get("pass_at_k", {}).items()}
                passes |= dict.fromkeys(pass_at, "float64")
                rows.append({**result, "label": label, **_model_of(run, label), "benchmark": benchmark, **pass_at})
        return self._frame(rows, {**_ACCURACY, **passes})

    def evaluation(self, label: str, benchmark: str | None = None) -> pd.DataFrame:
        """One row per response of an evaluation: question, response, verdict, reason and more.

        Args:
            label: `base`, `teacher`, a stage such as `stage2`, or a checkpoint such as `stage2-step-000040`.
            benchmark: default: all.

        Raises:
            RunError: the run has no such evaluation, or not yet.
            DataError: no such benchmark.
        """
        run = self._run
        _require_evaluated(run, label)
        table = read_table(run.paths.evaluation(label) / RESPONSES, most_bytes=LOOKED_AT)
        if benchmark is not None:
            known = pc.unique(table["benchmark"]).to_pylist()
            if benchmark not in known:
                raise DataError(
                    f"the evaluation of {label} has no benchmark {benchmark!r}{did_you_mean(benchmark, known)}; "
                    f"there are {', '.join(known)}"
                )
            table = table.filter(pc.equal(table["benchmark"], benchmark))
        frame = table.to_pandas()
        frame.insert(0, "label", label)
        frame.insert(0, "run", self.name)
        return frame

    # --- within ---

    @property
    def _is_import(self) -> bool:
        return not (self.path / "recipe.yaml").is_file()

    @property
    def _run(self) -> Run:
        if self._is_import:
            raise RunError(
                f"{self.path} has no recipe.yaml: another trainer's dump has rollouts(), prompts() and sql() only; "
                f"a run that lost the file gets it back with kdrl run --recipe RECIPE --name {self.name}"
            )
        paths = RunPaths(self.path)
        return Run(paths, load_recipe(paths.recipe))

    def _chosen(self, stage: str | None) -> list[str]:
        """`stage`, or all. Raises RunError if there is no such stage."""
        stages = self.stages
        if stage is not None and stage not in stages:
            near = did_you_mean(stage, stages)
            raise RunError(f"run {self.name} has no stage {stage!r}{near}; it has {', '.join(stages) or 'none'}")
        return stages if stage is None else [stage]

    @contextmanager
    def _store(self) -> Iterator[RolloutStore]:
        with RolloutStore([self.path]) as store:
            yield store
            for file in store.damaged:
                warnings.warn(f"left out: {file.path} {file.problem}", stacklevel=4)

    def _frame(self, rows: list[dict[str, Any]], types: dict[str, str | None]) -> pd.DataFrame:
        """Rows as a frame with the columns `run` and those of `types`."""
        frame = pd.DataFrame(rows, columns=list(types)).astype({name: kind for name, kind in types.items() if kind})
        frame.insert(0, "run", self.name)
        return frame


def open_run(name_or_path: str | Path) -> RunReader:
    """A run by its name below artifacts/runs (`$KDRL_ARTIFACTS`), or by its folder anywhere. It may be going on.

    Raises:
        RunError: there is no such run; the message gives the nearest names.
    """
    return RunReader(find_run(name_or_path))


def runs() -> pd.DataFrame:
    """The runs below artifacts/runs, oldest first: `run`, `recipe`, `state`, `progress`, `reward` (of the last step),
    `alarms` (their number), `started` (UTC) and `path`. A run that cannot be read says why in `state`."""
    from kdrl_core.look.reporting.run_summary import named_status

    rows = [named_status(name) for name in list_runs()]
    frame = pd.DataFrame([{**row, "alarms": len(row.get("alarms", ()))} for row in rows], columns=list(_RUNS))
    frame["started"] = pd.to_datetime(frame["started"], utc=True, format="ISO8601", errors="coerce")
    return frame.astype({"reward": "float64", "alarms": "int64", "started": "datetime64[us, UTC]"})


def _evaluated(run: Run) -> list[str]:
    """Labels of the published evaluations: the final ones, with each stage's checkpoints before its result."""
    found: list[str] = []
    for label in evaluated_labels(run.recipe):
        folders = sorted(run.paths.evaluation(label).parent.glob(f"{label}-step-*"))
        names = [path.name for path in folders if labelled_checkpoint(path.name) is not None]
        found += [name for name in (*names, label) if is_published(run.paths.evaluation(name))]
    return found


def _require_evaluated(run: Run, label: str) -> None:
    if label in (found := _evaluated(run)):
        return
    there = f"it has {', '.join(found) or 'none'}"
    if label in (planned := evaluated_labels(run.recipe)):
        raise RunError(f"run {run.name} has not evaluated {label} yet; {there}; {_way_on(run)}")
    raise RunError(f"run {run.name} has no evaluation {label!r}{did_you_mean(label, [*found, *planned])}; {there}")


def _model_of(run: Run, label: str) -> dict[str, Any]:
    """Stage and step of the student that a label names; None for other models."""
    if label in run.recipe.stages:
        return {"stage": label, "step": run.recipe.stage(label).steps}
    return dict(zip(("stage", "step"), labelled_checkpoint(label) or (None, None), strict=True))


def _way_on(run: Run) -> str:
    return f"to go on with it: {resume_command(run)}"


def _stretches(steps: int | Iterable[int] | None) -> list[tuple[int | None, int | None]]:
    """Steps as first and last of stretches without a gap. Raises DataError for what is not a whole number."""
    if steps is None:
        return [(None, None)]
    try:
        numbers = sorted({operator.index(one) for one in (steps if isinstance(steps, Iterable) else [steps])})
    except TypeError:
        raise DataError(f"steps={steps!r}: give a whole number, several, or a range such as range(10, 20)") from None
    stretches: list[tuple[int, int]] = []
    for number in numbers:
        first = stretches.pop()[0] if stretches and stretches[-1][1] == number - 1 else number
        stretches.append((first, number))
    return [*stretches]
