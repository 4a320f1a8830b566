"""DuckDB over the files of runs, confined: it reads those files, and neither reads nor writes anything else.

A database is made for one state of the runs and never changes; when steps are added, a new one replaces it. Four limits
hold for a user's query. Each of them alone stops the known attacks:

* one SELECT statement in a read-only transaction;
* no file system and no network, except the listed files of the runs (`enable_external_access`);
* no extensions, and no Python objects of this process;
* a locked configuration.
"""

import json
import os
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import duckdb
import pyarrow as pa

from kdrl_core.errors import DataError
from kdrl_core.look.rollouts import views
from kdrl_core.look.rollouts.index_rows import INDEX
from kdrl_core.look.rollouts.record import PARTS, TIMINGS
from kdrl_core.look.rollouts.views import TIMES, IndexedRun, identifier, quoted

_MEMORY = "512MB"
"""Memory limit of DuckDB. A query that needs more spills to disk."""
_SPILL = "32GB"
"""What queries may spill. DuckDB's default would leave a tenth of the free disk."""
_CONFINED: dict[str, str | bool | int | float | list[str]] = {
    "autoload_known_extensions": False,
    "autoinstall_known_extensions": False,
    "allow_community_extensions": False,
    "python_enable_replacements": False,
    "enable_external_file_cache": False,
    "preserve_insertion_order": False,
    "memory_limit": _MEMORY,
    "max_temp_directory_size": _SPILL,
}
_AT_ONCE_BYTES = 2**32
"""Address space that a user's query may take beyond what the process has. DuckDB's own limit leaves out the values of
one expression, so `list_sum(range(3000000000))` would take 34 GB."""
_PER_CORE_BYTES = 2**27
"""Address space that the threads of a query reserve."""
_TOO_MUCH = (
    f"the query needs more memory than queries may use ({_MEMORY}, {_SPILL} on disk, {_AT_ONCE_BYTES / 2**30:.0f} GiB "
    "in one piece); ask for less at once: fewer steps, columns or rows, no list of all values"
)
_INTERRUPTED_WITHIN_S = 5.0
_Result = TypeVar("_Result")
FILE_ERRORS = (
    duckdb.IOException,
    duckdb.InvalidInputException,
    duckdb.SerializationException,
    duckdb.PermissionException,
)
"""What DuckDB raises if a file has changed or is missing (PermissionException: it may not look for it elsewhere)."""


