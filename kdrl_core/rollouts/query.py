"""The rollouts of one or several runs, to look through: what `kdrl rollouts` and `kdrl ui` ask.

Single values come from the index of each run (index.py), texts and values per token from the step's own files, of which
only those are opened that a question needs. A run may be going on: `refresh` takes in what was published since.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from kdrl_core.errors import DamagedArtifactError, DataError, RunError
from kdrl_core.ledger import RunPaths, lock_holder
from kdrl_core.rollouts.database import Database, FileError
from kdrl_core.rollouts.filters import RolloutFilter, order_by
from kdrl_core.rollouts.index import Progress, RunIndex
from kdrl_core.rollouts.index_rows import INDEX, IndexedStep, list_means
from kdrl_core.rollouts.record import PARTS, RECORD, TIMINGS
from kdrl_core.rollouts.sources import DamagedFile, StepFiles, find_run, read_part
from kdrl_core.rollouts.steps import step_rows, steps_table
from kdrl_core.rollouts.summary import finite
from kdrl_core.rollouts.tokens import TokenReader
from kdrl_core.rollouts.views import IndexedRun, files_sql, identifier

_PAGE_COLUMNS = ("run", *(name for name in INDEX.names if name != "row"))
_KEPT_SEARCHES = 8
_Answer = TypeVar("_Answer")

__all__ = ["DamagedFile", "Page", "RolloutFilter", "RolloutStore", "RunInfo"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """A run that is open."""

    name: str
    path: Path
    stages: tuple[str, ...]
    num_steps: dict[str, int]
    """Steps with rollouts, by stage."""
    num_rollouts: int
    is_running: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Some of the rollouts that meet a filter."""

    total: int
    """How many meet it."""
    rows: list[dict[str, Any]]
    """Their single values, and `response_preview`."""


@dataclass(slots=True)
class _State:
    """What the runs had on disk at one time."""

    runs: list[IndexedRun]
    steps: list[dict[str, Any]]
    by_key: dict[tuple[str, str, int], IndexedStep]
    database: Database
    searches: "OrderedDict[tuple[Any, ...], pa.Table]"


