"""Parquet files of a run: reading and writing, columns as arrays and records, and a stage's metrics.

metrics.parquet, timings.parquet and alarms.parquet are derived from the manifests of the steps' updates. Metrics and
timings have one row per step; they are separate because a rerun reproduces metrics bit by bit, but not timings. Alarms
have one row per alarm; without alarms there is no file. All three can be rebuilt at any time, so they have no manifest
of their own; they are replaced atomically.
"""

import itertools
import logging
from array import array
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kdrl_core.config.paths import require_regular, why
from kdrl_core.errors import DamagedArtifactError, RunError
from kdrl_core.ledger import Run, manifest_of, replace_file
from kdrl_core.ledger.manifest import Kept, keep, recall, stamp_of
from kdrl_core.tables.schemas import ALARMS, SCHEMA_VERSION
from kdrl_core.types import ScoreRequest, Verdict

LOOKED_AT = 2**31
"""Most bytes that a file may decode to where runs are looked at: five times those of 1,024 rollouts of 32K tokens."""
METRICS = 2**28
"""Most bytes of a stage's metrics, timings or alarms: a hundred thousand steps have less."""
_READ = 2**36
"""Most bytes that any other file of a run may decode to."""
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}
_REPEATING = {"RLE_DICTIONARY", "PLAIN_DICTIONARY", "DELTA_BYTE_ARRAY"}
_REMEDY = "kdrl check RUN says what mends it"
_logger = logging.getLogger("kdrl")


def write_table(table: pa.Table, path: Path) -> None:
    """Write `table` as zstd Parquet; equal tables give equal bytes."""
    metadata = {**(table.schema.metadata or {}), b"kdrl.schema_version": SCHEMA_VERSION.encode()}
    pq.write_table(table.replace_schema_metadata(metadata), path, compression="zstd")


def read_table(path: Path, columns: list[str] | None = None, *, most_bytes: int = _READ) -> pa.Table:
    """Read one Parquet file, without the partition columns.

    Raises DamagedArtifactError if it is not Parquet, or decodes to more than `most_bytes`.
    """
    try:
        require_regular(path, path.stat())
        with decodable(path, most_bytes=most_bytes, columns=columns) as file:
            return file.read(columns=columns)
    except DamagedArtifactError as error:
        raise DamagedArtifactError(f"{path} {error.problem}", error.remedy) from error
    except (pa.ArrowException, OSError) as error:
        raise DamagedArtifactError(f"{path} cannot be read as Parquet: {why(error)}", _REMEDY) from error


# --- how large a file becomes in memory -------------------------------------------------------------------------------
# Its footer tells, before it is read. One text of a dictionary may be in every row, so 2 KB can decode to 40 GB.


def decodable(source: Path | pa.Buffer, *, most_bytes: int, columns: Collection[str] | None = None) -> pq.ParquetFile:
    """A Parquet file whose `columns` (None: all) decode to at most `most_bytes`.

    Raises:
        DamagedArtifactError: they decode to more.
        ArrowException: it is not Parquet.
    """
    file = pq.ParquetFile(source)
    certain, texts = _sizes(file, columns)
    if certain <= most_bytes < certain + sum(texts.values()):
        certain += _measured(source, [name for name, size in texts.items() if size], most_bytes - certain)
    if certain > most_bytes:
        file.close(force=True)
        raise DamagedArtifactError(f"decodes to more than {most_bytes / 2**30:g} GiB, the most that is read", _REMEDY)
    return file


def _sizes(file: pq.ParquetFile, columns: Collection[str] | None) -> tuple[int, dict[str, int]]:
    """Bytes that the columns take decoded; and for each column with texts that may repeat, the most that they take."""
    certain, texts = 0, dict[str, int]()
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        for index in range(group.num_columns):
            column = group.column(index)
            name, _, inner = column.path_in_schema.partition(".")
            if columns is not None and name not in columns:
                continue
            width = _WIDTHS.get(column.physical_type) or file.schema.column(index).length
            certain += column.num_values * (width or 4)
            if width:
                continue
            if not _REPEATING.intersection(column.encodings):
                certain += column.total_uncompressed_size
            elif inner:
                certain += column.num_values * column.total_uncompressed_size
            else:
                texts[name] = texts.get(name, 0) + column.num_values * column.total_uncompressed_size
    return certain, texts


