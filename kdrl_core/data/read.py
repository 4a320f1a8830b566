"""Problem files → one table in PROBLEM_SCHEMA, whatever their kind and shape.

Files are read in batches, so that faults have row numbers and memory stays near the size of the result.
"""

import glob
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from kdrl_core.config import DataConfig, expanded, resolve_path
from kdrl_core.config.shapes import Shape
from kdrl_core.data.files import raw_rows
from kdrl_core.data.normalize import Normalized, normalize
from kdrl_core.data.reading import Reading
from kdrl_core.data.schema import PROBLEM_SCHEMA
from kdrl_core.data.shapes import file_shape
from kdrl_core.errors import DataError

_log = logging.getLogger(__name__)


def read_problems(data: DataConfig) -> pa.Table:
    """Read every file of `data.files` and normalise its rows. What is to be told of them goes to the log.

    Returns:
        rows in PROBLEM_SCHEMA, in the order of the files; `Reading.of(table)` is what was found beside them.

    Raises:
        DataError: a file is missing or of unknown kind or shape, or a row is malformed (with data.on_error=drop: too
            many are). Rows count from 1; in JSON Lines they are lines, in CSV the header is row 1.
        RecipeError: a `builtin:`, `package:` or `hf:` path cannot be resolved.
    """
    reading = Reading()
    tables = [batch.problems for batch in iter_problems(data, reading)]
    for line in reading.told():
        _log.warning("%s", line)
    problems = pa.concat_tables(tables) if tables else PROBLEM_SCHEMA.empty_table()
    return problems.replace_schema_metadata(reading.metadata())


def iter_problems(data: DataConfig, reading: Reading) -> Iterator[Normalized]:
    """The rows of all files, batch by batch; `reading` takes in each batch before it is given out."""
    for path in find_files(data):
        for batch in read_file(path, data):
            reading.add(batch, data)
            yield batch
    reading.finish(data)


def read_file(path: Path, data: DataConfig) -> Iterator[Normalized]:
    """The rows of one file, batch by batch, with their faults."""
    origin = shown_path(path)
    shape: Shape | None = None

    def choose(names: Iterable[str]) -> list[str]:
        nonlocal shape
        shape = file_shape(names, data, origin=origin)
        return [name for name in names if name in shape.used]

    for raw in raw_rows(path, origin, choose):
        assert shape is not None
        batch = normalize(
            raw.rows,
            raw.numbers,
            shape,
            origin=origin,
            source=path.name,
            num_samples=data.difficulty.num_samples,
        )
        yield batch._replace(faults=sorted([*raw.faults, *batch.faults], key=lambda fault: fault.row))


def find_files(data: DataConfig, *, field: str = "data.files") -> list[Path]:
    """The files of `data.files`, with globs and folders expanded in sorted order.

    Raises:
        DataError: an entry matches no file; the message calls it `field`.
    """
    files: list[Path] = []
    for entry in data.files:
        path, found = resolve_path(entry), expanded(entry)
        if not found and path.is_dir():
            raise DataError(f"{field}: {entry} is a folder; name its files, e.g. {entry.rstrip('/')}/*.parquet")
        if not found and glob.has_magic(str(path)):
            raise DataError(f"{field}: {entry} matches no file; check the folder and the pattern")
        if not found:
            raise DataError(f"{field}: {entry} does not exist (looked at {path}); check the path")
        files += found
    return files


def shown_path(path: Path) -> str:
    """The path as a user would write it: relative to the working folder if it lies below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
