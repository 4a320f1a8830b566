"""The index of a run's rollouts: their single values in a few large Parquet files instead of thousands of small ones.

Derived, and no part of the run: it may be deleted at any time and is made again. It lies in the run's hidden folder
`.index`, which the ledger passes over, or, where a run cannot be written, in the user's cache.

    catalog.json            which segments there are; of every step its files' sizes and times, its damage, its summary
    segment-….parquet       rows of consecutive steps, never changed

A refresh looks at the size and time of every file of the run, reads the steps that are new or changed, each file once
and compared with its manifest, and adds them as a segment; segments that have become many are joined. Whatever is
replaced is replaced by rename, and what it replaces stays for a while for those who read it. Of two that refresh at
once the second waits, and then finds the work done.
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
from kdrl_core.rollouts.index_rows import INDEX, IndexedStep, index_step
from kdrl_core.rollouts.record import RECORD_VERSION
from kdrl_core.rollouts.sources import DamagedFile, StepFiles, scan
from kdrl_core.rollouts.summary import summarize_steps

_VERSION = f"1.{RECORD_VERSION}"
_STEPS_AT_ONCE = 64
"""Steps that are read before they are written: what a build that is interrupted loses."""
_JOINED = 16
"""As many neighbouring segments of like size are joined to one, so that there are few, and each row is moved rarely."""
_MAX_ROWS = 2**18
_ROWS_PER_GROUP = 2**14
_KEPT_FOR_S = 600.0
_SEGMENT = re.compile(r"segment-[0-9a-f]{16}\.parquet")
_FOLDER = re.compile(r"rollouts/stage=[A-Za-z0-9._-]+/step=\d{6,9}")
_PATIENCE_S = 300.0

Progress = Callable[[int, int], None]
"""Called with how many steps have been read, and of how many."""


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
        """The file of a step."""
        return self.root / step.folder / f"{part}.parquet"

    def snapshot(self) -> "RunIndex":
        """The index as it is now, which a later refresh leaves alone."""
        taken = RunIndex(self.root)
        taken.folder, taken.segments, taken.missing = self.folder, list(self.segments), self.missing
        return taken

    def discard(self) -> None:
        """Forget the index, to be made anew by the next refresh: it is not what it was."""
        with suppress(OSError):
            (self.folder / "catalog.json").unlink()
        self.segments = []

    def refresh(self, progress: Progress | None = None) -> bool:
        """Bring the index up to what the run has on disk; True if anything changed. Reads little if nothing did."""
        before = [segment.file for segment in self.segments]
        found, self.missing = scan(self.root)
        for folder in _places(self.root):
            segments = _read_catalog(folder)
            if segments and _is_current(segments, found):
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
        with _waiting(folder / "lock"):
            self.folder = folder
            self.segments = [kept for old in _read_catalog(folder) if (kept := _still_true(folder, old, found))]
            known = {step.key for segment in self.segments for step in segment.steps}
            todo = [step for step in found if step.key not in known]
            done = 0
            if progress is not None and todo:
                progress(0, len(todo))
            for batch in _batches(todo):
                self.segments.append(_read_steps(folder, batch))
                self._save()
                done += len(batch)
                if progress is not None:
                    progress(done, len(todo))
            self._join()
            self._save()
            _sweep(folder, {segment.file for segment in self.segments})

    def _join(self) -> None:
        """Join neighbours where `_JOINED` are of like size, as far as a file does not become too large for memory."""
        self.segments.sort(key=lambda segment: segment.steps[0].key)
        size = _JOINED
        while size < 10**6:
            small = [number for number, one in enumerate(self.segments) if len(one.steps) < size]
            for start, stop in reversed(_consecutive(small)):
                if stop - start >= _JOINED:
                    self.segments[start:stop] = _joined(self.folder, self.segments[start:stop])
            size *= _JOINED

    def _save(self) -> None:
        content = {"version": _VERSION, "segments": [asdict(segment) for segment in self.segments]}
        replace_file(self.folder / "catalog.json", json.dumps(content, separators=(",", ":")).encode())


def _places(root: Path) -> list[Path]:
    """Where the index of a run may lie, best first."""
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:24]
    places = [] if (root / ".index").is_symlink() else [root / ".index"]
    with suppress(RuntimeError):  # somebody without a home
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
        places.append(cache / "kdrl" / "index" / name)
    return places


def _read_catalog(folder: Path) -> list[Segment]:
    """The segments that are there; none if the catalog cannot be read, or is of another version."""
    try:
        content = json.loads((folder / "catalog.json").read_bytes())
        if content["version"] != _VERSION:
            return []
        segments = [_segment(one) for one in content["segments"]]
        return [one for one in segments if _has_size(folder / one.file, one.size)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []


def _segment(content: dict[str, Any]) -> Segment:
    """A segment as the catalog has it. Raises ValueError if it names a file elsewhere: a run may be somebody else's."""
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


def _is_current(segments: list[Segment], found: list[StepFiles]) -> bool:
    known = {step.key: step.stamps for segment in segments for step in segment.steps}
    return known == {step.key: step.stamps for step in found}


def _still_true(folder: Path, segment: Segment, found: list[StepFiles]) -> Segment | None:
    """The segment without the steps that are gone or have changed; None if nothing remains."""
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
    return _write(folder, kept, rows)


def _batches(todo: Sequence[StepFiles]) -> Iterator[Sequence[StepFiles]]:
    """Steps that are read together. One that is under way is alone, since it is to be read again soon."""
    finished = [step for step in todo if "update" in step.stamps]
    for start in range(0, len(finished), _STEPS_AT_ONCE):
        yield finished[start : start + _STEPS_AT_ONCE]
    under_way = [step for step in todo if "update" not in step.stamps]
    if len(under_way) > _JOINED:  # not of kdrl: such steps are whole
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
    return _write(folder, [step for step, _ in read], table)


def _rows(folder: Path, segment: Segment) -> pa.Table:
    return pq.ParquetFile(folder / segment.file).read()


def _write(folder: Path, steps: list[IndexedStep], table: pa.Table) -> Segment:
    path = folder / f"segment-{secrets.token_hex(8)}.parquet"
    replace_file(path, lambda file: pq.write_table(table, file, compression="zstd", row_group_size=_ROWS_PER_GROUP))
    return Segment(file=path.name, size=path.stat().st_size, steps=steps)


def _joined(folder: Path, segments: Sequence[Segment]) -> list[Segment]:
    """The same rows in as few segments as their greatest size allows."""
    groups: list[list[Segment]] = []
    for segment in segments:
        if groups and sum(one.num_rows for one in groups[-1]) + segment.num_rows <= _MAX_ROWS:
            groups[-1].append(segment)
        else:
            groups.append([segment])
    made = []
    for group in groups:
        if len(group) == 1:
            made += group
        else:
            table = pa.concat_tables([_rows(folder, segment) for segment in group])
            made.append(_write(folder, [step for segment in group for step in segment.steps], table))
    return made


def _consecutive(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Runs of consecutive numbers as (first, last + 1)."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs


def _sweep(folder: Path, kept: set[str]) -> None:
    """Delete segments that no catalog has had for a while."""
    for path in folder.glob("*segment-*.parquet*"):
        with suppress(OSError):
            if path.name not in kept and time.time() - path.stat().st_mtime > _KEPT_FOR_S:
                path.unlink()


@contextmanager
def _waiting(path: Path) -> Iterator[None]:
    """Hold the lock of the index. Who waits too long goes on without: at worst the same is read twice."""
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


__all__ = ["INDEX", "Progress", "RunIndex", "Segment"]
