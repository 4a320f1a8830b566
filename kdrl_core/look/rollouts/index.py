"""The index of a run's rollouts: their single values in a few large Parquet files instead of thousands of small ones.

It is derived, and not a part of the run: you may delete it at any time, and it is made again. It lies in the run's
hidden folder `.index`, which the ledger ignores, or in the user's cache if the run is read-only.

    catalog.json            the segments; for every step the sizes and times of its files, its damage, its summary
    segment-….parquet       rows of consecutive steps, never changed

A refresh compares size and time of every file of the run. It reads each file of new and changed steps once, compares it
with its manifest, and adds these steps as a segment. If there are many segments, they are joined. Files are replaced by
rename, and old ones stay for a while, since others may be reading them. If two processes refresh at once, the second
waits, and then finds the work done.
"""

import hashlib
import json
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from kdrl_core.errors import StorageError
from kdrl_core.ledger import replace_file
from kdrl_core.look.rollouts.index_rows import IndexedStep, index_step, summarize_steps
from kdrl_core.look.rollouts.record import RECORD_VERSION
from kdrl_core.look.rollouts.sources import DamagedFile, StepFiles, file_name, scan

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
    """A segment from the catalog. Raises ValueError for a path outside the run, which may come from a stranger."""
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
    """The same rows in as few segments as `MAX_ROWS` allows."""
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


_STEPS_AT_ONCE = 64
"""Steps that are read before they are written. An interrupted build loses these at most."""
_JOINED = 16
"""This many neighbouring segments of similar size are joined, so segments are few and rows are rarely rewritten."""

Progress = Callable[[int, int], None]
"""Called with the number of steps read, and the number of all."""


class RunIndex:
    """The index of one run, as of its last refresh."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / ".index"
        self.segments: list[Segment] = []
        self.missing: list[DamagedFile] = []
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    @property
    def steps(self) -> list[IndexedStep]:
        """Every step, by stage and step."""
        return sorted((step for segment in self.segments for step in segment.steps), key=lambda step: step.key)

    @property
    def files(self) -> list[Path]:
        """The Parquet files with rows."""
        return [self.folder / segment.file for segment in self.segments if segment.num_rows]

    @property
    def damaged(self) -> list[DamagedFile]:
        """The run's files that are left out."""
        found = [
            DamagedFile(path=self.path(step, part), problem=problem)
            for step in self.steps
            for part, problem in step.damaged.items()
        ]
        return [*found, *self.missing]

    def path(self, step: IndexedStep, part: str) -> Path:
        return self.root / step.folder / file_name(part)

    def snapshot(self) -> "RunIndex":
        """A copy of the index that a later refresh does not change."""
        taken = RunIndex(self.root)
        taken.folder, taken.segments, taken.missing = self.folder, list(self.segments), self.missing
        return taken

    def discard(self) -> None:
        """Drop the index; the next refresh makes a new one. For an index whose files have changed."""
        with suppress(OSError):
            (self.folder / CATALOG).unlink()
        self.segments = []

    def refresh(self, progress: Progress | None = None) -> bool:
        """Bring the index up to date with the run's files. True if anything changed; otherwise it reads little."""
        before = [segment.file for segment in self.segments]
        found, self.missing = scan(self.root)
        if not found:
            self.segments = []
            return bool(before)
        for folder in _places(self.root):
            segments = read_catalog(folder)
            known = {step.key: step.stamps for segment in segments for step in segment.steps}
            if segments and known == {step.key: step.stamps for step in found}:
                self.folder, self.segments = folder, segments
                return before != [segment.file for segment in segments]
        self._build(found, progress)
        return before != [segment.file for segment in self.segments]

    def _build(self, found: list[StepFiles], progress: Progress | None) -> None:
        for folder in _places(self.root):
            with suppress(OSError, StorageError):
                folder.mkdir(parents=True, exist_ok=True)
                if os.access(folder, os.W_OK):
                    self._build_in(folder, found, progress)
                    return
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="kdrl-index-")
        self._build_in(Path(self._temporary.name), found, progress)

    def _build_in(self, folder: Path, found: list[StepFiles], progress: Progress | None) -> None:
        with waiting(folder / "lock"):
            self.folder = folder
            self.segments = [kept for old in read_catalog(folder) if (kept := still_true(folder, old, found))]
            known = {step.key for segment in self.segments for step in segment.steps}
            todo = [step for step in found if step.key not in known]
            done = 0
            if progress is not None and todo:
                progress(0, len(todo))
            for batch in _batches(todo):
                self.segments.append(_read_steps(folder, batch))
                save_catalog(folder, self.segments)
                done += len(batch)
                if progress is not None:
                    progress(done, len(todo))
            self._join()
            save_catalog(folder, self.segments)
            sweep(folder, {segment.file for segment in self.segments})

    def _join(self) -> None:
        """Join `_JOINED` neighbours of similar size, unless the file would become too large for memory."""
        self.segments.sort(key=lambda segment: segment.steps[0].key)
        size = _JOINED
        while size < 10**6:
            small = [number for number, one in enumerate(self.segments) if len(one.steps) < size]
            for start, stop in reversed(_consecutive(small)):
                if stop - start >= _JOINED:
                    self.segments[start:stop] = joined(self.folder, self.segments[start:stop])
            size *= _JOINED


def _places(root: Path) -> list[Path]:
    """Folders where the index of a run may lie, best first."""
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:24]
    places = [] if (root / ".index").is_symlink() else [root / ".index"]
    with suppress(RuntimeError):  # a user without a home
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
        places.append(cache / "kdrl" / "index" / name)
    return places


def _batches(todo: Sequence[StepFiles]) -> Iterator[Sequence[StepFiles]]:
    """Steps that are read together. An unfinished step is read alone, since it will be read again soon."""
    finished = [step for step in todo if "update" in step.stamps]
    for start in range(0, len(finished), _STEPS_AT_ONCE):
        yield finished[start : start + _STEPS_AT_ONCE]
    under_way = [step for step in todo if "update" not in step.stamps]
    if len(under_way) > _JOINED:  # an imported run, whose steps are complete
        for start in range(0, len(under_way), _STEPS_AT_ONCE):
            yield under_way[start : start + _STEPS_AT_ONCE]
    else:
        yield from ([step] for step in under_way)


def _read_steps(folder: Path, batch: Sequence[StepFiles]) -> Segment:
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        read = list(pool.map(index_step, batch))
    table = pa.concat_tables([rows for _, rows in read])
    summaries = summarize_steps(table)
    for step, _ in read:
        step.summary = summaries.get(step.key, {})
    return write_segment(folder, [step for step, _ in read], table)


def _consecutive(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Runs of consecutive numbers as (first, last + 1)."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs
