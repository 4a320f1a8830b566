"""What makes a file or folder an artifact: a manifest, with the hashes of its bytes and of what it was made from.

The manifest of a file is `_<stem>.manifest.json` beside it; the leading underscore keeps Parquet readers of the folder
from taking it for data. The manifest of a directory is `manifest.json` in it. A manifest holds its own checksum and the
artifact's place in its run: it is refused if it was altered, or if the artifact lies in another place.

While a process holds a run's lock, it does not read an unchanged file of the run twice. Published files never change:
if inode, size and times of a file are the same as before, its bytes are taken to be the same; else it is read again.
The memory of manifests and of verified files covers one step: the first file of another step clears it. So damage that
changes neither times nor size is found when a later step or process looks at the file.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

import kdrl_core
from kdrl_core.config.paths import open_regular, read_json, why
from kdrl_core.errors import DamagedArtifactError, ForeignFileError, RunError
from kdrl_core.ledger.graph import FILTER_REPORT, POOL, node_at
from kdrl_core.ledger.names import place_of

DIRECTORY_MANIFEST = "manifest.json"
_FILE_MANIFEST = ".manifest.json"
_CHECKSUM = "manifest_sha256"
Listing = dict[str, dict[str, Any]]
"""Path in a folder → size and sha256 of the file."""
_SUFFIXES = (Path(POOL.file).suffix, Path(FILTER_REPORT.file).suffix)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What was published: bytes, hash, and what it was made from."""

    artifact: str
    """Its path in the run; outside of runs, where folders may be renamed, its name when it was published."""
    size: int
    sha256: str
    """Hash of the file's bytes; for a directory, of the sorted lines `sha256 size path` of its files."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Path relative to the run → sha256."""
    metadata: dict[str, Any] = field(default_factory=dict)
    files: Listing | None = None
    """Only for a directory."""
    created_at: str = ""
    kdrl_version: str = kdrl_core.__version__

    def to_bytes(self) -> bytes:
        """Content of the manifest's file."""
        content = json.loads(json.dumps(asdict(self)))  # as when read back: keys are text
        content[_CHECKSUM] = _checksum(content)
        return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def from_bytes(cls, written: bytes) -> "Manifest":
        """The manifest that was just written as these bytes; its checksum is not compared."""
        content = json.loads(written)
        del content[_CHECKSUM]
        return cls(**content)


def manifest_path(path: Path) -> Path:
    """Where the manifest of the artifact at `path` lies."""
    return path / DIRECTORY_MANIFEST if path.is_dir() else file_manifest_path(path)


def file_manifest_path(path: Path) -> Path:
    """Where the manifest of the file `path` lies, whatever is at `path` now."""
    return path.with_name(f"_{path.stem}{_FILE_MANIFEST}")


def artifact_stem(where: Path) -> str | None:
    """Stem of the file that the manifest `where` describes; None for a folder's manifest."""
    if where.name.startswith("_") and where.name.endswith(_FILE_MANIFEST):
        return where.name.removeprefix("_").removesuffix(_FILE_MANIFEST)
    return None


def published_below(root: Path) -> Iterator[Path]:
    """Every artifact of the run in `root` that has a manifest: files and directories, by name."""
    for where in sorted(root.rglob("*manifest.json")):
        inside = where.relative_to(root).parts
        if len(inside) == 1 or any(part.startswith(".") for part in inside):
            continue  # the run's own, or what is not published
        if where.name == DIRECTORY_MANIFEST:
            yield where.parent
        elif (stem := artifact_stem(where)) is not None:
            files = [where.with_name(stem + suffix) for suffix in _SUFFIXES]
            yield next((file for file in files if node_at(file.relative_to(root).as_posix())), files[0])


def is_published(path: Path) -> bool:
    """Whether the artifact has a manifest. Its bytes are checked by `verify_published`."""
    return manifest_path(path).is_file() and path.exists()


