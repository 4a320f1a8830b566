"""Damage: an artifact that no longer has its bytes is set aside and made again, and must come out as it was.

All that a run publishes is made from files by rules that give the same bytes again, on a CPU at least. So what is lost
can be made again, and what was made from it since is still true. Where the bytes come out otherwise (another machine,
another version, a sampler that is not deterministic), nothing is published: the run is refused with both hashes.
"""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kdrl_core.errors import DamagedArtifactError, SurplusFileError
from kdrl_core.ledger.manifest import (
    DIRECTORY_MANIFEST,
    Manifest,
    digest,
    digest_of_listing,
    is_published,
    listing,
    manifest_path,
    read_manifest,
    verify_published,
)

ASIDE_PREFIX = ".damaged-"
_logger = logging.getLogger("kdrl")


def find_intact(path: Path, inputs: Mapping[str, str] | None = None, *, is_exact: bool = True) -> Manifest | None:
    """The manifest of the artifact at `path` if it is published, has its bytes and was made from `inputs`; else None,
    and it is to be made (again). One that is damaged is named in the log and set aside. Only under the run's lock.

    Args:
        inputs: what it would be made from now; None: whatever it was made from will do.
        is_exact: making it again gives the same bytes, and has to. A report, which holds times, is just deleted.

    Raises:
        SurplusFileError: a directory holds a file that was not published.
    """
    where = manifest_path(path)
    if not where.is_file():
        if path.exists():
            _logger.warning("%s has no manifest: it was never published, or that was deleted; it is made again", path)
        return None
    try:
        manifest = verify_published(path)
    except SurplusFileError:  # setting the folder aside would end in deleting what somebody put there
        raise
    except DamagedArtifactError as error:
        _logger.warning("%s; it is made again", str(error).partition(";")[0])
        set_aside(path)
        if not is_exact:
            forget(path)
        return None
    if inputs is None or manifest.inputs == dict(inputs):
        _logger.info("reused %s", path)
        return manifest
    _logger.info("%s was made from other inputs; it is made again", path)
    return None


def set_aside(path: Path) -> None:
    """Move an artifact and its manifest to hidden siblings: it is no longer published, but what it was is known."""
    forget(path)
    where = manifest_path(path)
    if where.is_file() and where.parent == path.parent:
        where.rename(_aside(where))
    if path.exists():
        path.rename(_aside(path))


def forget(path: Path) -> None:
    """Delete what was set aside of the artifact at `path`."""
    for leftover in (_aside(path), _aside(path.with_name(f"_{path.stem}.manifest.json"))):
        delete(leftover)


def delete(path: Path) -> None:
    """Delete a file, a folder with all that is in it, or a link (not what it leads to), if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """What is known of an artifact that was set aside."""

    published: str | None
    """sha256 in its manifest, if that can be read."""
    found: str | None
    """sha256 of what is left of it: right where only the manifest was altered."""
    manifest: bytes | None

    def check(self, path: Path, sha256: str) -> None:
        """Raise DamagedArtifactError unless the artifact made again has the bytes that it had, as far as is known."""
        known = {self.published, self.found} - {None}
        if known and sha256 not in known:
            refuse_other_bytes(path, sha256, self.published or self.found, "published before it was damaged")


def lost(path: Path) -> Lost | None:
    """What was set aside of the artifact at `path`, or None."""
    old = _aside(path)
    where = old / DIRECTORY_MANIFEST if old.is_dir() else _aside(path.with_name(f"_{path.stem}.manifest.json"))
    if not old.exists() and not where.is_file():
        return None
    left = old if old.exists() else path  # a crash came between the manifest's move and the file's
    found = None
    if left.is_dir():
        found = digest_of_listing(listing(left))
    elif left.is_file():
        found = digest(left)[1]
    try:
        manifest = read_manifest(where)
    except DamagedArtifactError:
        return Lost(published=None, found=found, manifest=None)
    return Lost(published=manifest.sha256, found=found, manifest=where.read_bytes())


def refuse_other_bytes(path: Path, made: str, expected: str | None, what: str) -> None:
    """Raise DamagedArtifactError: making `path` again gave other bytes than those that the run goes on from."""
    raise DamagedArtifactError(
        f"{path} was made again and came out otherwise: sha256 {made[:12]}…, {what} was {(expected or '?')[:12]}…. "
        "This machine or these versions do not reproduce the run; restore the file from a backup, or start a new run"
    )


def sweep_aside(root: Path) -> int:
    """Delete what is set aside of artifacts that have been made again; returns how many. Only under the run's lock."""
    swept = 0
    for leftover in [*root.rglob(f"{ASIDE_PREFIX}*")]:
        artifact = leftover.with_name(leftover.name.removeprefix(ASIDE_PREFIX))
        stem = artifact.name.removeprefix("_").removesuffix(".manifest.json")
        made = is_published(artifact) or (artifact.is_file() and artifact.name == f"_{stem}.manifest.json")
        if made and leftover.exists():
            swept += 1
            delete(leftover)
    return swept


def _aside(path: Path) -> Path:
    return path.with_name(f"{ASIDE_PREFIX}{path.name}")
