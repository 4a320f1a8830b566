"""The files of an index (index.py): segments, which never change, and the catalog, which lists them."""

import json
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from kdrl_core.ledger import replace_file
from kdrl_core.look.rollouts.index_rows import IndexedStep
from kdrl_core.look.rollouts.record import RECORD_VERSION
from kdrl_core.look.rollouts.sources import StepFiles

CATALOG = "catalog.json"
_VERSION = f"1.{RECORD_VERSION}"
MAX_ROWS = 2**18
"""Most rows of a joined segment, so that it fits into memory easily."""
_ROWS_PER_GROUP = 2**14
_KEPT_FOR_S = 600.0
_SEGMENT = re.compile(r"segment-[0-9a-f]{16}\.parquet")
_FOLDER = re.compile(r"rollouts/stage=[A-Za-z0-9._-]+/step=\d{6,9}")
_PATIENCE_S = 300.0


@dataclass(slots=True, kw_only=True)
class Segment:
    """One file of the index."""

    file: str
    size: int
    steps: list[IndexedStep]

    @property
    def num_rows(self) -> int:
        """Rollouts in it."""
        return sum(step.num_rows for step in self.steps)


def read_catalog(folder: Path) -> list[Segment]:
    """The segments in the catalog whose files exist; none if the catalog cannot be read or has another version."""
    try:
        content = json.loads((folder / CATALOG).read_bytes())
        if content["version"] != _VERSION:
            return []
        segments = [_segment(one) for one in content["segments"]]
        return [one for one in segments if _has_size(folder / one.file, one.size)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []


def _segment(content: dict[str, Any]) -> Segment:
    """A segment from the catalog. Raises ValueError for a path outside, since the run may come from a stranger."""
    folders = [step["folder"] for step in content["steps"]]
    if not _SEGMENT.fullmatch(content["file"]) or not all(map(_FOLDER.fullmatch, folders)):
        raise ValueError("a path that leads elsewhere")
    steps = [IndexedStep(**step) for step in content["steps"]]
    for step in steps:
        step.stamps = {part: (stamp[0], stamp[1]) for part, stamp in step.stamps.items()}
    return Segment(file=content["file"], size=content["size"], steps=steps)


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def save_catalog(folder: Path, segments: Sequence[Segment]) -> None:
    """Replace the catalog."""
    content = {"version": _VERSION, "segments": [asdict(segment) for segment in segments]}
    replace_file(folder / CATALOG, json.dumps(content, separators=(",", ":")).encode())


def still_true(folder: Path, segment: Segment, found: list[StepFiles]) -> Segment | None:
    """The segment without steps that are gone or have changed; None if no step is left."""
    stamps = {step.key: step.stamps for step in found}
    kept = [step for step in segment.steps if stamps.get(step.key) == step.stamps]
    if len(kept) == len(segment.steps):
        return segment
    if not kept:
        return None
    try:
        rows = _rows(folder, segment)
    except (OSError, pa.ArrowException):
        return None
    lost = {step.key for step in segment.steps} - {step.key for step in kept}
    for stage, step in lost:
        rows = rows.filter(pc.invert(pc.and_(pc.equal(rows["stage"], stage), pc.equal(rows["step"], step))))
    return write_segment(folder, kept, rows)


def _rows(folder: Path, segment: Segment) -> pa.Table:
    return pq.ParquetFile(folder / segment.file).read()


def write_segment(folder: Path, steps: list[IndexedStep], table: pa.Table) -> Segment:
    """A new segment with these rows."""
    path = folder / f"segment-{secrets.token_hex(8)}.parquet"
    replace_file(path, lambda file: pq.write_table(table, file, compression="zstd", row_group_size=_ROWS_PER_GROUP))
    return Segment(file=path.name, size=path.stat().st_size, steps=steps)


def joined(folder: Path, segments: Sequence[Segment]) -> list[Segment]:
    """The same rows in as few segments as their greatest size allows."""
    groups: list[list[Segment]] = []
    for segment in segments:
        if groups and sum(one.num_rows for one in groups[-1]) + segment.num_rows <= MAX_ROWS:
            groups[-1].append(segment)
        else:
            groups.append([segment])
    made = []
    for group in groups:
        if len(group) == 1:
            made += group
        else:
            table = pa.concat_tables([_rows(folder, segment) for segment in group])
            made.append(write_segment(folder, [step for segment in group for step in segment.steps], table))
    return made


def sweep(folder: Path, kept: set[str]) -> None:
    """Delete segments that have not been in the catalog for a while."""
    for path in folder.glob("*segment-*.parquet*"):
        with suppress(OSError):
            if path.name not in kept and time.time() - path.stat().st_mtime > _KEPT_FOR_S:
                path.unlink()


@contextmanager
def waiting(path: Path) -> Iterator[None]:
    """Hold the lock of the index. After a long wait go on without it: at worst, steps are read twice."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=_PATIENCE_S)
    except Timeout:
        yield
        return
    try:
        yield
    finally:
        lock.release()
