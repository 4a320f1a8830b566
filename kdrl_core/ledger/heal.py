"""Damage: an artifact whose bytes have changed is set aside and made again, and must come out with the same bytes.

Making an artifact again gives the same bytes, on a CPU at least. So a lost artifact can be made again, and all that was
made from it stays valid. If the bytes differ (another machine, another version, a sampler that is not deterministic),
nothing is published: the error gives both hashes.

Where models do not compute the same bits again, another version takes its place (`kdrl_core.ledger.versions`).

In a run an artifact is right if it was made from the files that are there, and later ones were made from it.
"""

import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdrl_core.errors import DamagedArtifactError, ForeignFileError
from kdrl_core.ledger.artifact import EVERY, Node
from kdrl_core.ledger.graph import consumers, node_at
from kdrl_core.ledger.manifest import (
    DIRECTORY_MANIFEST,
    Manifest,
    artifact_stem,
    digest,
    digest_of_listing,
    file_manifest_path,
    is_published,
    listing,
    manifest_of,
    manifest_path,
    read_manifest,
    verify_published,
)

if TYPE_CHECKING:
    from kdrl_core.ledger.run import Run

ASIDE_PREFIX = ".damaged-"
_logger = logging.getLogger("kdrl")


def find_intact(path: Path, inputs: Mapping[str, str] | None = None, *, is_exact: bool = True) -> Manifest | None:
    """The manifest of the artifact at `path` if it is published, undamaged and made from `inputs`. None: make it
    (again). A damaged artifact is named in the log and set aside. Only under the run's lock.

    A folder without manifest is damaged, since folders are published in one rename. A file without manifest may be left
    from a crash before its manifest was written; it is made anew.

    Args:
        inputs: what it would be made from now; None: any inputs will do.
        is_exact: it must have the same bytes when made again. If not (a report holds times), it is just deleted.

    Raises:
        ForeignFileError: it is another artifact, or a directory holds a file that was not published. Setting it aside
            would later delete what somebody put there.
    """
    where = manifest_path(path)
    if not where.is_file():
        if path.exists():
            _logger.warning("%s has no manifest: it was never published, or that was deleted; it is made again", path)
        if path.is_dir() and not path.is_symlink():
            _make_way(path, is_exact=is_exact)
        return None
    try:
        manifest = verify_published(path)
    except ForeignFileError:
        raise
    except DamagedArtifactError as error:
        _logger.warning("%s; it is made again", error.problem)
        _make_way(path, is_exact=is_exact)
        return None
    if inputs is None or manifest.inputs == dict(inputs):
        _logger.info("reused %s", path)
        return manifest
    _logger.info("%s was made from other inputs; it is made again", path)
    return None


def _make_way(path: Path, *, is_exact: bool) -> None:
    set_aside(path)
    if not is_exact:
        forget(path)


def set_aside(path: Path) -> None:
    """Move an artifact and its manifest to hidden siblings: it is no longer published, but its hashes stay known."""
    forget(path)
    where = manifest_path(path)
    if where.is_file() and where.parent == path.parent:
        where.rename(_aside(where))
    if path.exists():
        path.rename(_aside(path))


def forget(path: Path) -> None:
    """Delete the set-aside files of the artifact at `path`."""
    for leftover in set_aside_of(path):
        delete(leftover)


def set_aside_of(path: Path) -> tuple[Path, Path]:
    """Where an artifact and its manifest lie while they are set aside."""
    return _aside(path), _aside(file_manifest_path(path))


