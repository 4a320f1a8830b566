"""The files of an index: segments with rows, and the catalog that lists them. All have checksums.

The catalog holds a SHA-256 of its content, and the CRC-32 of each segment. Reading a catalog compares the former. A
segment is compared once in a process before its rows are used, and again whenever its file has changed.
"""

import hashlib
import json
import re
import secrets
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kdrl_core.config.paths import open_regular, read_small, why
from kdrl_core.errors import DamagedArtifactError
from kdrl_core.ledger import replace_file
from kdrl_core.look.rollouts.index_rows import IndexedStep
from kdrl_core.look.rollouts.record import RECORD_VERSION
from kdrl_core.tables.files import LOOKED_AT, decodable

CATALOG = "catalog.json"
_VERSION = f"2.{RECORD_VERSION}"
_FORMAT = re.compile(rb'\{"version":"([^"]{1,16})","sha256":"([0-9a-f]{64})","segments":(.*)\}', re.DOTALL)
_WITHOUT_CHECKSUM = b'{"version":"1.'
_MAX_CATALOG_BYTES = 2**29
_MAX_SEGMENT_BYTES = 2**32
_ROWS_PER_GROUP = 2**14
_PIECE = 2**22
_SEGMENT = re.compile(r"segment-[0-9a-f]{16}\.parquet")
_FOLDER = re.compile(r"rollouts/stage=[A-Za-z0-9._-]+/step=\d{6,9}")


class DamagedIndexError(DamagedArtifactError):
    """A file of an index is not as it was written. The index is then made anew, so users see it only as a warning."""

    def __init__(self, problem: str, remedy: str = "delete the folder .index of the run") -> None:
        super().__init__(problem, remedy)


@dataclass(slots=True, kw_only=True)
class Segment:
    """One file of the index."""

    file: str
    size: int
    crc32: int
    num_bytes: int
    """Of its rows in memory."""
    steps: list[IndexedStep]

    @property
    def num_rows(self) -> int:
        """Rollouts in it."""
        return sum(step.num_rows for step in self.steps)


def read_catalog(folder: Path) -> tuple[list[Segment], list[str]]:
    """The segments in the catalog of `folder` whose files exist, and what is damaged. A catalog of another version is
    not damaged, but lists nothing."""
    try:
        content = read_small(folder / CATALOG, most_bytes=_MAX_CATALOG_BYTES)
        found = _FORMAT.fullmatch(content)
        if found is None or found[2].decode() != _checksum(found[1], found[3]):
            is_older = content.startswith(_WITHOUT_CHECKSUM)
            return [], [] if is_older else [f"{CATALOG} is not as it was written"]
        if found[1].decode() != _VERSION:
            return [], []
        listed = [_segment(one) for one in json.loads(found[3])]
    except (FileNotFoundError, NotADirectoryError):
        return [], []
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return [], [f"{CATALOG} cannot be read ({why(error)})"]
    kept = [one for one in listed if _has_size(folder / one.file, one.size)]
    return kept, [f"{one.file} is missing or has another size" for one in listed if one not in kept]


def _checksum(version: bytes, segments: bytes) -> str:
    return hashlib.sha256(version + b"\n" + segments).hexdigest()


def _segment(content: dict[str, Any]) -> Segment:
    """A segment from the catalog. Raises ValueError for a path outside the run, which may come from a stranger."""
    folders = [step["folder"] for step in content["steps"]]
    if not _SEGMENT.fullmatch(content["file"]) or not all(map(_FOLDER.fullmatch, folders)):
        raise ValueError("a path that leads elsewhere")
    steps = [IndexedStep(**step) for step in content["steps"]]
    for step in steps:
        step.stamps = {part: (stamp[0], stamp[1]) for part, stamp in step.stamps.items()}
    return Segment(**{**content, "steps": steps})


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def save_catalog(folder: Path, segments: Sequence[Segment]) -> None:
    version = _VERSION.encode()
    listed = json.dumps([asdict(segment) for segment in segments], separators=(",", ":")).encode()
    head = b'{"version":"%s","sha256":"%s","segments":' % (version, _checksum(version, listed).encode())
    replace_file(folder / CATALOG, head + listed + b"}")


def write_segment(folder: Path, steps: list[IndexedStep], table: pa.Table) -> Segment:
    """A new segment with these rows."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=_ROWS_PER_GROUP)
    content = sink.getvalue().to_pybytes()
    path = folder / f"segment-{secrets.token_hex(8)}.parquet"
    replace_file(path, content)
    crc32 = zlib.crc32(content)
    return Segment(file=path.name, size=len(content), crc32=crc32, num_bytes=table.nbytes, steps=steps)


def read_segment(folder: Path, segment: Segment) -> pa.Table:
    """The rows of a segment. Raises DamagedIndexError if it is not as it was written."""
    check_segment(folder, segment)
    try:
        return decodable(folder / segment.file, most_bytes=LOOKED_AT).read()
    except (OSError, pa.ArrowException, DamagedArtifactError) as error:
        raise _damaged(segment) from error


def check_segment(folder: Path, segment: Segment) -> None:
    """Raise DamagedIndexError if a segment is not as it was written."""
    found = 0
    try:
        with open_regular(folder / segment.file, most_bytes=_MAX_SEGMENT_BYTES) as file:
            while piece := file.read(_PIECE):
                found = zlib.crc32(piece, found)
    except OSError as error:
        raise _damaged(segment) from error
    if found != segment.crc32:
        raise _damaged(segment)


def _damaged(segment: Segment) -> DamagedIndexError:
    return DamagedIndexError(f"{segment.file} is not as it was written")
