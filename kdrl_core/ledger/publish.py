"""Publication: an artifact exists once its manifest does, and from then on never changes.

A file is written to a hidden sibling, fsynced, renamed; then its manifest (inputs with their hashes, size, sha256) the
same way. A directory is written to a hidden sibling with its manifest last, fsynced, and renamed as a whole. So a crash
leaves only hidden siblings and files without manifest: neither counts.
"""

import errno
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kdrl_core.errors import DamagedArtifactError, KdrlError, RunError, StorageError
from kdrl_core.ledger import heal
from kdrl_core.ledger.manifest import (
    DIRECTORY_MANIFEST,
    Kept,
    Listing,
    Manifest,
    digest,
    digest_of_listing,
    file_manifest_path,
    is_published,
    keep,
    listing,
    manifest_of,
    renamed,
    stamp_of,
)
from kdrl_core.ledger.names import place_of

_TEMPORARY_PREFIX = ".tmp-"
_FULL_BELOW_BYTES = 2**20


def publish_file(
    path: Path,
    write: Callable[[Path], None],
    *,
    inputs: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    expected: str | None = None,
) -> Manifest:
    """Publish the file that `write` makes.

    A file that was set aside as damaged must come out with the same bytes; it then gets its old manifest back.

    Args:
        path: where to publish the file.
        write: writes the file to the path it is given.
        inputs: what it was made from: path relative to the run → sha256.
        metadata: further facts for the manifest.
        expected: sha256 that later published artifacts were made from.

    Raises:
        StorageError: no space, or the folder cannot be written; nothing is left behind.
        DamagedArtifactError: made again, it has other bytes; nothing is published.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(path) as temporary:
            write(temporary)
            size, sha256 = digest(temporary, durable=True)
            hashed = stamp_of(temporary)
            made = _manifest(path, inputs, metadata, size=size, sha256=sha256)
            written = heal.settled(path, made, expected).to_bytes()
            temporary.replace(path)
        replace_file(file_manifest_path(path), written)
        heal.forget(path)
    manifest = Manifest.from_bytes(written)
    keep(Kept.MANIFEST, path, stamp_of(file_manifest_path(path)), manifest)
    keep(Kept.BYTES, path, renamed(hashed, path), sha256)
    return manifest


def publish_directory(
    path: Path,
    write: Callable[[Path], object],
    *,
    inputs: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    expected: str | None = None,
) -> Manifest:
    """Publish the directory that `write` fills; like `publish_file`, in one rename. `write` may return a `Listing` of
    the files that it has put on the disk from memory (`ConstantFiles`): these are not read again.

    If the directory is already published from the same inputs, it is kept and its manifest returned. If it was made
    from other inputs, the new one replaces it once that is complete.
    """
    if kept := heal.find_intact(path, inputs or {}):
        return kept
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(path) as temporary:
            temporary.mkdir()
            known = write(temporary)
            files = listing(temporary, durable=True, known=known if isinstance(known, dict) else None)
            size, sha256 = sum(f["size"] for f in files.values()), digest_of_listing(files)
            made = _manifest(path, inputs, metadata, size=size, sha256=sha256, files=files)
            written = heal.settled(path, made, expected).to_bytes()
            _write(temporary / DIRECTORY_MANIFEST, written)
            _open_to_readers(temporary)
            _fsync_folders(temporary)
            with _temporary(path) as superseded:
                if path.exists():
                    path.rename(superseded)
                temporary.rename(path)
                _fsync(path.parent)
        heal.forget(path)
    return Manifest.from_bytes(written)


def _open_to_readers(folder: Path) -> None:
    """Let whoever may read the manifest read all files: safetensors makes files for their owner alone."""
    readers = stat.S_IMODE((folder / DIRECTORY_MANIFEST).stat().st_mode) & 0o444
    for file in folder.rglob("*"):
        mode = stat.S_IMODE(file.stat().st_mode)
        if file.is_file() and mode & readers != readers:
            file.chmod(mode | readers)


def write_hashed(path: Path, parts: Iterable[memoryview | bytes]) -> dict[str, Any]:
    """Write a large file from memory, durably. Returns its entry of a `Listing`, so that nobody has to read it for its
    hash: each part is hashed in a thread while it is written."""
    found, size = hashlib.sha256(), 0
    with path.open("wb") as file, ThreadPoolExecutor(1) as beside:
        for part in parts:
            hashed = beside.submit(found.update, part)
            size += file.write(part)
            hashed.result()
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": found.hexdigest()}


class ConstantFiles:
    """Small files that every published folder of a kind holds with the same bytes. They are made and hashed once, kept
    in memory, and written from there.

    Args:
        save: writes them into the folder that it is given; called at the first use.
    """

    def __init__(self, save: Callable[[Path], object]) -> None:
        self._save = save
        self._contents: dict[str, bytes] = {}
        self._listing: Listing = {}

    def write(self, folder: Path) -> Listing:
        """Write them into `folder`, durably, and return their sizes and hashes."""
        if not self._contents:
            with _temporary(folder / "constant") as made:
                made.mkdir()
                self._save(made)
                self._listing = listing(made)
                self._contents = {name: (made / name).read_bytes() for name in self._listing}
        for name, content in self._contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _write(folder / name, content)
        return self._listing


def adopt_published(source: Path, path: Path) -> None:
    """Publish at `path` the artifact `source`, which was verified in the same place of another run: the same bytes
    under the same manifest. Published files never change, so they are linked; they are copied only where the file
    system has no links.

    Raises:
        DamagedArtifactError: the source has no readable manifest, or was altered while it was copied.
        RunError: something is published at `path` already.
        StorageError: as `publish_file`.
    """
    manifest = manifest_of(source)
    if is_published(path):
        raise RunError(f"{path} is published already; it is not replaced by that of another run")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(path) as temporary:
            if manifest.files is None:
                _link(source, temporary, manifest.sha256)
                temporary.replace(path)
            else:
                for name, file in manifest.files.items():
                    (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                    _link(source / name, temporary / name, file["sha256"])
                _write(temporary / DIRECTORY_MANIFEST, manifest.to_bytes())
                _fsync_folders(temporary)
                temporary.rename(path)
            _fsync(path.parent)
        if manifest.files is None:
            replace_file(file_manifest_path(path), manifest.to_bytes())


def _link(source: Path, target: Path, sha256: str) -> None:
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
        _fsync(target)
        if digest(target)[1] != sha256:
            raise DamagedArtifactError(f"{source} was altered while it was copied", "look at its disk") from None


def retract(path: Path) -> None:
    """Delete a published directory: it is moved away whole first, since a half-deleted one would look published."""
    with _temporary(path) as doomed:
        path.rename(doomed)


def replace_file(path: Path, content: bytes | Callable[[Path], None]) -> None:
    """Atomically replace the file `path` by these bytes, or by what `content` writes to the path it is given; durable
    when this returns."""
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(path) as temporary:
            if callable(content):
                content(temporary)
                _fsync(temporary)
            else:
                _write(temporary, content)
            temporary.replace(path)
            _fsync(path.parent)


def sweep_temporaries(root: Path) -> int:
    """Delete what interrupted publications left below `root`; returns how many. Only under the run's lock."""
    leftovers = list(root.rglob(f"{_TEMPORARY_PREFIX}*"))
    for leftover in leftovers:
        heal.delete(leftover)
    return len(leftovers) + heal.sweep_aside(root)


