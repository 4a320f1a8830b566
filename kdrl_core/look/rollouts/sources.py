"""The rollout files of a run on disk: which steps there are, which files each has, and whether they are intact.

Reads only, and needs neither recipe nor lock. So the run may be going on, come from another version, or be an imported
dump.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kdrl_core.config import did_you_mean
from kdrl_core.config.paths import read_small, why
from kdrl_core.errors import DamagedArtifactError, RunError
from kdrl_core.ledger import artifacts_root, manifest_of, validate_run_name
from kdrl_core.ledger.artifact import ARTIFACTS
from kdrl_core.ledger.manifest import file_manifest_path
from kdrl_core.look.rollouts.record import PARTS, RECORD
from kdrl_core.tables.files import LOOKED_AT, decodable
from kdrl_core.tables.schemas import SCHEMA_VERSION

_STAGE = re.compile(r"stage=([A-Za-z0-9][A-Za-z0-9._-]*)")
_STEP = re.compile(r"step=(\d{6,9})")
_VERSION_KEY = b"kdrl.schema_version"
_MOST_BYTES = 2**33
"""Most bytes of a file of a step."""

_PART_OF = {ARTIFACTS[part].file: part for part in PARTS}

Stamp = tuple[int, int]
"""Size and mtime in ns of a file: published files never change, so another stamp means another file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DamagedFile:
    """A file that is left out, and its problem."""

    path: Path
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFiles:
    """The files that one step has."""

    stage: str
    step: int
    folder: Path
    stamps: dict[str, Stamp]
    """Part (`rollouts`, `rewards`, …) → stamp."""

    @property
    def key(self) -> tuple[str, int]:
        return self.stage, self.step

    def path(self, part: str) -> Path:
        """Path of a part, whether it exists or not."""
        return self.folder / file_name(part)


def file_name(part: str) -> str:
    """Name of a part's file in the folder of its step."""
    return ARTIFACTS[part].file


def find_run(run: str | Path) -> Path:
    """The folder of a run: by name below artifacts/runs, or a folder anywhere that holds `rollouts/`. Raises RunError
    if there is no such run; the message gives the nearest names."""
    folder = Path(run)
    if (isinstance(run, Path) or os.sep in run or run in (".", "..")) and not folder.is_dir():
        raise RunError(f"{folder}: no such folder; give the name of a run (kdrl status lists them) or its folder")
    runs = artifacts_root() / "runs"
    if isinstance(run, str) and os.sep not in run and run not in (".", ".."):
        folder = runs / validate_run_name(run)
        if not folder.is_dir():
            known = known_runs()
            listing = f"runs here: {', '.join(known[-8:])}" if known else "there are none yet; start one with kdrl run"
            raise RunError(f"no run '{run}' in {runs}{did_you_mean(run, known)}; {listing}")
    folder = folder.absolute()
    if not any((folder / name).exists() for name in ("rollouts", "manifest.json", "recipe.yaml")):
        raise RunError(
            f"{folder} is not a run: it has no folder rollouts; give the name of a run, its folder, "
            "or import another trainer's dump with kdrl rollouts import"
        )
    return folder


def known_runs() -> list[str]:
    """Names of the folders below artifacts/runs that are runs or imported dumps, oldest first."""
    runs = artifacts_root() / "runs"
    found = [path for path in runs.glob("*") if path.is_dir() and not path.name.startswith(".")]
    return [path.name for path in sorted(found, key=lambda path: (path.stat().st_mtime, path.name))]


def scan(root: Path) -> tuple[list[StepFiles], list[DamagedFile]]:
    """The steps of a run that have rollouts, by stage and step; and missing rollouts of steps that have other files."""
    steps: list[StepFiles] = []
    missing: list[DamagedFile] = []
    for stage, stage_folder in _folders(root / "rollouts", _STAGE):
        for number, folder in _folders(stage_folder, _STEP):
            stamps = dict(_stamps(folder))
            step = StepFiles(stage=stage, step=int(number), folder=folder, stamps=stamps)
            if "rollouts" in stamps:
                steps.append(step)
            elif "rewards" in stamps or "teacher" in stamps:
                missing.append(DamagedFile(path=step.path("rollouts"), problem="is missing"))
    return sorted(steps, key=lambda step: step.key), missing


def read_part(step: StepFiles, part: str, columns: Sequence[str]) -> pa.Table:
    """The `columns` that the file has, after its bytes were compared with its manifest, if there is one. Raises
    DamagedArtifactError if it is damaged, belongs elsewhere, has another schema version, has no ids, or is too large in
    memory: what the record takes of a file must fit, even if `columns` are fewer, since queries read the rest."""
    content = _verified(step.path(part))
    try:
        file = decodable(pa.py_buffer(content), most_bytes=LOOKED_AT, columns=[*RECORD.names, *columns])
        _require_readable(file.schema_arrow)
        table = file.read(columns=[name for name in columns if name in file.schema_arrow.names])
        table.validate(full=True)  # texts of others need not be UTF-8
        return table
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(f"cannot be read as Parquet: {why(error)}") from error


def bulky_columns(step: StepFiles, part: str) -> list[str]:
    """The columns of the record that are in this file and not in the index."""
    names = pq.read_schema(step.path(part)).names
    return [name for name in PARTS[part] if name in names]


def _verified(path: Path) -> bytes:
    """The bytes of a file, which are those of its manifest, if it has one."""
    manifest = manifest_of(path) if file_manifest_path(path).is_file() else None  # just published, or not by kdrl
    size = _MOST_BYTES if manifest is None else manifest.size
    try:
        if manifest is not None and (found := path.stat().st_size) != size:
            raise _damaged(f"is damaged: {found} bytes are not the {size} that were published")
        content = read_small(path, most_bytes=min(size, _MOST_BYTES), follow_links=True)
    except OSError as error:
        raise _damaged(f"cannot be read: {why(error)}") from error
    if manifest is not None and (sha256 := hashlib.sha256(content).hexdigest()) != manifest.sha256:
        raise _damaged(f"is damaged: its sha256 is {sha256[:12]}…, published was {manifest.sha256[:12]}…")
    return content


def _require_readable(schema: pa.Schema) -> None:
    version = (schema.metadata or {}).get(_VERSION_KEY, SCHEMA_VERSION.encode()).decode(errors="replace")
    if version != SCHEMA_VERSION:
        raise _damaged(
            f"has schema version {version}, and this kdrl reads version {SCHEMA_VERSION}; "
            "install the kdrl that wrote it, or read it with DuckDB or pandas"
        )
    if lacking := [name for name in ("prompt_id", "sample") if name not in schema.names]:
        raise _damaged(f"has no column {' and '.join(lacking)}")


def _damaged(problem: str) -> DamagedArtifactError:
    return DamagedArtifactError(problem, "kdrl check RUN says what mends it")


def _folders(parent: Path, pattern: re.Pattern[str]) -> Iterator[tuple[str, Path]]:
    with suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if (match := pattern.fullmatch(entry.name)) and entry.is_dir():
                yield match[1], Path(entry.path)


def _stamps(folder: Path) -> Iterator[tuple[str, Stamp]]:
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if (part := _PART_OF.get(entry.name)) is not None and entry.is_file():
                status = entry.stat()
                yield part, (status.st_size, status.st_mtime_ns)
