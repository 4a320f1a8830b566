"""The rollouts of one or several runs, for `kdrl rollouts` and `kdrl ui`.

Single values come from the index of each run (index.py). Texts and per-token values come from the step's own files; a
query opens only the files that it needs. Runs may still be training: `refresh` adds what was published since.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from kdrl_core.config.paths import why
from kdrl_core.errors import DamagedArtifactError, DataError, RunError
from kdrl_core.ledger import RunPaths, lock_holder
from kdrl_core.look.rollouts.database import FILE_ERRORS
from kdrl_core.look.rollouts.filters import Page, RolloutFilter, find_page, require_int, require_text
from kdrl_core.look.rollouts.index import Progress, RunIndex
from kdrl_core.look.rollouts.index_rows import TokenReader, as_records, finite, step_table
from kdrl_core.look.rollouts.record import RECORD
from kdrl_core.look.rollouts.segments import DamagedIndexError
from kdrl_core.look.rollouts.sources import DamagedFile, find_run
from kdrl_core.look.rollouts.state import Key, State, metrics_stamps
from kdrl_core.look.rollouts.views import IndexedRun

_TOO_MUCH = "this needs more memory than queries may use; choose fewer steps, a stage or a run, or a smaller offset"
_FAULTS = (duckdb.Error, pa.ArrowException, UnicodeDecodeError, DamagedIndexError)
"""What a query of ours may fail with if an index is damaged."""
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


class RolloutStore:
    """The rollouts of runs. A context manager; its methods may be called from several threads."""

    def __init__(self, roots: Sequence[Path], *, progress: Progress | None = None) -> None:
        names = _names(roots)
        self._runs = [IndexedRun(name, RunIndex(root)) for name, root in zip(names, roots, strict=True)]
        self._lock = threading.RLock()
        self._retired: list[State] = []
        self._tokens: dict[tuple[Path, str], TokenReader] = {}
        self._damaged_since: dict[Path, DamagedFile] = {}
        self._has_renewed = False
        for run in self._runs:
            run.index.refresh(progress)
        self._state = State(self._runs)

    @classmethod
    def open(cls, runs: Sequence[str | Path], *, progress: Progress | None = None) -> "RolloutStore":
        """Open runs by name (below artifacts/runs) or folder. The first time, an index of each is made, which takes a
        minute for a million rollouts; `progress` is called with steps read and steps to read. Raises RunError if there
        is no such run; the message gives the nearest names."""
        roots = list(dict.fromkeys(find_run(run) for run in runs))
        if not roots:
            raise RunError("no run is named; give at least one (kdrl status lists them)")
        return cls(roots, progress=progress)

    def __enter__(self) -> "RolloutStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the databases. The store cannot be used afterwards."""
        with self._lock:
            for state in [*self._retired, self._state]:
                state.database.close()

    @property
    def damaged(self) -> list[DamagedFile]:
        """Damaged files, which are left out, and why."""
        found = {damaged.path: damaged for run in self._state.runs for damaged in run.index.damaged}
        return [*(self._damaged_since | found).values()]

    def refresh(self) -> bool:
        """Add what was published since the last look. True if anything is new."""
        with self._lock:
            changed = [run.index.refresh() for run in self._runs]
            if not any(changed) and metrics_stamps(self._runs) == self._state.metrics_stamps:
                return False
            self._replace_state()
            return True

    def _replace_state(self) -> None:
        self._retired.append(self._state)
        self._state = State(self._runs)
        for old in self._retired[:-2]:  # earlier callers may still be reading the newer ones
            old.database.close()
        del self._retired[:-2]

    def runs(self) -> list[RunInfo]:
        found = []
        for run in self._state.runs:
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
        """Some of the rollouts that meet `where`, sorted. Raises DataError if there is no such column, or limit or
        offset is negative or too large."""
        where = where or RolloutFilter()
        require_int("limit", limit)
        require_int("offset", offset)

        def ask(state: State) -> Page:
            with state.database.cursor() as cursor:
                source = state.source(cursor, where)
                return find_page(cursor, source, where, sort=sort, descending=descending, limit=limit, offset=offset)

        return self._ask(ask)

    def record(self, *, run: str, stage: str, step: int, prompt_id: str, sample: int) -> dict[str, Any]:
        """One rollout in full: every column of the record, and `tokens`, the text of each token of the response (None
        without a tokenizer). Raises DataError if there is no such rollout."""
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
        """Every step that drew a prompt: stage, step, num_rollouts, mean reward, lengths, KL, and the number of
        responses by verdict."""

        rows = self.aggregate(RolloutFilter(run=run, prompt_id=prompt_id), _HISTORY_SQL)
        for row in rows:
            verdicts = row.pop("verdicts")
            row["verdicts"] = {kind: verdicts.count(kind) for kind in sorted({one for one in verdicts if one})}
        return rows

    def aggregate(self, where: RolloutFilter, query: str) -> list[dict[str, Any]]:
        """The result of `query`, our own SQL, over `rows`: the index's columns for the rollouts that meet `where`."""
        condition, parameters = where.conditions()

        def ask(state: State) -> list[dict[str, Any]]:
            with state.database.cursor() as cursor:
                rows = f"select * from {state.source(cursor, where)} where {condition}"
                found = cursor.sql(f"with rows as ({rows}) {query}", params=parameters)
                return [
                    {name: finite(value) for name, value in row.items()} for row in found.to_arrow_table().to_pylist()
                ]

        return self._ask(ask)

    def records(self, where: RolloutFilter, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The rollouts that meet `where` as tables of `columns` of the record, step by step."""
        for key, rows in self._matching(where):
            state = self._state
            table = step_table(*state.files(key), columns, self._note_damaged)
            yield as_records(table.take(pa.array(rows, pa.int32())), key, state.metrics(key), columns)

    def _matching(self, where: RolloutFilter) -> list[tuple[Key, list[int]]]:
        """Rows that meet `where`, by run, stage and step."""
        condition, parameters = where.conditions()

        def ask(state: State) -> list[tuple[Key, list[int]]]:
            with state.database.cursor() as cursor:
                source = state.source(cursor, where)
                found = cursor.execute(
                    f"select run, stage, step, list(row order by row) from {source} where {condition} "
                    "group by run, stage, step order by run, stage, step",
                    parameters,
                ).fetchall()
            return [((run, stage, step), rows) for run, stage, step, rows in found]

        return self._ask(ask)

    def sql(self, query: str, *, limit: int | None = None) -> pa.Table:
        """The result of a query over the views `rollouts`, `steps` and `prompts`: its first `limit` rows, or all.
        Raises DataError if it is not a single SELECT, or DuckDB refuses it; the message says why."""
        require_int("limit", limit)
        require_text("query", query)

        return self._ask(lambda state: _first_rows(state.database.select(query), limit))

    def _records(self, run: str, stage: str, step: int, prompt_id: str, sample: int | None) -> list[dict[str, Any]]:
        require_int("step", step)
        require_int("sample", sample)
        require_text("prompt_id", prompt_id)
        state, key = self._state, (run, stage, step)
        table = step_table(*state.files(key), RECORD.names, self._note_damaged)
        wanted = pc.equal(table["prompt_id"], prompt_id)
        if sample is not None:
            wanted = pc.and_(wanted, pc.equal(table["sample"], sample))
        rows = as_records(table.filter(wanted), key, state.metrics(key), RECORD.names).to_pylist()
        tokens = self._token_reader(state.root(run), stage)
        return [{**row, "tokens": tokens.texts(row["token_ids"])} for row in rows]

    def _note_damaged(self, file: DamagedFile) -> None:
        with self._lock:
            self._damaged_since[file.path] = file

    def _token_reader(self, root: Path, stage: str) -> TokenReader:
        with self._lock:
            return self._tokens.setdefault((root, stage), TokenReader(root, stage))

    def _ask(self, question: Callable[[State], _Answer]) -> _Answer:
        """Answer from the present state. If that fails because files have changed, try again after a refresh, then
        after making anew what is damaged of the indexes.

        Raises:
            DataError: the answer takes too much memory, or DuckDB cannot give it.
            DamagedArtifactError: a file of the runs cannot be read.
        """
        for remedy in (lambda _: self.refresh(), self._renew, None):
            state = self._state
            try:
                return state.database.interruptible(partial(question, state))
            except duckdb.OutOfMemoryException:
                raise DataError(_TOO_MUCH) from None
            except _FAULTS as error:
                if remedy is not None:
                    remedy(error)
                elif isinstance(error, FILE_ERRORS):
                    problem = f"a file of the runs cannot be read: {why(error)}"
                    raise DamagedArtifactError(problem, "kdrl check RUN says what mends it") from error
                else:
                    raise DataError(f"DuckDB cannot answer this: {why(error)}") from error
        raise AssertionError("unreachable")

    def _renew(self, error: Exception) -> None:
        """Make anew what is damaged of the indexes. If nothing is, all of them: an error that says nothing of files
        does so once only, since the question itself may be at fault."""
        with self._lock:
            fault = None if isinstance(error, DamagedIndexError) else f"a query failed ({why(error)})"
            if not self._has_renewed or isinstance(error, (DamagedIndexError, *FILE_ERRORS)):
                self._has_renewed = True
                for run in self._runs:
                    run.index.reject(fault)
                    run.index.refresh()
            self._replace_state()


_HISTORY_SQL = """
    select stage, step, count(*) as num_rollouts, avg(reward) as reward_mean, avg(length) as length_mean,
        min(length) as length_min, max(length) as length_max,
        sum(kl_sum) / nullif(sum(length) filter (kl_sum is not null), 0) as kl_mean, list(verdict) as verdicts
    from rows group by stage, step order by stage, step
"""


def _first_rows(batches: Iterator[pa.RecordBatch], limit: int | None) -> pa.Table:
    found: list[pa.RecordBatch] = []
    num_rows = 0
    for batch in batches:
        found.append(batch if limit is None else batch.slice(0, limit - num_rows))
        num_rows += len(batch)
        if limit is not None and num_rows >= limit:
            break
    return pa.Table.from_batches(found)


def _names(roots: Sequence[Path]) -> list[str]:
    """The runs' folder names. If two are the same, parent folders are added."""

    def last(root: Path, count: int) -> str:
        return "/".join(root.parts[-count:])

    def name(root: Path) -> str:
        others = [other for other in roots if other != root]
        depths = range(1, len(root.parts) + 1)
        depth = next(one for one in depths if last(root, one) not in {last(other, one) for other in others})
        return last(root, depth)

    return [name(root) for root in roots]
