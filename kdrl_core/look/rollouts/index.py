"""The index of a run's rollouts: their single values in a few large Parquet files instead of thousands of small ones.

It is derived, and not a part of the run: you may delete it at any time, and it is made again. It lies in the run's
hidden folder `.index`, which the ledger ignores, or in the user's cache if the run is read-only.

    catalog.json            the segments; for every step the sizes and times of its files, its damage, its summary
    segment-….parquet       rows of consecutive steps, never changed

Both have checksums (segments.py). What is damaged is made anew, and the log says so.

A refresh compares size and time of every file of the run. It reads each file of new and changed steps once, compares it
with its manifest, and adds these steps as a segment. If there are many segments, they are joined. Files are replaced by
rename, and old ones stay for a while, since others may be reading them. If two processes refresh at once, the second
waits, and then finds the work done.
"""

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock, Timeout

from kdrl_core.errors import StorageError, visible
from kdrl_core.ledger.manifest import Stamp, stamp_of
from kdrl_core.look.rollouts.index_rows import IndexedStep, index_step, summarize_steps
from kdrl_core.look.rollouts.segments import (
    DamagedIndexError,
    Segment,
    check_segment,
    read_catalog,
    read_segment,
    save_catalog,
    write_segment,
)
from kdrl_core.look.rollouts.sources import DamagedFile, StepFiles, file_name, scan

MAX_ROWS = 2**18
"""Most rows of a joined segment, so that it fits into memory easily."""
_MAX_BYTES = 2**30
"""Most bytes of a joined segment in memory."""
_KEPT_FOR_S = 600.0
_PATIENCE_S = 300.0
_logger = logging.getLogger("kdrl")


def still_true(folder: Path, segment: Segment, found: list[StepFiles]) -> Segment | None:
    """The segment without steps that are gone or have changed; None if no step is left. Raises DamagedIndexError if its
    rows are needed and damaged."""
    stamps = {step.key: step.stamps for step in found}
    kept = [step for step in segment.steps if stamps.get(step.key) == step.stamps]
    if len(kept) == len(segment.steps):
        return segment
    if not kept:
        return None
    rows = read_segment(folder, segment)
    lost = {step.key for step in segment.steps} - {step.key for step in kept}
    for stage, step in lost:
        rows = rows.filter(pc.invert(pc.and_(pc.equal(rows["stage"], stage), pc.equal(rows["step"], step))))
    return write_segment(folder, kept, rows)


def joined(folder: Path, segments: Sequence[Segment]) -> list[Segment]:
    """The same rows in as few segments as `MAX_ROWS` allows."""
    groups: list[list[Segment]] = []
    for segment in segments:
        together = [*groups[-1], segment] if groups else []
        rows, size = sum(one.num_rows for one in together), sum(one.num_bytes for one in together)
        if together and rows <= MAX_ROWS and size <= _MAX_BYTES:
            groups[-1].append(segment)
        else:
            groups.append([segment])
    made = []
    for group in groups:
        if len(group) == 1:
            made += group
        else:
            table = pa.concat_tables([read_segment(folder, segment) for segment in group])
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
_READ_AT_ONCE = 8
_WORKERS = min(4, os.cpu_count() or 1)
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
        self._rejected: set[Path] = set()
        self._told: set[tuple[Path, str]] = set()
        self._compared: dict[Path, Stamp | None] = {}
        """Segments that were found intact, and the stamps that their files had then."""

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
        taken._compared = self._compared
        return taken

    def require_intact(self) -> None:
        """Raise DamagedIndexError if a segment is not as it was written. Reads each segment once; after that, only
        those whose files have changed."""
        stamps = {segment.file: stamp_of(self.folder / segment.file) for segment in self.segments}
        new = [one for one in self.segments if self._compared.get(self.folder / one.file) != stamps[one.file]]
        if not new:
            return
        with ThreadPoolExecutor(max_workers=_WORKERS) as pool:
            for _ in pool.map(partial(check_segment, self.folder), new):
                pass
        self._compared.update({self.folder / one.file: stamps[one.file] for one in new})

    def reject(self, fault: str | None) -> None:
        """Use no segment again that is not as it was written; or no segment at all if each is, and a query failed with
        `fault`. The next refresh makes them anew."""
        damaged: dict[Path, str] = {}
        for segment in self.segments:
            try:
                check_segment(self.folder, segment)
            except DamagedIndexError as error:
                damaged[self.folder / segment.file] = error.problem
        if not damaged and fault is not None:
            damaged = {self.folder / segment.file: fault for segment in self.segments}
        self._rejected |= damaged.keys()
        self._tell(self.folder, list(damaged.values()))

    def refresh(self, progress: Progress | None = None) -> bool:
        """Bring the index up to date with the run's files. True if anything changed; otherwise it reads little."""
        before = [segment.file for segment in self.segments]
        found, self.missing = scan(self.root)
        if not found:
            self.segments = []
            return bool(before)
        stamps = {step.key: step.stamps for step in found}
        for folder in _places(self.root):
            segments, problems = self._listed(folder)
            self._tell(folder, problems)
            if segments and stamps == {step.key: step.stamps for segment in segments for step in segment.steps}:
                self.folder, self.segments = folder, segments
                break
        else:
            self._build(found, progress)
        return before != [segment.file for segment in self.segments]

    def _listed(self, folder: Path) -> tuple[list[Segment], list[str]]:
        """`read_catalog` without the segments that were rejected."""
        segments, problems = read_catalog(folder)
        return [segment for segment in segments if folder / segment.file not in self._rejected], problems

    def _tell(self, folder: Path, problems: Sequence[str]) -> None:
        """Say once what of an index is damaged."""
        if problems and (folder, problems[0]) not in self._told:
            self._told.add((folder, problems[0]))
            more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
            _logger.warning("%s", visible(f"index {folder}: {problems[0]}{more}; what is damaged in it is made anew"))

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
            self.segments = self._kept(folder, found)
            known = {step.key for segment in self.segments for step in segment.steps}
            todo = [step for step in found if step.key not in known]
            done = 0
            if progress is not None and todo:
                progress(0, len(todo))
            for batch in _batches(todo):
                self.segments += _read_steps(folder, batch)
                save_catalog(folder, self.segments)
                done += len(batch)
                if progress is not None:
                    progress(done, len(todo))
            self._join()
            save_catalog(folder, self.segments)
            sweep(folder, {segment.file for segment in self.segments})

    def _kept(self, folder: Path, found: list[StepFiles]) -> list[Segment]:
        """The segments in `folder` that still hold."""
        kept, problems = [], []
        for old in self._listed(folder)[0]:
            try:
                if (true := still_true(folder, old, found)) is not None:
                    kept.append(true)
            except DamagedIndexError as error:
                problems.append(error.problem)
        self._tell(folder, problems)
        return kept

    def _join(self) -> None:
        """Join `_JOINED` neighbours of similar size, unless the file would become too large for memory."""
        self.segments.sort(key=lambda segment: segment.steps[0].key)
        size = _JOINED
        while size < 10**6:
            small = [number for number, one in enumerate(self.segments) if len(one.steps) < size]
            for start, stop in reversed(_consecutive(small)):
                if stop - start >= _JOINED:
                    with suppress(DamagedIndexError):  # the first query finds it and has it made anew
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


def _read_steps(folder: Path, batch: Sequence[StepFiles]) -> Iterator[Segment]:
    """Steps as a segment, or as several if their rows take much memory."""
    read: list[tuple[IndexedStep, pa.Table]] = []
    with ThreadPoolExecutor(max_workers=_WORKERS) as pool:
        for start in range(0, len(batch), _READ_AT_ONCE):
            read += pool.map(index_step, batch[start : start + _READ_AT_ONCE])
            is_last = start + _READ_AT_ONCE >= len(batch)
            if is_last or sum(rows.nbytes for _, rows in read) > _MAX_BYTES:
                table = pa.concat_tables([rows for _, rows in read])
                summaries = pool.submit(summarize_steps, table).result()  # in a thread: DuckDB swallows Ctrl-C
                for step, _ in read:
                    step.summary = summaries.get(step.key, {})
                yield write_segment(folder, [step for step, _ in read], table)
                read = []


def _consecutive(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Runs of consecutive numbers as (first, last + 1)."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs
