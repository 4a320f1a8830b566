"""Who was made from what in a run: an artifact is right if it is what later ones were made from."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from kdrl_core.errors import DamagedArtifactError, ForeignFileError
from kdrl_core.ledger.heal import find_intact
from kdrl_core.ledger.layout import checkpoint_label, stage_and_step
from kdrl_core.ledger.manifest import Manifest, is_published, manifest_of, verify_published
from kdrl_core.ledger.run import Run


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
    """The first published artifact that names `path` among its inputs, and the sha256 that it names."""
    name = run.relative(path)
    for consumer in _consumers(run, path):
        with suppress(DamagedArtifactError):
            if is_published(consumer) and (sha256 := manifest_of(consumer).inputs.get(name)) is not None:
                return consumer, sha256
    return None


def _consumers(run: Run, path: Path) -> Iterator[Path]:
    """What may have been made from the artifact at `path`, by the layout of a run."""
    paths, stages = run.paths, list[str](run.recipe.stages)
    place = run.relative(path)
    stage, step = stage_and_step(place)
    if path == paths.pool:
        yield from _first_artifacts(run, stages[0])
    elif stage not in stages:
        return
    elif place.startswith("checkpoints/") and step is not None:
        yield paths.rollouts(stage, step)
        for following in stages[stages.index(stage) + 1 :][:1]:
            yield from _first_artifacts(run, following)
        yield from (paths.student, paths.evaluation(stage), paths.evaluation(checkpoint_label(stage, step)))
    elif path == paths.sft_dataset(stage):
        yield paths.update(stage, 0)
    elif step is not None and path.stem == "update":
        yield from (paths.checkpoint(stage, step + 1), paths.rollouts(stage, step + 1))
    elif step is not None:
        yield paths.update(stage, step)


def _first_artifacts(run: Run, stage: str) -> tuple[Path, Path]:
    """Of an on-policy stage, and of one that samples its teacher first."""
    return run.paths.rollouts(stage, 0), run.paths.sample_rollouts(stage, 0)
