"""Problem files → one table in PROBLEM_SCHEMA. Files are Parquet, JSON arrays or JSON Lines, in any known format.

Files are read in batches, so that faults have row numbers and memory stays near the size of the result.
"""

import glob
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kdrl_core.config import DataConfig, expanded, resolve_path
from kdrl_core.data.chunk import RowFault
from kdrl_core.data.normalize import (
    Format,
    Normalized,
    check_columns,
    detect_format,
    normalize_batch,
    normalize_rows,
)
from kdrl_core.data.schema import PROBLEM_SCHEMA
from kdrl_core.errors import DataError

MALFORMED_KEY = b"kdrl.malformed_rows"
"""Key in the metadata of a table's schema: the number of rows that were dropped when it was read."""

_BATCH_ROWS = 16_384
_USED_COLUMNS = {
    *("prompt", "reward_model", "extra_info", "data_source"),
    *("problem_id", "id", "question", "problem", "answer", "source", "failures"),
}
_log = logging.getLogger(__name__)


def read_problems(data: DataConfig) -> pa.Table:
    """Read every file of `data.files` and normalise its rows.

    Returns:
        rows in PROBLEM_SCHEMA, in the order of the files; `malformed_rows(table)` is the number of dropped rows.

    Raises:
        DataError: a file is missing or of unknown kind or format, or (with data.on_error=fail) a row is malformed.
            Rows count from 1; in JSON Lines they are lines.
        RecipeError: a `builtin:` or `package:` path cannot be resolved.
    """
    tables: list[pa.Table] = []
    malformed = 0
    for batch, num_faults in iter_problems(data):
        tables.append(batch.problems)
        malformed += num_faults
    problems = pa.concat_tables(tables) if tables else PROBLEM_SCHEMA.empty_table()
    return problems.replace_schema_metadata({MALFORMED_KEY: str(malformed).encode()})


def iter_problems(data: DataConfig) -> Iterator[tuple[Normalized, int]]:
    """The rows of all files, batch by batch, each with its number of malformed rows, which are logged."""
    for path in find_files(data):
        for batch in _read_file(path, data):
            yield batch, count_faults(batch.faults, data)


def malformed_rows(table: pa.Table) -> int:
    """How many rows `read_problems` dropped when it made this table; 0 for any other table."""
    return int((table.schema.metadata or {}).get(MALFORMED_KEY, b"0"))


def count_faults(faults: list[RowFault], data: DataConfig) -> int:
    """The number of faults. Raises DataError with the first, unless data.on_error=drop."""
    if faults and data.on_error == "fail":
        raise DataError(str(faults[0]))
    if faults:
        _log.warning("dropped %d malformed rows of %s; the first: %s", len(faults), faults[0].origin, faults[0].what)
    return len(faults)


def find_files(data: DataConfig) -> list[Path]:
    """The files of `data.files`, with globs expanded in sorted order. Raises DataError if an entry matches no file."""
    files: list[Path] = []
    for entry in data.files:
        path, found = resolve_path(entry), expanded(entry)
        if path.is_dir():
            raise DataError(f"data.files: {entry} is a folder; name its files, e.g. {entry.rstrip('/')}/*.parquet")
        if not found and glob.has_magic(str(path)):
            raise DataError(f"data.files: {entry} matches no file; check the folder and the pattern")
        if not found:
            raise DataError(f"data.files: {entry} does not exist (looked at {path}); check the path")
        files += found
    return files


def _read_file(path: Path, data: DataConfig) -> Iterator[Normalized]:
    readers = {".parquet": _read_parquet, ".json": _read_json, ".jsonl": _read_json, ".ndjson": _read_json}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{_shown(path)}: unknown kind of file; give .parquet, .json or .jsonl")
    return reader(path, data)


def _read_parquet(path: Path, data: DataConfig) -> Iterator[Normalized]:
    origin = _shown(path)
    first_row = 1
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            data_format = detect_format(names, origin=origin) if data.format == "auto" else data.format
            columns = [name for name in names if name in _USED_COLUMNS]
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
                yield normalize_batch(
                    batch,
                    data_format,
                    origin=origin,
                    source=path.name,
                    first_row=first_row,
                    num_samples=data.difficulty.num_samples,
                )
                first_row += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{origin}: cannot be read as Parquet ({reason}); write the file again") from error


def _read_json(path: Path, data: DataConfig) -> Iterator[Normalized]:
    """The rows of a JSON array, read as a whole, or of JSON Lines, read batch by batch."""
    origin = _shown(path)
    data_format: Format | None = None
    try:
        batches = _json_batches(path, origin)
        for rows, numbers, faults in batches:
            if faults and not any(isinstance(row, dict) for row in rows) and data_format is None:
                raise DataError(f"{origin}: {faults[0].problem}; give a JSON array of objects or JSON Lines")
            if data_format is None and rows:
                found = {name for row in rows if isinstance(row, dict) for name in row}
                data_format = detect_format(found, origin=origin) if data.format == "auto" else data.format
                check_columns(found, data_format, origin=origin)
            if not rows:
                yield Normalized.nothing()._replace(faults=faults)
                continue
            assert data_format is not None
            batch = normalize_rows(
                rows, numbers, data_format, origin=origin, source=path.name, num_samples=data.difficulty.num_samples
            )
            yield batch._replace(faults=sorted([*faults, *batch.faults], key=lambda fault: fault.row))
    except OSError as error:
        raise DataError(f"{origin}: cannot be read ({error.strerror}); check the file's permissions") from error


def _json_batches(path: Path, origin: str) -> Iterator[tuple[list[object], list[int], list[RowFault]]]:
    """Rows, their numbers, and a fault for each line that is not JSON. Blank lines are counted but are not rows."""
    rows: list[object] = []
    numbers: list[int] = []
    faults: list[RowFault] = []
    position = 0
    with path.open("rb") as file:
        # Split at "\n" alone: a JSON string may hold U+2028 and its like.
        for number, line in enumerate(file, start=1):
            content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            text = _decoded(content, position, origin).rstrip("\r\n")
            position += len(line)
            if not text.strip():
                continue
            if not rows and not faults and text.lstrip().startswith("["):
                items = _array_rows(text + _decoded(file.read(), position, origin), origin)
                yield items, list(range(1, len(items) + 1)), []
                return
            try:
                rows.append(json.loads(text))
                numbers.append(number)
            except (ValueError, RecursionError) as error:
                faults.append(RowFault(origin=origin, row=number, field="row", problem=f"not JSON ({error})"))
            if len(rows) + len(faults) == _BATCH_ROWS:
                yield rows, numbers, faults
                rows, numbers, faults = [], [], []
    if rows or faults:
        yield rows, numbers, faults


def _decoded(data: bytes, position: int, origin: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{origin}: not UTF-8 text ({error.reason} at byte {position + error.start}); save it as UTF-8"
        ) from error


def _array_rows(text: str, origin: str) -> list[object]:
    try:
        rows: list[object] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin}: not JSON ({error}); give a JSON array of objects or JSON Lines") from error
    return rows


def _shown(path: Path) -> str:
    """The path as a user would write it: relative to the working folder if it lies below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
