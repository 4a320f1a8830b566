"""Other versions of artifacts, for runs whose models do not compute the same bits again (`Recipe.is_exact`).

If an artifact that a model has made is lost there, making it again gives other bytes. So a new version takes its place,
and all that was made from the old one is made again. If artifacts of later steps are among that, it happens only when
somebody asks for it. Nothing is lost: the old files are kept below `.replaced`, where no reader looks for artifacts.
"""

import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrl_core.errors import DamagedArtifactError
from kdrl_core.ledger.artifact import Node
from kdrl_core.ledger.graph import made_from
from kdrl_core.ledger.heal import forget, published, required_sha256, set_aside_of
from kdrl_core.ledger.manifest import file_manifest_path, manifest_path, read_manifest

if TYPE_CHECKING:
    from kdrl_core.ledger.run import Run

REPLACED = ".replaced"
"""Folder of a run: `<n>/<place>` below it is the n-th version of the artifact at that place."""
_logger = logging.getLogger("kdrl")


def replace_lost(run: "Run", node: Node) -> None:
    """Make way for another version of an artifact that is not published (any more), if something is left of it or was
    made from it. Does nothing if this would cost artifacts of later steps. Only under the run's lock."""
    path = run.paths.root / node.place
    is_lost = any(left.exists() for left in set_aside_of(path)) or required_sha256(run, path) is not None
    if is_lost and not later_than(run, node):
        kept = give_up(run, node)
        told = (
            "%s is lost, and this run cannot make the same bytes again: another version takes its place; kept in %s: %s"
        )
        _logger.warning(told, path, run.paths.root / REPLACED, ", ".join(reversed(kept)))


def later_than(run: "Run", node: Node) -> list[Node]:
    """Published artifacts that were made from a node and do not belong to its step: replacing it costs them. Those that
    hold times do not count, since they are made again whenever their inputs change."""
    found = [each for each in made_from(run.recipe, node) if published(run, each)]
    return [each for each in found if each.row.is_exact and (each.stage, each.at) != (node.stage, node.at)]


def give_up(run: "Run", node: Node) -> list[str]:
    """Move an artifact, and everything that was made from it, into `.replaced`. The latest goes first, so that a crash
    leaves the run as it was at an earlier time. Returns the places in this order. Only under the run's lock."""
    root, kept = run.paths.root, []
    for each in (*made_from(run.recipe, node), node):
        for path in sorted(root.glob(each.place)) or [root / each.place]:
            if _keep(root, path):
                kept.append(run.paths.relative(path))
    return kept


def version_of(run: "Run", node: Node) -> dict[str, Any]:
    """What the manifest of an artifact records if it replaces others: its `version`, from 2 on, and in `replaces` where
    the one before is kept and its sha256. Empty for a first version."""
    root = run.paths.root
    before = _versions(root, node.place)
    if not before:
        return {}
    replaces: dict[str, Any] = {"kept": before[-1].relative_to(root).as_posix()}
    with suppress(DamagedArtifactError):
        replaces["sha256"] = read_manifest(manifest_path(before[-1])).sha256
    return {"version": len(before) + 1, "replaces": replaces}


def _versions(root: Path, place: str) -> list[Path]:
    """Where the earlier versions of a place are kept, the first one first."""
    found: list[Path] = []
    while _is_there(kept := root / REPLACED / str(len(found) + 1) / place):
        found.append(kept)
    return found


def _keep(root: Path, path: Path) -> bool:
    """Move what there is of an artifact and its manifest, set aside or not; whether there was something."""
    place = path.relative_to(root)
    kept = root / REPLACED / str(len(_versions(root, place.as_posix())) + 1) / place
    was_there = False
    for here, aside, there in zip(
        (path, file_manifest_path(path)), set_aside_of(path), (kept, file_manifest_path(kept)), strict=True
    ):
        if left := [each for each in (here, aside) if each.exists()]:
            kept.parent.mkdir(parents=True, exist_ok=True)
            left[0].rename(there)
            was_there = True
    forget(path)
    return was_there


def _is_there(path: Path) -> bool:
    return path.exists() or file_manifest_path(path).is_file()
