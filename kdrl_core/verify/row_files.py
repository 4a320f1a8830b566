"""Files of rows, JSON Lines or Parquet: read in batches, checked, and written again with their verdicts.

Everything in a file is kept: lines of JSON byte for byte, columns of Parquet with their types and metadata.
Verdicts are appended under the names and types of a step's rewards.parquet
(:data:`kdrl_core.tables.schemas.REWARDS`).
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdrl_core.errors import DataError
from kdrl_core.tables.files import verdict_columns
from kdrl_core.tables.schemas import REWARDS
from kdrl_core.types import Verdict
from kdrl_core.verify.rows import Batch, Columns
from kdrl_core.verify.values import RowError, exact_floats, kind_of

VERDICT_FIELDS = [REWARDS.field(name) for name in verdict_columns([])]
VERDICT_NAMES = frozenset(verdict_columns([]))

BATCH_ROWS = 1_024


class JsonLines:
    """One object per line. Blank lines are counted, but they are not rows and are not written again."""

    unit = "line"
    """What the file calls its rows in messages."""
    names: list[str]
    """The columns of the first batch, and any verdict column that `batches` has found since."""

    def __init__(self, path: Path) -> None:
        self.origin, self._path = str(path), path
        found: dict[str, None] = {}
        for number, line in zip(range(BATCH_ROWS), self._lines(), strict=False):
            try:
                found |= dict.fromkeys(_object(line[1]))
            except RowError as fault:
                if number == 0 and line[1].lstrip().startswith(b"["):  # a JSON array: every other message misleads
                    raise DataError(f"{self._where(line[0])}: {fault}") from fault
        self.names = list(found)
        if not found and next(self._lines(), None) is None:
            raise DataError(f"{self.origin} has no rows; give a file with at least one")

    def batches(self, columns: Columns, *, with_rows: bool) -> Iterator[Batch]:
        """All rows, in order; `with_rows` keeps them in each batch for `write`. Raises DataError if a read fails."""
        batch = Batch(rows=[])
        for number, line in self._lines():
            try:
                row = _object(line)
                batch.add(row, number, columns)
                if not VERDICT_NAMES.isdisjoint(row):  # to be replaced
                    self.names += sorted(VERDICT_NAMES & row.keys() - set(self.names))
                    line = _dump({name: value for name, value in row.items() if name not in VERDICT_NAMES})
                if with_rows:
                    batch.rows.append(line)
            except RowError as fault:
                batch.faults.append(fault.at(self._where(number), number))
            if len(batch.items) + len(batch.faults) == BATCH_ROWS:
                yield batch
                batch = Batch(rows=[])
        if batch.items or batch.faults:
            yield batch

    def write(self, path: Path, judged: Iterable[tuple[Batch, Sequence[Verdict]]]) -> None:
        """Write the rows of the batches with their verdicts to `path`."""
        with path.open("wb") as file:
            for batch, verdicts in judged:
                columns = verdict_columns(verdicts)
                for line, *values in zip(batch.rows, *columns.values(), strict=True):
                    fields = _dump(dict(zip(columns, values, strict=True)))
                    file.write(line[:-1].rstrip() + b", " + fields[1:] + b"\n")  # "{…" and "…}" become one object

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Number and content of each line that is not blank."""
        try:
            with self._path.open("rb") as file:  # split at b"\n" alone: a JSON string may hold U+2028 and its like
                for number, line in enumerate(file, start=1):
                    content = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip()
                    if content:
                        yield number, content
        except OSError as error:
            raise DataError(
                f"{self.origin} cannot be read ({error.strerror}); check the file and its permissions"
            ) from error

    def _where(self, number: int) -> str:
        return f"{self.origin} {self.unit} {number}"