def require_writable(folder: Path, *, free_mb: int) -> None:
    """Fail before expensive work if `folder` cannot be made or written, or has less than `free_mb` MiB left."""
    with storage_errors(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # as below /proc
            raise StorageError(
                f"cannot write {folder}: it cannot be made; set KDRL_ARTIFACTS to another folder"
            ) from error
        with _temporary(folder / "probe") as temporary:
            temporary.write_bytes(b"kdrl")
        free = _free_bytes(folder) // 2**20
    if free < free_mb:
        raise StorageError(
            f"no disk space: {folder} has {free} MiB left, at least {free_mb} are needed; "
            "free some space or set KDRL_ARTIFACTS to another disk"
        )


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _manifest(
    path: Path, inputs: Mapping[str, str] | None, metadata: Mapping[str, Any] | None, **content: Any
) -> Manifest:
    return Manifest(
        artifact=place_of(path) or path.name,
        inputs=dict(inputs or {}),
        metadata=dict(metadata or {}),
        created_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        **content,
    )


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_folders(root: Path) -> None:
    for folder in [*(path for path in root.rglob("*") if path.is_dir()), root]:
        _fsync(folder)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A hidden sibling of `path`, gone afterwards unless it was renamed."""
    temporary = path.with_name(f"{_TEMPORARY_PREFIX}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        yield temporary
    except Exception as error:
        # safetensors, torch and shutil report a full disk each in its own way, without errno; torch does not name it.
        foreign = not isinstance(error, KdrlError) and getattr(error, "errno", None) is None
        if foreign and ("No space left" in str(error) or _free_bytes(path.parent) < _FULL_BELOW_BYTES):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
    finally:
        with suppress(OSError):
            heal.delete(temporary)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError from lack of space or permission to write `path` into a StorageError that says so."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "no disk space; free some, then run it again or resume the run"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            remedy = "the folder cannot be written; change its permissions or set KDRL_ARTIFACTS"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP):
            remedy = "something else stands in its place; move it away or set KDRL_ARTIFACTS"
        else:
            raise
        raise StorageError(f"cannot write {path}: {remedy} ({error.strerror})") from error
