"""Who was made from what in a run: an artifact is right if it is what later ones were made from."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from kdrl_core.errors import DamagedArtifactError, ForeignFileError
from kdrl_core.ledger.artifact import EVERY, Node
from kdrl_core.ledger.graph import consumers, needs, node_at
from kdrl_core.ledger.heal import find_intact
from kdrl_core.ledger.manifest import Manifest, is_published, manifest_of, verify_published
from kdrl_core.ledger.run import Run


def inputs_of(run: Run, node: Node) -> dict[str, str]:
    """What `node` is made from now, by the hashes in the manifests: place → sha256. What is not there is left out."""
    found: dict[str, str] = {}
    for choice in needs(run.recipe, node):
        paths = next((paths for each in choice if (paths := published(run, each))), [])
        found |= {run.relative(path): manifest_of(path).sha256 for path in paths}
    return found


def required_sha256(run: Run, path: Path) -> str | None:
    """The sha256 that the artifact at `path` has to have: that which something published was made from, if anything."""
    used = _use(run, path)
    return None if used is None else used[1]


def find_own(run: Run, path: Path, inputs: Mapping[str, str] | None = None) -> Manifest | None:
    """`find_intact`, and what is intact was made from the files that are there, and is what later ones were made from.

    Raises:
        ForeignFileError: it is whole, but another one than that.
    """
    found = find_intact(path, inputs)
    if found is not None:
        _require_own(run, path, found)
    return found


def verify_own(run: Run, path: Path) -> Manifest:
    """`verify_published`, and more: it was made from the files that are there, and is what later ones were made from.

    Raises:
        DamagedArtifactError, RunError: as `verify_published`.
        ForeignFileError: it is whole, but another one than that.
    """
    manifest = verify_published(path)
    _require_own(run, path, manifest)
    return manifest


def changed_inputs(run: Run, manifest: Manifest) -> list[str]:
    """Inputs that are there, have manifests, and are not those that the artifact was made from."""
    changed = []
    for name, sha256 in manifest.inputs.items():
        path = run.paths.root / name
        with suppress(DamagedArtifactError):  # told where that one is looked at
            if not Path(name).is_absolute() and is_published(path) and manifest_of(path).sha256 != sha256:
                changed.append(name)
    return changed


def _require_own(run: Run, path: Path, found: Manifest) -> None:
    if changed := changed_inputs(run, found):
        raise ForeignFileError(
            f"{path} was made from other files than are there now: {', '.join(changed)}",
            "either it or they are not of this run: restore those from a backup, or delete them to be made again",
        )
    used = _use(run, path)
    if used is not None and used[1] != found.sha256:
        raise ForeignFileError(
            f"{path} is whole, but not the one that {run.relative(used[0])} was made from: its sha256 is "
            f"{found.sha256[:12]}…, that of the other {used[1][:12]}…",
            "one of the two is not of this run: restore it from a backup, or delete it to have it made again",
        )


def _use(run: Run, path: Path) -> tuple[Path, str] | None:
    """The first published artifact that names `path` among its inputs, and the sha256 that it names.

    What has other bytes whenever it is made is held to none of them; what follows its inputs does not hold them to any.
    """
    name = run.relative(path)
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


def published(run: Run, node: Node) -> list[Path]:
    """The path of a node if it is published; of all shards, the paths of those that are."""
    paths = sorted(run.paths.root.glob(node.place)) if node.at == EVERY else [run.paths.root / node.place]
    return [path for path in paths if is_published(path)]