class Parquet:
    """A Parquet file of any size and with any number of row groups; same methods as `JsonLines`."""

    unit = "row"

    def __init__(self, path: Path) -> None:
        self.origin, self._path = str(path), path
        with _parquet_errors(self.origin), pq.ParquetFile(path) as file:
            self._schema = file.schema_arrow
            num_rows = file.metadata.num_rows
        self.names: list[str] = self._schema.names
        if repeated := sorted({name for name in self.names if self.names.count(name) > 1}):
            raise DataError(f"{self.origin} has several columns '{repeated[0]}'; rename them")
        if not num_rows:
            raise DataError(f"{self.origin} has no rows; give a file with at least one")

    def batches(self, columns: Columns, *, with_rows: bool) -> Iterator[Batch]:
        used = list(dict.fromkeys(name if name in self.names else name.split(".")[0] for name in columns.used))
        for name in (columns.response, columns.truth):
            if name in self.names and not _may_hold(found := self._schema.field(name).type, name == columns.truth):
                raise DataError(f"{self.origin}: column '{name}' is {found}, not text; choose another or cast it")
        first = 1
        for rows in self._record_batches(None if with_rows else used):
            batch = Batch()
            values = [_python_values(rows.column(name)) for name in used]
            kept = []
            for position, row in enumerate(zip(*values, strict=True)):
                try:
                    batch.add(dict(zip(used, row, strict=True)), first + position, columns)
                    kept.append(position)
                except RowError as fault:
                    number = first + position
                    batch.faults.append(fault.at(f"{self.origin} {self.unit} {number}", number))
            first += rows.num_rows
            if with_rows:
                batch.rows = rows.take(pa.array(kept, pa.int64())) if batch.faults else rows
            yield batch

    def write(self, path: Path, judged: Iterable[tuple[Batch, Sequence[Verdict]]]) -> None:
        kept = [column for column in self._schema if column.name not in VERDICT_NAMES]
        schema = pa.schema([*kept, *VERDICT_FIELDS], metadata=self._schema.metadata)
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for batch, verdicts in judged:
                columns = verdict_columns(verdicts)
                arrays = [batch.rows.column(column.name) for column in kept]
                arrays += [pa.array(columns[column.name], column.type) for column in VERDICT_FIELDS]
                writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))

    def _record_batches(self, columns: list[str] | None) -> Iterator[Any]:
        # Buffered: otherwise a row group, which may be the whole file, is read in one piece.
        with _parquet_errors(self.origin), pq.ParquetFile(self._path, buffer_size=2**20, pre_buffer=False) as file:
            yield from file.iter_batches(batch_size=BATCH_ROWS, columns=columns)


RowFile = JsonLines | Parquet

_KINDS: dict[str, type[RowFile]] = {".jsonl": JsonLines, ".ndjson": JsonLines, ".parquet": Parquet}


def open_rows(path: Path) -> RowFile:
    """The file at `path`. Raises DataError if it does not exist, if its kind is unknown, or if it has no rows."""
    if path.is_dir():
        raise DataError(f"{path} is a folder; name a file in it")
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file; check the path")
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        raise DataError(f"{path}: unknown kind of file; give JSON Lines (.jsonl, .ndjson) or Parquet (.parquet)")
    return kind(path)


def suffixes_like(path: Path) -> tuple[str, ...]:
    """The suffixes that a file of the same format may have."""
    kind = _KINDS.get(path.suffix.lower())
    return tuple(suffix for suffix, other in _KINDS.items() if other is kind)


def _object(line: bytes) -> dict[str, object]:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 text ({error.reason} at byte {error.start} of it)") from error
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON ({error.msg.removesuffix(' at')} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise RowError(f"not JSON ({error})") from error
    if not isinstance(row, dict):
        raise RowError(f"an object is expected, found {kind_of(row)}")
    return row


def _dump(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a lone surrogate has no UTF-8, only an escape
        return json.dumps(row).encode()


def _may_hold(kind: Any, is_truth: bool) -> bool:
    """Whether columns of this type can hold responses: text or messages; or truths: text, numbers or lists of them."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return True
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return _is_text(kind) or (is_truth and is_number)


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(check(kind) for check in checks)


def _python_values(column: Any) -> list[object]:
    if pa.types.is_floating(column.type):
        column = exact_floats(column)
    try:
        values: list[object] = column.to_pylist()
        return values
    except UnicodeDecodeError:
        return [_python_value(value) for value in column]


def _python_value(value: Any) -> object:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return b""  # where text is needed, the error says "found bytes"


@contextmanager
def _parquet_errors(origin: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{origin} cannot be read as Parquet ({reason}); write the file again") from error