def manifest_of(path: Path) -> Manifest:
    """The manifest of a published artifact.

    Raises:
        RunError: it has none.
        DamagedArtifactError: the manifest itself cannot be read, or was altered.
        ForeignFileError: it belongs to another artifact of a run.
    """
    where = manifest_path(path)
    if not where.is_file():
        raise RunError(f"{path} is not published: it has no manifest {where.name}")
    stamp = stamp_of(where)
    if (known := recall(Kept.MANIFEST, path, stamp)) is not None:
        return cast(Manifest, known)
    manifest = read_manifest(where)
    place = place_of(path)
    if place not in (None, manifest.artifact):
        raise ForeignFileError(
            f"{path} belongs elsewhere: it was published as {manifest.artifact}",
            f"move it back there, or delete it{'' if path.is_dir() else f' and {where.name}'} to have it made again",
        )
    keep(Kept.MANIFEST, path, stamp, manifest)
    return manifest


def read_manifest(where: Path) -> Manifest:
    """The manifest in the file `where`. Raises DamagedArtifactError if it is not a valid manifest."""
    try:
        content = read_json(where)
        if content.pop(_CHECKSUM) != _checksum(content):
            raise ValueError("it was altered: its checksum is not that of its content")
        manifest = Manifest(**content)
        if manifest.files is not None:
            digest_of_listing(manifest.files)
            if outside := [name for name in manifest.files if name.startswith("/") or ".." in Path(name).parts]:
                raise ValueError(f"it lists {outside[0]}, which is not below it")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else why(error)
        raise _unreadable(where, reason) from error
    return manifest


def is_current(path: Path, inputs: Mapping[str, str]) -> bool:
    """Whether the artifact is published and was made from exactly these inputs."""
    return is_published(path) and manifest_of(path).inputs == dict(inputs)


def verify_published(path: Path) -> Manifest:
    """The manifest of `path` after its bytes were compared with it.

    Raises:
        RunError: not published.
        DamagedArtifactError: size or hash of the artifact, or of a file in it, is not what was published.
        ForeignFileError: it is another artifact of a run, or a directory holds a file that was not published (hidden
            files do not count).
    """
    manifest = manifest_of(path)
    if manifest.files is None:
        stamp = stamp_of(path)
        if recall(Kept.BYTES, path, stamp) != manifest.sha256:
            _compare(path, manifest.size, manifest.sha256)
            keep(Kept.BYTES, path, stamp, manifest.sha256)
        return manifest
    for name, expected in manifest.files.items():
        _compare(path / name, expected["size"], expected["sha256"])
    if manifest.sha256 != digest_of_listing(manifest.files):
        raise _unreadable(manifest_path(path), "its hash is not that of the files it lists")
    names = {_name(file, path) for file in _files_of(path) if not file.name.startswith(".")}
    if surplus := sorted(names - manifest.files.keys()):
        raise ForeignFileError(f"{path} holds {surplus[0]}, which was not published with it", "move it elsewhere")
    return manifest


def digest(path: Path, *, durable: bool = False) -> tuple[int, str]:
    """Size and sha256 of a file; with `durable` its bytes are on the disk when this returns."""
    with open_regular(path, most_bytes=2**63, follow_links=True) as file:
        found = hashlib.file_digest(file, "sha256")
        if durable:
            os.fsync(file.fileno())
        return file.tell(), found.hexdigest()


def listing(folder: Path, *, durable: bool = False, known: Listing | None = None) -> Listing:
    """`Manifest.files` of a directory, without its manifest. `durable` as in `digest`; files in `known` are not read if
    their size agrees."""
    files: Listing = {}
    for file in _files_of(folder):
        name = _name(file, folder)
        entry = (known or {}).get(name)
        if entry is None or entry["size"] != file.stat().st_size:
            size, sha256 = digest(file, durable=durable)
            entry = {"size": size, "sha256": sha256}
        files[name] = entry
    return files