class Database:
    """The views over one state of some runs. Every use takes a cursor of its own, so threads may share it."""

    def __init__(self, runs: Sequence[IndexedRun], step_rows: Callable[[], pa.Table]) -> None:
        self._runs = runs
        self._step_rows = cache(step_rows)
        self._lock = threading.Lock()
        self._index: duckdb.DuckDBPyConnection | None = None
        self._spill = tempfile.TemporaryDirectory(prefix="kdrl-query-")
        self._cursors: list[duckdb.DuckDBPyConnection] = []
        """Those that answer a query now."""
        self._planner: duckdb.DuckDBPyConnection | None = None
        self._by_parts: dict[frozenset[str], duckdb.DuckDBPyConnection] = {}

    @contextmanager
    def cursor(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A connection with the view `indexed` only, for our own queries. Raises DamagedIndexError."""
        self._require_intact()
        with self._lock:
            if self._index is None:
                self._index = self._open()
        with self._cursor_of(self._index) as cursor:
            yield cursor

    def select(self, query: str) -> Iterator[pa.RecordBatch]:
        """The result of a user's query, batch by batch; the first has the schema if there are no rows.

        Raises:
            DataError: the query is not one SELECT, or DuckDB cannot answer it; the message says why.
            FILE_ERRORS: a file changed since the runs were looked at.
            DamagedIndexError: an index is damaged.
        """
        self._require_intact()
        with self._told(), limited_memory():
            self._require_select(query)
            with self._lock:
                parts = frozenset(self._parts_of(query))
                if parts not in self._by_parts:
                    self._by_parts[parts] = self._open_views(parts)
            with self._read_only(self._by_parts[parts]) as cursor:
                reader = cursor.sql(query).to_arrow_reader(10_000)
                yield pa.RecordBatch.from_pylist([], schema=reader.schema)
                yield from reader

    def interruptible(self, work: Callable[[], _Result]) -> _Result:
        """The result of `work`, which queries this database. Ctrl-C interrupts it at once: in the main thread DuckDB
        would notice it only at the end, and make an error of it."""
        if threading.current_thread() is not threading.main_thread():
            return work()
        future: Future[_Result] = Future()

        def answer() -> None:
            try:
                future.set_result(work())
            except BaseException as error:  # raised again where the result is asked for
                future.set_exception(error)

        threading.Thread(target=answer, name="kdrl-query", daemon=True).start()
        try:
            return future.result()
        except KeyboardInterrupt:
            give_up = time.monotonic() + _INTERRUPTED_WITHIN_S
            while not future.done() and time.monotonic() < give_up:
                self._interrupt()
                wait([future], timeout=0.05)
            raise

    def _interrupt(self) -> None:
        for cursor in [*self._cursors]:
            with suppress(duckdb.Error):  # closed meanwhile
                cursor.interrupt()

    def close(self) -> None:
        """Interrupt all queries, close all connections, and delete spilled data."""
        self._interrupt()
        for connection in (self._index, self._planner, *self._by_parts.values()):
            if connection is not None:
                connection.close()
        self._spill.cleanup()

    def _require_intact(self) -> None:
        for run in self._runs:
            run.index.require_intact()

    def _open(self) -> duckdb.DuckDBPyConnection:
        """A new database that can read only the runs' files."""
        connection = duckdb.connect(":memory:", config={**_CONFINED, "temp_directory": self._spill.name})
        connection.execute(f"set allowed_paths = [{', '.join(map(quoted, self._files()))}]")
        connection.execute("set enable_external_access = false")
        connection.execute("set lock_configuration = true")
        connection.execute(f"create view indexed as {views.index_sql(self._runs)}")
        return connection

    def _open_views(self, parts: frozenset[str]) -> duckdb.DuckDBPyConnection:
        """The views for users, with the bulky columns of `parts`; the others are null."""
        connection = self._open()
        _add_steps(connection, self._step_rows())
        for part in sorted(parts - {TIMES}):
            connection.execute(f"create view {part}_part as {views.part_sql(self._runs, part)}")
        for statement in views.user_views(parts):
            connection.execute(statement)
        return connection

    def _files(self) -> list[Path]:
        """All files that may be read."""
        files = [file for run in self._runs for file in run.index.files]
        for run in self._runs:
            files += [run.index.path(step, part) for step in run.index.steps for part in step.bulky]
        return files

    @contextmanager
    def _cursor_of(self, connection: duckdb.DuckDBPyConnection) -> Iterator[duckdb.DuckDBPyConnection]:
        """A cursor that can be interrupted."""
        with connection.cursor() as cursor:
            self._cursors.append(cursor)
            try:
                yield cursor
            finally:
                self._cursors.remove(cursor)

    @contextmanager
    def _read_only(self, connection: duckdb.DuckDBPyConnection) -> Iterator[duckdb.DuckDBPyConnection]:
        """A cursor within a transaction that cannot write."""
        with self._cursor_of(connection) as cursor:
            cursor.execute("begin transaction read only")
            try:
                yield cursor
            finally:
                with suppress(duckdb.Error):
                    cursor.execute("rollback")

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn DuckDB's errors into DataErrors with the same message, except errors about the runs' own files."""
        try:
            yield
        except (duckdb.OutOfMemoryException, MemoryError):
            raise DataError(_TOO_MUCH) from None
        except duckdb.CatalogException as error:
            raise DataError(f"the query failed: {error}\nThe views are rollouts, steps and prompts") from None
        except (duckdb.Error, pa.ArrowException, OSError) as error:  # the latter two while results are fetched
            if str(error).startswith("Out of Memory"):
                raise DataError(_TOO_MUCH) from None
            if isinstance(error, (*FILE_ERRORS, OSError)) and any(str(file) in str(error) for file in self._files()):
                raise duckdb.IOException(str(error)) from error
            raise DataError(f"the query failed: {error}") from None

    def _require_select(self, query: str) -> None:
        statements = self._plans().extract_statements(query)
        if len(statements) != 1:
            raise DataError(f"one query at a time, not {len(statements)}: give one SELECT")
        if statements[0].type != duckdb.StatementType.SELECT:
            kind = statements[0].type.name
            raise DataError(
                f"{kind} is not possible here, since rollouts are only read: give a SELECT, WITH, FROM, DESCRIBE or "
                "SUMMARIZE; to write rollouts to a file: kdrl rollouts export"
            )

    def _parts_of(self, query: str) -> set[str]:
        """The parts whose bulky columns the query needs: those that DuckDB's plan reads."""
        try:
            with self._read_only(self._plans()) as cursor:
                plan = cursor.execute(f"explain (format json) {query}").fetchall()[0][1]
        except duckdb.Error:
            with self._read_only(self._plans()) as cursor:
                cursor.execute(query).fetchall()  # fails too, with a message about the query alone
            raise
        return set(_bulky_scans(json.loads(plan)))

    def _plans(self) -> duckdb.DuckDBPyConnection:
        """The same views over tables of one row: they give the plan of a query without reading a file."""
        if self._planner is None:
            planner = duckdb.connect(":memory:", config=_CONFINED)
            _add_steps(planner, self._step_rows().slice(0, 1))
            planner.execute(f"create table indexed as {views.null_row(INDEX.names)}")
            for part in views.BULKY_PARTS:
                names = ["stage", "step", "row", *PARTS[part]]
                planner.execute(f"create table {part}_part as {views.null_row(names)}")
            for statement in views.user_views([*views.BULKY_PARTS, TIMES]):
                planner.execute(statement)
            optimizers = [name for (name,) in planner.execute("from duckdb_optimizers()").fetchall()]
            unused = ",".join(name for name in optimizers if name != "unused_columns")
            planner.execute(f"set disabled_optimizers = {quoted(unused)}")  # others would rely on these rows' values
            planner.execute("set enable_external_access = false; set lock_configuration = true")
            self._planner = planner
        return self._planner


_limits = threading.Lock()
_limited: list[tuple[int, int]] = []
"""One entry for each query that runs: the limits before the first."""


@contextmanager
def limited_memory() -> Iterator[None]:
    """Limit the address space of this process while a user's query runs. Does nothing where the system cannot."""
    with _limits:
        before = _limited[0] if _limited else resource.getrlimit(resource.RLIMIT_AS)
        if not _limited:
            with suppress(OSError, ValueError):
                pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
                most = pages * resource.getpagesize() + _AT_ONCE_BYTES + _PER_CORE_BYTES * (os.cpu_count() or 1)
                if before[0] == resource.RLIM_INFINITY or most < before[0]:
                    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
        _limited.append(before)
    try:
        yield
    finally:
        with _limits:
            _limited.pop()
            if not _limited:
                with suppress(OSError, ValueError):
                    resource.setrlimit(resource.RLIMIT_AS, before)


def _add_steps(connection: duckdb.DuckDBPyConnection, step_rows: pa.Table) -> None:
    connection.register("given_steps", step_rows)
    connection.execute("create table step_rows as select * from given_steps")
    connection.unregister("given_steps")
    times = ", ".join(map(identifier, TIMINGS.values()))
    connection.execute(
        f"create table {TIMES}_part as select run as s_run, stage as s_stage, step as s_step, {times} from step_rows"
    )


_NEEDED_FOR = {**{part: {*PARTS[part]} for part in views.BULKY_PARTS}, TIMES: {*TIMINGS.values()}}
"""Part → its columns; it is joined only if a query needs one of them."""


def _bulky_scans(node: Any) -> Iterator[str]:
    """The parts from which a plan reads more than the keys."""
    if isinstance(node, list):
        for each in node:
            yield from _bulky_scans(each)
        return
    extra = node.get("extra_info", {})
    table = str(extra.get("Table", "")).rpartition(".")[2]
    part = table.removesuffix("_part")
    if table != part and part in _NEEDED_FOR:
        projected = extra.get("Projections", [])
        named = [projected] if isinstance(projected, str) else projected
        if {name.strip('"') for name in named} & _NEEDED_FOR[part]:
            yield part
    for child in node.get("children", []):
        yield from _bulky_scans(child)
