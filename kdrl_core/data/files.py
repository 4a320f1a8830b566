"""Problem files → raw rows, batch by batch: Parquet, Arrow, JSON arrays, JSON Lines, CSV; JSON and CSV also with `.gz`.

A reader takes `choose`, which is told the names of the file's columns once, and says which of them to read.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from kdrl_core.data.chunk import RowFault
from kdrl_core.errors import DataError
from kdrl_core.verify.values import kind_of

BATCH_ROWS = 16_384
_MOST_CHARS = 2**27
"""Of one field of CSV; Python's own limit of 131,072 is too low for solutions."""
_MORE = "…"
"""Key of the values in a row of CSV beyond its columns."""

Choose = Callable[[Iterable[str]], list[str]]


class Raw(NamedTuple):
    """Consecutive rows as they are in the file."""

    rows: pa.RecordBatch | list[Any]
    numbers: Sequence[int]
    """Of each row in the file, from 1; in JSON Lines, of the line; in CSV with the header as row 1."""
    faults: Sequence[RowFault] = ()
    """Rows between them that cannot be read at all."""


def raw_rows(path: Path, origin: str, choose: Choose) -> Iterator[Raw]:
    """The rows of a file, whose suffix tells its kind. Raises DataError if the kind is unknown or the file damaged."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    is_zipped = suffixes[-1:] == [".gz"]
    reader = _READERS.get(suffixes[-2] if is_zipped and suffixes[1:] else "".join(suffixes[-1:]))
    if reader is None or (is_zipped and reader in (_parquet, _arrow)):
        raise DataError(
            f"{origin}: unknown kind of file; give .parquet, .arrow, .json, .jsonl or .csv (the last three also as .gz)"
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
    """The rows of a JSON array, read as a whole, or of JSON Lines, read batch by batch."""
    is_chosen = False
    with _text_file(path, origin) as file:
        for raw in _json_batches(file, origin):
            objects = [row for row in raw.rows if isinstance(row, dict)]
            if raw.faults and not objects and not is_chosen:
                raise DataError(f"{origin}: {raw.faults[0].problem}; give a JSON array of objects or JSON Lines")
            if not is_chosen and raw.rows:
                if not objects:
                    problem = f"an object is expected, found {kind_of(raw.rows[0])}"
                    raise DataError(
                        f"{origin} row {raw.numbers[0]}: {problem}; give a JSON array of objects or JSON Lines"
                    )
                choose({name for row in objects for name in row})
                is_chosen = True
            yield raw


def _json_batches(file: IO[bytes], origin: str) -> Iterator[Raw]:
    """Rows, their numbers, and a fault for each line that is not JSON. Blank lines are counted but are not rows."""
    rows: list[Any] = []
    numbers: list[int] = []
    faults: list[RowFault] = []
    position = 0
    # Split at "\n" alone: a JSON string may hold U+2028 and its like.
    for number, line in enumerate(_guarded(file, origin), start=1):
        content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        text = _decoded(content, position, origin).rstrip("\r\n")
        position += len(line)
        if not text.strip():
            continue
        if not rows and not faults and text.lstrip().startswith("["):
            items = _array_rows(text + _decoded(b"".join(_guarded(file, origin)), position, origin), origin)
            yield Raw(items, range(1, len(items) + 1))
            return
        try:
            rows.append(json.loads(text))
            numbers.append(number)
        except (ValueError, RecursionError) as error:
            faults.append(RowFault(origin=origin, row=number, field="row", problem=f"not JSON ({error})"))
        if len(rows) + len(faults) == BATCH_ROWS:
            yield Raw(rows, numbers, faults)
            rows, numbers, faults = [], [], []
    if rows or faults:
        yield Raw(rows, numbers, faults)


def _array_rows(text: str, origin: str) -> list[Any]:
    try:
        rows: list[Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin}: not JSON ({error}); give a JSON array of objects or JSON Lines") from error
    return rows


def _csv(path: Path, origin: str, choose: Choose) -> Iterator[Raw]:
    """Rows of a table with a header and commas. Rows count as in a spreadsheet: the header is row 1."""
    csv.field_size_limit(_MOST_CHARS)
    rows: list[Any] = []
    numbers: list[int] = []
    faults: list[RowFault] = []
    with _text_file(path, origin) as file:
        reader = csv.DictReader(_lines(file, origin), restkey=_MORE, strict=True)
        try:
            choose(reader.fieldnames or [])
            for number, row in enumerate(reader, start=2):
                if _MORE in row:
                    problem = f"{len(row[_MORE])} values beyond the {len(row) - 1} columns; quote values with commas"
                    faults.append(RowFault(origin=origin, row=number, field="row", problem=problem))
                else:
                    rows.append({name: value or None for name, value in row.items()})
                    numbers.append(number)
                if len(rows) + len(faults) == BATCH_ROWS:
                    yield Raw(rows, numbers, faults)
                    rows, numbers, faults = [], [], []
        except csv.Error as error:
            raise DataError(f"{origin} line {reader.line_num}: not CSV ({error}); write the file again") from error
    if rows or faults:
        yield Raw(rows, numbers, faults)


def _lines(file: IO[bytes], origin: str) -> Iterator[str]:
    position = 0
    for line in _guarded(file, origin):
        yield _decoded(line.removeprefix(b"\xef\xbb\xbf") if not position else line, position, origin)
        position += len(line)


def _text_file(path: Path, origin: str) -> IO[bytes]:
    try:
        return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]
    except OSError as error:
        raise DataError(f"{origin}: cannot be read ({error.strerror}); check the file's permissions") from error


def _guarded(file: IO[bytes], origin: str) -> Iterator[bytes]:
    try:
        yield from file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{origin}: cannot be unpacked ({error}); download or write the file again") from error
    except OSError as error:
        raise DataError(f"{origin}: cannot be read ({error.strerror}); check the file's permissions") from error


def _decoded(data: bytes, position: int, origin: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{origin}: not UTF-8 text ({error.reason} at byte {position + error.start}); save it as UTF-8"
        ) from error


_READERS: dict[str, Callable[[Path, str, Choose], Iterator[Raw]]] = {
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".json": _json,
    ".jsonl": _json,
    ".ndjson": _json,
    ".csv": _csv,
}
