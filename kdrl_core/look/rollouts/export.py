"""Export of rollouts to one file: records (record.py) as Parquet, JSON lines or CSV, step by step.

Every source file is compared with its manifest. Parquet keeps the schema with the descriptions of its fields. In CSV,
lists are written as JSON.
"""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdrl_core.config import did_you_mean
from kdrl_core.errors import DataError
from kdrl_core.ledger import replace_file
from kdrl_core.look.rollouts.filters import RolloutFilter
from kdrl_core.look.rollouts.query import RolloutStore
from kdrl_core.look.rollouts.record import RECORD

SUFFIXES = (".parquet", ".jsonl", ".csv")


def export_rollouts(
    store: RolloutStore,
    where: RolloutFilter,
    path: Path,
    *,
    columns: Sequence[str] | None = None,
    limit: int | None = None,
    on_step: Callable[[int], None] = lambda rows: None,
) -> int:
    """Write the first `limit` rollouts that meet `where` to `path`, in the format of its suffix, sorted by run, stage,
    step and row; `columns` of the record, None: all. The file appears only once it is complete. Returns the number of
    rollouts; `on_step` is called with the number so far.

    Raises DataError for an unknown column or suffix; StorageError if the file cannot be written.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: rollouts are exported as {', '.join(SUFFIXES)}; give a name with one of these")
    schema = record_schema(columns)
    counted = 0

    def counting() -> Iterator[pa.Table]:
        nonlocal counted
        for table in store.records(where, schema.names):
            part = table if limit is None else table.slice(0, limit - counted)
            counted += len(part)
            on_step(counted)
            yield part.cast(schema)
            if limit is not None and counted >= limit:
                return

    replace_file(path, lambda file: _WRITERS[path.suffix](file, schema, counting()))
    return counted


def record_schema(columns: Sequence[str] | None) -> pa.Schema:
    """The record's schema, or the schema of `columns`, in their order."""
    for name in columns or ():
        if name not in RECORD.names:
            raise DataError(
                f"no column {name!r}{did_you_mean(name, RECORD.names)}; there are {', '.join(RECORD.names)}"
            )
    names = RECORD.names if columns is None else list(dict.fromkeys(columns))
    return pa.schema([RECORD.field(name) for name in names], metadata=RECORD.metadata)


def _write_parquet(path: Path, schema: pa.Schema, tables: Iterator[pa.Table]) -> None:
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)


def _write_jsonl(path: Path, schema: pa.Schema, tables: Iterator[pa.Table]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for table in tables:
            for row in table.to_pylist():
                file.write(json.dumps(row) + "\n")


def _write_csv(path: Path, schema: pa.Schema, tables: Iterator[pa.Table]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(schema.names)
        for table in tables:
            for row in table.to_pylist():
                writer.writerow([json.dumps(value) if isinstance(value, list) else value for value in row.values()])


_WRITERS: dict[str, Callable[[Path, pa.Schema, Iterator[pa.Table]], Any]] = {
    ".parquet": _write_parquet,
    ".jsonl": _write_jsonl,
    ".csv": _write_csv,
}