class RolloutStore:
    """The rollouts of runs. A context manager; its methods may be called from several threads."""

    def __init__(self, roots: Sequence[Path], *, progress: Progress | None = None) -> None:
        names = _names(roots)
        self._runs = [IndexedRun(name, RunIndex(root)) for name, root in zip(names, roots, strict=True)]
        self._lock = threading.RLock()
        self._retired: list[Database] = []
        self._tokens: dict[tuple[str, str], TokenReader] = {}
        self._state = self._read(progress)

    @classmethod
    def open(cls, runs: Sequence[str | Path], *, progress: Progress | None = None) -> "RolloutStore":
        """Open runs by name (below artifacts/runs) or folder. The first time an index is made of each, which takes a
        minute for a million rollouts; `progress` is called with steps read and steps to read.

        Raises:
            RunError: there is no such run; the nearest names are given.
        """
        roots = list(dict.fromkeys(find_run(run) for run in runs))
        if not roots:
            raise RunError("no run is named; give at least one (kdrl status lists them)")
        return cls(roots, progress=progress)

    def __enter__(self) -> "RolloutStore":
        """The store itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let go of everything."""
        self.close()

    def close(self) -> None:
        """Let go of everything; the store is of no use afterwards."""
        with self._lock:
            for database in [*self._retired, self._state.database]:
                database.close()

    @property
    def damaged(self) -> list[DamagedFile]:
        """Files that are left out, and why; the rest is shown."""
        return [damaged for run in self._state.runs for damaged in run.index.damaged]

    def refresh(self, *, progress: Progress | None = None) -> bool:
        """Look for what was published since; True if there is anything new."""
        with self._lock:
            changed = [run.index.refresh(progress) for run in self._runs]
            rows = step_rows(self._runs)
            if not any(changed) and rows == self._state.steps:
                return False
            self._retired.append(self._state.database)
            self._state = self._make_state(rows)
            for database in self._retired[:-2]:  # who asked before may still be reading
                database.close()
            del self._retired[:-2]
            return True

    def runs(self) -> list[RunInfo]:
        """The runs that are open."""
        found = []
        for run in self._runs:
            steps = run.index.steps
            stages = tuple(dict.fromkeys(step.stage for step in steps))
            found.append(
                RunInfo(
                    name=run.name,
                    path=run.index.root,
                    stages=stages,
                    num_steps={stage: sum(step.stage == stage for step in steps) for stage in stages},
                    num_rollouts=sum(step.num_rows for step in steps),
                    is_running=lock_holder(RunPaths(run.index.root).lock) is not None,
                )
            )
        return found

    def steps(self, *, run: str | None = None, stage: str | None = None) -> list[dict[str, Any]]:
        """Every step in numbers (`views.STEPS`), with the stage's metrics and timings under `metrics`."""
        return [
            dict(row)
            for row in self._state.steps
            if (run is None or row["run"] == run) and (stage is None or row["stage"] == stage)
        ]

    def page(
        self,
        where: RolloutFilter | None = None,
        *,
        sort: str = "step",
        descending: bool = False,
        limit: int = 100,
        offset: int = 0,
    ) -> Page:
        """Some of the rollouts that meet `where`, sorted.

        Raises:
            DataError: there is no such column, or limit or offset is negative.
        """
        where, order = where or RolloutFilter(), order_by(sort, descending=descending)
        if limit < 0 or offset < 0:
            raise DataError(f"limit {limit} and offset {offset} must not be negative")

        def ask(state: _State) -> Page:
            condition, parameters = where.conditions()
            with state.database.cursor() as cursor:
                source = self._source(state, cursor, where)
                if where.is_everything:
                    total = sum(step.num_rows for step in state.by_key.values())
                else:
                    counted = cursor.execute(f"select count(*) from {source} where {condition}", parameters)
                    total = int(counted.fetchall()[0][0])
                columns = ", ".join(map(identifier, _PAGE_COLUMNS))
                query = f"select {columns} from {source} where {condition} {order} limit {limit} offset {offset}"
                rows = cursor.sql(query, params=parameters).to_arrow_table().to_pylist()
            return Page(total=total, rows=[{name: finite(value) for name, value in row.items()} for row in rows])

        return self._ask(ask)

    def record(self, *, run: str, stage: str, step: int, prompt_id: str, sample: int) -> dict[str, Any]:
        """One rollout in full: every column of the record, and `tokens`, the text of each token of the response, or
        None where no tokenizer is at hand.

        Raises:
            DataError: there is none.
        """
        found = self._records(run, stage, step, prompt_id, sample)
        if not found:
            raise DataError(f"run {run}, {stage} step {step}: no sample {sample} of prompt {prompt_id!r}")
        return found[0]

    def group(self, *, run: str, stage: str, step: int, prompt_id: str) -> list[dict[str, Any]]:
        """Every response to a prompt at a step in full, by sample. Raises DataError if there is none."""
        found = self._records(run, stage, step, prompt_id, None)
        if not found:
            raise DataError(f"run {run}, {stage} step {step}: no prompt {prompt_id!r}")
        return sorted(found, key=lambda record: int(record["sample"]))

    def prompt_history(self, *, run: str, prompt_id: str) -> list[dict[str, Any]]:
        """Every step in which a prompt was drawn: stage, step, num_rollouts, mean reward, lengths, KL, and how many
        responses had which verdict."""

        rows = self.aggregate(RolloutFilter(run=run, prompt_id=prompt_id), _HISTORY_SQL)
        for row in rows:
            verdicts = row.pop("verdicts")
            row["verdicts"] = {kind: verdicts.count(kind) for kind in sorted({one for one in verdicts if one})}
        return rows

    def aggregate(self, where: RolloutFilter, query: str) -> list[dict[str, Any]]:
        """Rows of our own `query` over `rows`: the index's columns of the rollouts that meet `where`."""
        condition, parameters = where.conditions()

        def ask(state: _State) -> list[dict[str, Any]]:
            with state.database.cursor() as cursor:
                rows = f"select * from {self._source(state, cursor, where)} where {condition}"
                found = cursor.sql(f"with rows as ({rows}) {query}", params=parameters)
                return [
                    {name: finite(value) for name, value in row.items()} for row in found.to_arrow_table().to_pylist()
                ]

        return self._ask(ask)

    def records(self, where: RolloutFilter, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The rollouts that meet `where` as tables of `columns` of the record, step by step; a step's files are opened
        only if such a column is in them alone."""
        for key, rows in self._matching(where):
            state = self._state
            files, indexed = self._files(state, *key)
            table = _step_table(files, indexed, columns)
            yield _completed(table.take(pa.array(rows, pa.int32())), key, _times(state, key), columns)

    def _matching(self, where: RolloutFilter) -> list[tuple[tuple[str, str, int], list[int]]]:
        """Rows that meet `where`, by run, stage and step."""
        condition, parameters = where.conditions()

        def ask(state: _State) -> list[tuple[tuple[str, str, int], list[int]]]:
            with state.database.cursor() as cursor:
                source = self._source(state, cursor, where)
                found = cursor.execute(
                    f"select run, stage, step, list(row order by row) from {source} where {condition} "
                    "group by run, stage, step order by run, stage, step",
                    parameters,
                ).fetchall()
            return [((run, stage, step), rows) for run, stage, step, rows in found]

        return self._ask(ask)

    def sql(self, query: str, *, limit: int | None = None) -> pa.Table:
        """The result of a query over the views `rollouts`, `steps` and `prompts`: its first `limit` rows, or all.

        Raises:
            DataError: it is not a single SELECT, or DuckDB refuses it; its message says why.
        """
        batches: list[pa.RecordBatch] = []
        num_rows = 0
        for batch in self.batches(query):
            batches.append(batch if limit is None else batch.slice(0, limit - num_rows))
            num_rows += len(batch)
            if limit is not None and num_rows >= limit:
                break
        return pa.Table.from_batches(batches)

    def batches(self, query: str) -> Iterator[pa.RecordBatch]:
        """As `sql`, batch by batch; the first is empty and has the schema."""
        return self._state.database.select(query)

    def _records(self, run: str, stage: str, step: int, prompt_id: str, sample: int | None) -> list[dict[str, Any]]:
        state, key = self._state, (run, stage, step)
        files, indexed = self._files(state, *key)
        table = _step_table(files, indexed, RECORD.names)
        wanted = pc.equal(table["prompt_id"], prompt_id)
        if sample is not None:
            wanted = pc.and_(wanted, pc.equal(table["sample"], sample))
        rows = _completed(table.filter(wanted), key, _times(state, key), RECORD.names).to_pylist()
        tokens = self._token_reader(_root(state, run), stage)
        return [{**row, "tokens": tokens.texts(row["token_ids"])} for row in rows]

    def _files(self, state: _State, run: str, stage: str, step: int) -> tuple[StepFiles, IndexedStep]:
        indexed = state.by_key.get((run, stage, step))
        if indexed is None:
            raise DataError(f"run {run} has no rollouts of {stage} step {step}{self._nearest(state, run, stage)}")
        folder = _root(state, run) / indexed.folder
        return StepFiles(stage=stage, step=step, folder=folder, stamps=indexed.stamps), indexed

    def _nearest(self, state: _State, run: str, stage: str) -> str:
        if run not in {one.name for one in state.runs}:
            return f"; runs that are open: {', '.join(one.name for one in state.runs)}"
        steps = [key[2] for key in state.by_key if key[:2] == (run, stage)]
        stages = sorted({key[1] for key in state.by_key if key[0] == run})
        return f"; it has steps {min(steps)} to {max(steps)}" if steps else f"; it has {', '.join(stages) or 'none'}"

    def _token_reader(self, root: Path, stage: str) -> TokenReader:
        with self._lock:
            return self._tokens.setdefault((str(root), stage), TokenReader(root, stage))

    def _source(self, state: _State, cursor: Any, where: RolloutFilter) -> str:
        """The rows that `where` is asked of: all, or those that have its text."""
        if not where.text:
            return "indexed"
        cursor.register("hits", self._search(state, where))
        return "indexed join hits using (run, stage, step, row)"

    def _search(self, state: _State, where: RolloutFilter) -> pa.Table:
        """Run, stage, step and row of the rollouts whose prompt or response has the text, at least of those steps in
        which a rollout meets the other conditions."""
        condition, parameters = where.conditions()
        assert where.text
        with state.database.cursor() as cursor:
            steps = cursor.execute(
                f"select distinct run, stage, step from indexed where {condition} order by all", parameters
            ).fetchall()
        key = (where.text.lower(), tuple(steps))
        with self._lock:
            if (kept := state.searches.get(key)) is not None:
                state.searches.move_to_end(key)
                return kept
        wanted = set(steps)
        scans = []
        for run in state.runs:
            files = [
                run.index.path(step, "rollouts")
                for step in run.index.steps
                if (run.name, step.stage, step.step) in wanted and "response" in step.bulky.get("rollouts", [])
            ]
            if files:
                scans.append(files_sql(run.name, "rollouts", ("prompt", "response"), files))
        if not scans:
            scans = [f"select * from {_NO_TEXTS}"]
        query = " union all ".join(
            f"select run, stage, step, row from ({scan}) "
            "where contains(lower(response), lower($text)) or contains(lower(prompt), lower($text))"
            for scan in scans
        )
        with state.database.cursor() as cursor:
            hits = cursor.sql(query, params={"text": where.text}).to_arrow_table()
        with self._lock:
            state.searches[key] = hits
            while len(state.searches) > _KEPT_SEARCHES:
                state.searches.popitem(last=False)
        return hits

    def _ask(self, question: Callable[[_State], _Answer]) -> _Answer:
        """Answer from the present state; once more after a refresh if a file changed below it."""
        try:
            return question(self._state)
        except FileError:
            self.refresh()
        try:
            return question(self._state)
        except FileError as error:
            problem = f"a file of the runs cannot be read: {str(error).splitlines()[0]}"
            raise DamagedArtifactError(problem, "kdrl check RUN says what mends it") from error

    def _read(self, progress: Progress | None) -> _State:
        for run in self._runs:
            run.index.refresh(progress)
        return self._make_state(step_rows(self._runs))

    def _make_state(self, rows: list[dict[str, Any]]) -> _State:
        by_key = {(run.name, *step.key): step for run in self._runs for step in run.index.steps}
        runs = [IndexedRun(run.name, run.index.snapshot()) for run in self._runs]
        return _State(runs, rows, by_key, Database(runs, partial(steps_table, rows)), OrderedDict())


_NO_TEXTS = "(select '' as run, '' as stage, 0 as step, 0 as row, '' as prompt, '' as response) where false"
_HISTORY_SQL = """
    select stage, step, count(*) as num_rollouts, avg(reward) as reward_mean, avg(length) as length_mean,
        min(length) as length_min, max(length) as length_max,
        sum(kl_sum) / nullif(sum(length) filter (kl_sum is not null), 0) as kl_mean, list(verdict) as verdicts
    from rows group by stage, step order by stage, step
"""


def _step_table(files: StepFiles, indexed: IndexedStep, columns: Sequence[str]) -> pa.Table:
    """Those of `columns` that the step's whole files have, and its ids, in the order of its rows."""
    found: dict[str, pa.ChunkedArray] = {}
    for part in PARTS:
        if part in files.stamps and part not in indexed.damaged:
            table = read_part(
                files, part, ["prompt_id", "sample", *columns, *(["entropies"] if part == "update" else [])]
            )
            if "entropies" in table.column_names:
                found["entropy_mean"] = list_means(table["entropies"])
            found = {**dict(zip(table.column_names, table.columns, strict=True)), **found}
    return pa.table(found)


def _completed(table: pa.Table, key: tuple[str, str, int], times: dict[str, Any], columns: Sequence[str]) -> pa.Table:
    """A step's rows as records: with run, stage, step and timings, and null for what is not known."""
    known = {"run": key[0], "stage": key[1], "step": key[2]}
    known |= {name: times.get(metric) for name, metric in TIMINGS.items()}
    arrays = []
    for name in columns:
        kind = RECORD.field(name).type
        if name in known:
            arrays.append(
                pa.nulls(len(table), kind) if known[name] is None else _repeated(known[name], kind, len(table))
            )
        else:
            arrays.append(table[name].cast(kind) if name in table.column_names else pa.nulls(len(table), kind))
    return pa.table(arrays, schema=pa.schema([RECORD.field(name) for name in columns]))


def _repeated(value: Any, kind: pa.DataType, count: int) -> pa.Array:
    return pa.repeat(pa.scalar(value, kind), count)


def _times(state: _State, key: tuple[str, str, int]) -> dict[str, Any]:
    """Metrics and timings of a step."""
    return next((one["metrics"] for one in state.steps if _key(one) == key), {})


def _root(state: _State, run: str) -> Path:
    return next(one.index.root for one in state.runs if one.name == run)


def _key(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["run"], row["stage"], row["step"]


def _names(roots: Sequence[Path]) -> list[str]:
    """The runs' folder names; two of one name are told apart by their parents."""
    names = [root.name for root in roots]
    return [root.name if names.count(root.name) == 1 else f"{root.parent.name}/{root.name}" for root in roots]