def _measured(source: Path | pa.Buffer, names: list[str], most_bytes: int) -> int:
    """Bytes of the texts in these columns; stops counting beyond `most_bytes`. Each different text is decoded once."""
    counted = 0
    with pq.ParquetFile(source, read_dictionary=names) as file:
        for number in range(file.num_row_groups):
            for name in names:
                for chunk in file.read_row_group(number, [name])[name].chunks:
                    is_coded = pa.types.is_dictionary(chunk.type)
                    lengths = pc.binary_length(chunk.dictionary if is_coded else chunk)
                    used = lengths.take(chunk.indices) if is_coded else lengths
                    counted += pc.sum(used.cast(pa.int64())).as_py() or 0
                    if counted > most_bytes:
                        return counted
    return counted


# --- columns ----------------------------------------------------------------------------------------------------------
# Per-token columns become arrays, never Python objects.


def ragged(column: pa.ChunkedArray) -> list[NDArray[np.float32]]:
    """A column of lists as one float32 array [T_i] a row."""
    return [np.array(row, np.float32) for row in views(column.combine_chunks())]


def views(lists: pa.ListArray) -> list[NDArray[Any]]:
    """Each list as an array [T_i] that shares the memory of `lists`: read-only."""
    values, offsets = lists.values.to_numpy(), lists.offsets.to_numpy()
    return [values[a:b] for a, b in itertools.pairwise(offsets)]


def matrices(column: pa.ChunkedArray) -> list[NDArray[Any]]:
    """A column of lists of equally long lists as one array [T_i, K] a row, in the type of its values."""
    lists = column.combine_chunks()
    inner = lists.flatten()
    values, offsets = inner.flatten().to_numpy(), lists.offsets.to_numpy()
    offsets = offsets - offsets[0]
    table = values.reshape(len(inner), -1)
    return [np.array(table[a:b]) for a, b in itertools.pairwise(offsets)]


def from_matrices(rows: Sequence[NDArray[Any]]) -> pa.ListArray:
    """Arrays [T_i, K] as a column of lists of lists."""
    table = np.concatenate(rows)
    inner_offsets = np.arange(len(table) + 1, dtype=np.int32) * table.shape[1]
    outer_offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int32)
    inner = pa.ListArray.from_arrays(pa.array(inner_offsets), pa.array(table.reshape(-1)))
    return pa.ListArray.from_arrays(pa.array(outer_offsets), inner)


