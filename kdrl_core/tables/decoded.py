"""How large a Parquet file becomes in memory, from its footer, before it is read.

A few bytes of Parquet can stand for any number of values: one text of a dictionary may be in every row. So a 2 KB file
can decode to 40 GB.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdrl_core.config.small_files import open_regular
from kdrl_core.errors import DamagedArtifactError

LOOKED_AT = 2**31
"""Most bytes that a file may decode to where runs are looked at: five times those of 1,024 rollouts of 32K tokens."""
METRICS = 2**28
"""Most bytes of a stage's metrics, timings or alarms: a hundred thousand steps have less."""
READ = 2**36
"""Most bytes that any other file of a run may decode to."""
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}
_REPEATING = {"RLE_DICTIONARY", "PLAIN_DICTIONARY", "DELTA_BYTE_ARRAY"}


def open_parquet(path: Path, *, most_bytes: int = READ, columns: Collection[str] | None = None) -> pq.ParquetFile:
    """Open an ordinary file as Parquet. Raises as `decodable`; OSError if it is no ordinary file."""
    open_regular(path, most_bytes=2**63, follow_links=True).close()
    return decodable(lambda: path, most_bytes=most_bytes, columns=columns)


def decodable(source: Callable[[], Any], *, most_bytes: int, columns: Collection[str] | None = None) -> pq.ParquetFile:
    """A Parquet file whose `columns` (None: all) decode to at most `most_bytes`.

    Args:
        source: opens the file; it may be called twice.

    Raises:
        DamagedArtifactError: they decode to more.
        ArrowException: it is not Parquet.
    """
    file = pq.ParquetFile(source())
    certain, texts = _sizes(file, columns)
    if certain <= most_bytes < certain + sum(texts.values()):
        certain += _measured(source, [name for name, size in texts.items() if size], most_bytes - certain)
    if certain > most_bytes:
        file.close(force=True)
        problem = f"decodes to more than {most_bytes / 2**30:g} GiB, the most that is read"
        raise DamagedArtifactError(problem, "kdrl check RUN says what mends it")
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


def _measured(source: Callable[[], Any], names: list[str], most_bytes: int) -> int:
    """Bytes of the texts in these columns; stops counting beyond `most_bytes`. Each different text is decoded once."""
    counted = 0
    with pq.ParquetFile(source(), read_dictionary=names) as file:
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