def digest_of_listing(files: Mapping[str, Mapping[str, Any]]) -> str:
    """`Manifest.sha256` of a directory."""
    lines = "".join(f"{files[name]['sha256']} {files[name]['size']} {name}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def _files_of(folder: Path) -> Iterable[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / DIRECTORY_MANIFEST)


def _name(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _unreadable(manifest: Path, reason: str) -> DamagedArtifactError:
    return DamagedArtifactError(f"manifest {manifest} cannot be read ({reason})", _REMEDY)


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _compare(path: Path, size: int, sha256: str) -> None:
    if not path.is_file():
        raise DamagedArtifactError(f"{path} was published but is missing", _REMEDY)
    if (actual_size := path.stat().st_size) != size:
        problem = f"{path} is damaged: {actual_size} bytes are not the {size} that were published"
        raise DamagedArtifactError(problem, _REMEDY)
    if (actual := digest(path)[1]) != sha256:
        problem = f"{path} is damaged: its sha256 is {actual[:12]}…, published was {sha256[:12]}…"
        raise DamagedArtifactError(problem, _REMEDY)


_REMEDY = "restore it from a backup; kdrl resume makes again the files that the run needs"


def model_identity(path: Path) -> str:
    """Name of a model directory and sha256 of its files as they are. It differs for two models of the same name or with
    another tokenizer or chat template; a moved or copied model keeps it."""
    listing = hashlib.sha256()
    files = (file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    for file in sorted(file for file in files if file.name != DIRECTORY_MANIFEST):
        listing.update(f"{file.name} {digest(file)[1]}\n".encode())
    return f"{path.name} sha256 {listing.hexdigest()[:16]}"


# --- what a process remembers while it holds a run's lock ------------------------------------------------------------


class Kept(StrEnum):
    """What is remembered of an artifact."""

    MANIFEST = "manifest"
    BYTES = "bytes"
    """Hash of its bytes."""
    DERIVED = "derived"
    """Rows that can be rebuilt, which are kept longer than a step."""


Stamp = tuple[int, ...]

_held: dict[Path, dict[tuple[Kept, Path], tuple[Stamp, Any]]] = {}
"""Run whose lock is held → kind and artifact → stamp of the file that was read, and the value from it."""
_steps: dict[Path, tuple[str | None, object]] = {}
"""Run → stage and step of the artifacts that are remembered."""


def begin_memory(root: Path) -> None:
    """Begin with an empty memory: the lock of the run in `root` is held from now on."""
    _held[root] = {}
    _steps.pop(root, None)


def holds_lock(root: Path) -> bool:
    """Whether this process holds the lock of the run in `root`."""
    return root in _held


def end_memory(root: Path) -> None:
    """Forget the run: its lock is released, so others may change its files."""
    _held.pop(root, None)


def stamp_of(path: Path) -> Stamp | None:
    """Facts of a file that change with it: device, inode, size and times; None if there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def renamed(before: Stamp | None, path: Path) -> Stamp | None:
    """The stamp of a file after its rename to `path`, which changes only the last of its times; None if more
    changed."""
    after = stamp_of(path)
    return after if before is not None and after is not None and after[:-1] == before[:-1] else None


def keep(what: Kept, path: Path, at: Stamp | None, value: Any) -> None:
    """Remember what was read of the artifact at `path`, from a file that had the stamp `at`."""
    if at is None or (root := _root(path)) is None:
        return
    node = node_at(path.relative_to(root).as_posix())
    if node is not None and node.row.per == "step" and not node.row.is_pruned:
        if _steps.get(root) != (node.stage, node.at):
            _held[root] = {key: known for key, known in _held[root].items() if key[0] == Kept.DERIVED}
        _steps[root] = node.stage, node.at
    _held[root][what, path] = at, value


def recall(what: Kept, path: Path, at: Stamp | None) -> Any:
    """What was read of the artifact when the file had the stamp `at`; None if that is not known."""
    root = _root(path)
    known = None if root is None else _held[root].get((what, path))
    return known[1] if known is not None and known[0] == at else None


def _root(path: Path) -> Path | None:
    return next((root for root in tuple(_held) if path.is_relative_to(root)), None)