def score_requests(table: pa.Table) -> list[ScoreRequest]:
    """The sequences of a table with `prompt_token_ids` and `token_ids`. Each is an `array.array` of 4 bytes a token,
    which numpy reads without copying, and whose items are plain ints."""
    prompts, responses = (views(table[name].combine_chunks()) for name in ("prompt_token_ids", "token_ids"))
    return [
        ScoreRequest(prompt_token_ids=array("i", prompt.tobytes()), token_ids=array("i", response.tobytes()))
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def verdict_columns(verdicts: Sequence[Verdict]) -> dict[str, list[Any]]:
    """The verdicts' fields as columns; a table takes those that its schema has."""
    return {
        "reward": [v.reward for v in verdicts],
        "format_reward": [v.format_reward for v in verdicts],
        "accuracy_reward": [v.accuracy_reward for v in verdicts],
        "verdict": [v.kind.value for v in verdicts],
        "extracted": [v.extracted for v in verdicts],
        "reason": [v.reason for v in verdicts],
    }


# --- a stage's metrics ------------------------------------------------------------------------------------------------


def append_metrics(run: Run, stage: str, step: int) -> None:
    """Put the rows of a published step into the stage's metrics, timings and alarms."""
    for kind, path in _files(run, stage).items():
        found = _rows(path)
        rows = _rows_of_step(run, stage, step, kind)
        if [row for row in found if row["step"] == step] != rows:
            before, after = ([r for r in found if r["step"] < step], [r for r in found if r["step"] > step])
            _write(path, kind, [*before, *rows, *after])


def rebuild_metrics(run: Run, stage: str, *, num_steps: int) -> None:
    """Write metrics, timings and alarms anew where they differ from the manifests of the steps' updates.

    The stage has done `num_steps` steps or more. A row whose manifest is lost is kept as it is, up to the last step
    with an update. If the row is lost as well, the log says so, and the run goes on without it.
    """
    for kind, path, rows in _differing(run, stage, num_steps):
        _write(path, kind, rows)


def differing_metrics(run: Run, stage: str, *, num_steps: int) -> list[Path]:
    """The files that `rebuild_metrics` would write anew."""
    return [path for _, path, _ in _differing(run, stage, num_steps)]


def load_metrics(run: Run, stage: str) -> list[dict[str, Any]]:
    """Rows of a stage with metrics and timings joined, ascending by step; empty if nothing was trained yet."""
    metrics, timings = (_rows(path) for path in (run.paths.metrics(stage), run.paths.timings(stage)))
    by_step = {row["step"]: row for row in timings}
    return [{**row, **by_step.get(row["step"], {})} for row in metrics]


def load_alarm_rows(run: Run, stage: str) -> list[dict[str, Any]]:
    """Rows of a stage's alarms.parquet (ALARMS), ascending by step; empty if nothing was raised."""
    return _rows(run.paths.alarms(stage))


def _files(run: Run, stage: str) -> dict[str, Path]:
    """Name in the update manifests → file."""
    paths = run.paths
    return {"metrics": paths.metrics(stage), "timings": paths.timings(stage), "alarms": paths.alarms(stage)}


def _differing(run: Run, stage: str, num_steps: int) -> Iterator[tuple[str, Path, list[dict[str, Any]]]]:
    """Kind and path of files that cannot be read or differ from the manifests, with the rows that belong in them."""
    updated = [step for step in run.paths.begun_steps(stage) if run.paths.update(stage, step).is_file()]
    for kind, path in _files(run, stage).items():
        is_damaged = False
        try:
            found = _rows(path)
        except DamagedArtifactError as error:
            _logger.warning("%s", error.problem)
            found, is_damaged = [], True
        rows: list[dict[str, Any]] = []
        for step in range(max([num_steps, *(step + 1 for step in updated)])):
            known = _rows_or_none(run, stage, step, kind)
            here = [row for row in found if row["step"] == step] if known is None else known
            rows += here
            if not here and known is None and step < num_steps and kind != "alarms":
                _logger.warning("%s step %d: its %s are lost, with the manifest of its update", stage, step, kind)
        if is_damaged or found != rows:
            yield kind, path, rows


def _rows_or_none(run: Run, stage: str, step: int, kind: str) -> list[dict[str, Any]] | None:
    with suppress(RunError):
        return _rows_of_step(run, stage, step, kind)
    return None


def _write(path: Path, kind: str, rows: list[dict[str, Any]]) -> None:
    if not rows:
        path.unlink(missing_ok=True)
        return
    if kind == "alarms":
        table = pa.Table.from_pylist(rows, schema=ALARMS)
    else:  # a part of a reward function is a metric of those steps only in which a response has it
        names = dict.fromkeys(name for row in rows for name in row)
        table = pa.table({name: [row.get(name) for row in rows] for name in names})
    sink = pa.BufferOutputStream()
    write_table(table, sink)
    replace_file(path, sink.getvalue().to_pybytes())
    keep(Kept.DERIVED, path, stamp_of(path), _rows_in(table))


def _rows_in(table: pa.Table) -> list[dict[str, Any]]:
    """The rows of metrics or timings without the columns that a step lacks; those of alarms as they are."""
    rows: list[dict[str, Any]] = table.to_pylist()
    if table.column_names == ALARMS.names:
        return rows
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def _rows_of_step(run: Run, stage: str, step: int, kind: str) -> list[dict[str, Any]]:
    """One row of metrics or timings, or one per alarm; updates of earlier versions have no alarms."""
    metadata = manifest_of(run.paths.update(stage, step)).metadata
    if kind == "alarms":
        return [{"step": step, **alarm} for alarm in metadata.get("alarms", [])]
    return [{"step": step, **metadata[kind]}]


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file. If this process holds the run's lock, it reads them again only after the file has changed."""
    if (stamp := stamp_of(path)) is None:
        return []
    rows: list[dict[str, Any]] | None = recall(Kept.DERIVED, path, stamp)
    if rows is None:
        table = read_table(path, most_bytes=METRICS)
        if "step" not in table.column_names:
            raise DamagedArtifactError(f"{path} has no column step", "kdrl resume writes it anew")
        rows = _rows_in(table)
        keep(Kept.DERIVED, path, stamp, rows)
    return [dict(row) for row in rows]