def delete(path: Path) -> None:
    """Delete a file, a folder with its content, or a link (not its target), if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def settled(path: Path, made: Manifest, expected: str | None) -> Manifest:
    """The manifest to publish for the artifact at `path`: `made`, or the old manifest if the artifact was set aside and
    came out the same.

    Args:
        expected: sha256 that later published artifacts were made from; None if there are none.

    Raises:
        DamagedArtifactError: the new hash is not `expected`, or not a known hash of what was set aside.
    """
    if expected is not None and made.sha256 != expected:
        was = f"later artifacts were made from {expected[:12]}…"
        remedy = "restore it from a backup, or start a new run; see `kdrl check` for a run on GPUs or with vLLM"
        _refuse_other_bytes(path, made.sha256, was, remedy)
    lost = _lost(path)
    if lost is None:
        return made
    known = {lost.published.sha256} if lost.published else set()
    known |= {lost.found} if lost.found else set()  # right if only the manifest was altered
    if expected is None and known and made.sha256 not in known:
        aside = _aside(path) if _aside(path).exists() else path
        was = f"the damaged one had {' or '.join(sorted(f'{sha256[:12]}…' for sha256 in known))}"
        remedy = f"restore it from a backup, start a new run, or, if it is beyond repair, delete {aside}"
        _refuse_other_bytes(path, made.sha256, was, remedy)
    return lost.published if lost.published is not None and _is_same(lost.published, made) else made


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lost:
    """What is known of an artifact that was set aside."""

    published: Manifest | None
    """Its manifest, if that can be read."""
    found: str | None
    """sha256 of what is left of it."""


def _lost(path: Path) -> _Lost | None:
    old = _aside(path)
    where = old / DIRECTORY_MANIFEST if old.is_dir() else _aside(file_manifest_path(path))
    if not old.exists() and not where.is_file():
        return None
    left = old if old.exists() else path  # a crash came between the manifest's move and the file's
    found = None
    if left.is_dir():
        found = digest_of_listing(listing(left))
    elif left.is_file():
        found = digest(left)[1]
    try:
        return _Lost(published=read_manifest(where), found=found)
    except DamagedArtifactError:
        return _Lost(published=None, found=found)


def _is_same(old: Manifest, new: Manifest) -> bool:
    """Whether two manifests differ only in times and versions."""
    facts = ("artifact", "size", "sha256", "inputs", "files")
    return (
        all(getattr(old, fact) == getattr(new, fact) for fact in facts) and old.metadata.keys() == new.metadata.keys()
    )


def _refuse_other_bytes(path: Path, made: str, was: str, remedy: str) -> None:
    raise DamagedArtifactError(
        f"{path} was made again and came out otherwise: its sha256 is {made[:12]}…, {was}. "
        "This machine or these versions do not reproduce the run, or both the artifact and its manifest were damaged",
        remedy,
    )


def sweep_aside(root: Path) -> int:
    """Delete set-aside files of artifacts that were made again; returns how many. Only under the run's lock."""
    swept = 0
    for leftover in [*root.rglob(f"{ASIDE_PREFIX}*")]:
        artifact = leftover.with_name(leftover.name.removeprefix(ASIDE_PREFIX))
        made = is_published(artifact) or (artifact.is_file() and artifact_stem(artifact) is not None)
        if made and leftover.exists():
            swept += 1
            delete(leftover)
    return swept


def _aside(path: Path) -> Path:
    return path.with_name(f"{ASIDE_PREFIX}{path.name}")


def required_sha256(run: "Run", path: Path) -> str | None:
    """The sha256 that the artifact at `path` must have because a published one was made from it; None if none was."""
    used = _use(run, path)
    return None if used is None else used[1]


def find_own(run: "Run", path: Path, inputs: Mapping[str, str] | None = None) -> Manifest | None:
    """`find_intact`, and more: the artifact was made from the files that are there, and later ones from it.

    Raises:
        ForeignFileError: it is undamaged, but this does not hold.
    """
    found = find_intact(path, inputs)
    if found is not None:
        _require_own(run, path, found)
    return found


def verify_own(run: "Run", path: Path) -> Manifest:
    """`verify_published`, and more: the artifact was made from the files that are there, and later ones from it.

    Raises:
        DamagedArtifactError, RunError: as `verify_published`.
        ForeignFileError: it is undamaged, but this does not hold.
    """
    manifest = verify_published(path)
    _require_own(run, path, manifest)
    return manifest


def changed_inputs(run: "Run", manifest: Manifest) -> list[str]:
    """Published inputs whose hash is no longer the one that the artifact was made from."""
    changed = []
    for name, sha256 in manifest.inputs.items():
        path = run.paths.root / name
        with suppress(DamagedArtifactError):  # reported when the input itself is checked
            if not Path(name).is_absolute() and is_published(path) and manifest_of(path).sha256 != sha256:
                changed.append(name)
    return changed


def _require_own(run: "Run", path: Path, found: Manifest) -> None:
    if changed := changed_inputs(run, found):
        raise ForeignFileError(
            f"{path} was made from other files than are there now: {', '.join(changed)}",
            "either it or they are not of this run: restore those from a backup, or delete them to be made again",
        )
    used = _use(run, path)
    if used is not None and used[1] != found.sha256:
        raise ForeignFileError(
            f"{path} is whole, but not the one that {run.paths.relative(used[0])} was made from: its sha256 is "
            f"{found.sha256[:12]}…, that of the other {used[1][:12]}…",
            "one of the two is not of this run: restore it from a backup, or delete it to have it made again",
        )


def _use(run: "Run", path: Path) -> tuple[Path, str] | None:
    """The first published artifact that names `path` among its inputs, and the sha256 that it names.

    An artifact that is not exact need not have certain bytes. A consumer that `follows` its inputs requires none.
    """
    name = run.paths.relative(path)
    node = node_at(name)
    if node is None or not node.row.is_exact:
        return None
    for consumer in consumers(run.recipe, node):
        if consumer.row.follows:
            continue
        for other in published(run, consumer):
            with suppress(DamagedArtifactError):
                if (sha256 := manifest_of(other).inputs.get(name)) is not None:
                    return other, sha256
    return None


def published(run: "Run", node: Node) -> list[Path]:
    """The path of a node if it is published; for EVERY, the paths of all published shards."""
    paths = sorted(run.paths.root.glob(node.place)) if node.at == EVERY else [run.paths.root / node.place]
    return [path for path in paths if is_published(path)]
