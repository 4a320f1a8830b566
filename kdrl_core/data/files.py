"""Problem files → raw rows, batch by batch: Parquet, Arrow, JSON, JSON Lines, CSV and TSV; text also as `.gz`.

A reader takes `choose`, which is told the names of the file's columns once, and says which of them to read.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from kdrl_core.errors import DataError
from kdrl_core.verify.faults import Fault
from kdrl_core.verify.values import kind_of

BATCH_ROWS = 16_384
_MOST_CHARS = 2**27
"""Of one field of CSV; Python's own limit of 131,072 is too low for solutions."""

Choose = Callable[[Iterable[str]], list[str]]


class Raw(NamedTuple):
    """Consecutive rows as they are in the file."""

    rows: pa.RecordBatch | list[Any]
    numbers: Sequence[int]
    """Of each row in the file, from 1; in JSON Lines, of the line; in CSV with the header as row 1."""
    faults: Sequence[Fault] = ()
    """Rows between them that cannot be read at all."""


def raw_rows(path: Path, origin: str, choose: Choose) -> Iterator[Raw]:
    """The rows of a file, whose suffix tells its kind. Raises DataError if the kind is unknown or the file damaged."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    is_zipped = suffixes[-1:] == [".gz"]
    reader = _READERS.get(suffixes[-2] if is_zipped and suffixes[1:] else "".join(suffixes[-1:]))
    if reader is None or (is_zipped and reader in (_parquet, _arrow)):
        raise DataError(
            f"{origin}: unknown kind of file; give .parquet, .arrow, .json, .jsonl, .csv or .tsv (text also as .gz)"
        )
    return reader(path, origin, choose)


def _parquet(path: Path, origin: str, choose: Choose) -> Iterator[Raw]:
    try:
        with pq.ParquetFile(path) as file:
            columns = choose(file.schema_arrow.names)
            yield from _numbered(file.iter_batches(batch_size=BATCH_ROWS, columns=columns))
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{origin}: cannot be read as Parquet ({reason}); write the file again") from error


def _arrow(path: Path, origin: str, choose: Choose) -> Iterator[Raw]:
    """A stream of Arrow, as `datasets` saves it, or a file of Arrow."""
    try:
        with pa.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
            columns = choose(reader.schema.names)
            stored = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
            parts = (
                batch.select(columns).slice(start, BATCH_ROWS)
                for batch in stored
                for start in range(0, batch.num_rows, BATCH_ROWS)
            )
            yield from _numbered(parts)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{origin}: cannot be read as Arrow ({reason}); save the set again") from error


def _numbered(batches: Iterable[pa.RecordBatch]) -> Iterator[Raw]:
    first = 1
    for batch in batches:
        yield Raw(batch, range(first, first + batch.num_rows))
        first += batch.num_rows


def _json(path: Path, origin: str, choose: Choose) -> Iterator[Raw]:
    """The rows of a JSON array, parsed as a whole, or of JSON Lines, parsed line by line."""
    is_chosen = False
    with _opened(path, origin) as file:
        for raw in _batches(_json_rows(_lines(file, origin), origin)):
            if not is_chosen:
                if not (objects := [row for row in raw.rows if isinstance(row, dict)]):
                    problem = (
                        f" row {raw.numbers[0]}: an object is expected, found {kind_of(raw.rows[0])}"
                        if raw.rows
                        else f": {raw.faults[0].problem}"
                    )
                    raise DataError(f"{origin}{problem}; give a JSON array of objects or JSON Lines")
                choose({name for row in objects for name in row})
                is_chosen = True
            yield raw


def _json_rows(lines: Iterator[str], origin: str) -> Iterator[tuple[int, Any]]:
    """Number and value of each row, or its fault. Blank lines are counted but are not rows."""
    is_first = True
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if is_first and line.lstrip().startswith("["):
            try:
                yield from enumerate(json.loads(line + "".join(lines)), start=1)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{origin}: not JSON ({error}); give a JSON array of objects or JSON Lines") from error
            return
        is_first = False
        try:
            yield number, json.loads(line.rstrip("\r\n"))
        except (ValueError, RecursionError) as error:
            yield number, _row_fault(origin, number, f"not JSON ({error})")


def _csv(path: Path, origin: str, choose: Choose) -> Iterator[Raw]:
    """The rows of a table with a header. Its separator is the commonest of comma, semicolon and tab in the header."""
    csv.field_size_limit(_MOST_CHARS)
    with _opened(path, origin) as file:
        lines = _lines(file, origin)
        header = next(lines, "")
        reader = csv.reader(chain([header], lines), delimiter=max(",;\t", key=header.count), strict=True)
        try:
            names = [name.strip() for name in next(reader, [])]
            if repeated := [name for name in names if name and names.count(name) > 1]:
                raise DataError(f"{origin} has several columns '{repeated[0]}'; rename them")
            choose(names)
            yield from _batches(_csv_rows(reader, names, origin))
        except csv.Error as error:
            raise DataError(f"{origin} line {reader.line_num}: not CSV ({error}); write the file again") from error


def _csv_rows(rows: Iterable[list[str]], names: Sequence[str], origin: str) -> Iterator[tuple[int, Any]]:
    """Number and values of each row, or its fault. Rows count as in a spreadsheet: the header is row 1, blank lines
    count."""
    for number, row in enumerate(rows, start=2):
        if more := len(list(filter(None, row[len(names) :]))):
            problem = f"{more} value{'s' * (more > 1)} beyond the {len(names)} columns; quote values with separators"
            yield number, _row_fault(origin, number, problem)
        elif row:
            yield number, {name: value or None for name, value in zip(names, row, strict=False)}


def _batches(found: Iterator[tuple[int, Any]]) -> Iterator[Raw]:
    while some := list(islice(found, BATCH_ROWS)):
        rows = [(number, row) for number, row in some if not isinstance(row, Fault)]
        faults = [row for _, row in some if isinstance(row, Fault)]
        yield Raw([row for _, row in rows], [number for number, _ in rows], faults)


def _row_fault(origin: str, number: int, problem: str) -> Fault:
    return Fault(where=f"{origin} row {number}", row=number, field="row", problem=problem)


def _opened(path: Path, origin: str) -> IO[bytes]:
    try:
        return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]
    except OSError as error:
        raise DataError(f"{origin}: cannot be read ({error.strerror}); check the file's permissions") from error


def _lines(file: IO[bytes], origin: str) -> Iterator[str]:
    """The lines of a file of text without its byte order mark. They are split at "\n" alone: a JSON string may hold
    U+2028 and its like."""
    position = 0
    try:
        for line in file:
            yield (line if position else line.removeprefix(b"\xef\xbb\xbf")).decode()
            position += len(line)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{origin}: not UTF-8 text ({error.reason} at byte {position + error.start}); save it as UTF-8"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{origin}: cannot be unpacked ({error}); download or write the file again") from error
    except OSError as error:
        raise DataError(f"{origin}: cannot be read ({error.strerror}); check the file's permissions") from error


_READERS: dict[str, Callable[[Path, str, Choose], Iterator[Raw]]] = {
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".json": _json,
    ".jsonl": _json,
    ".ndjson": _json,
    ".csv": _csv,
    ".tsv": _csv,
}
