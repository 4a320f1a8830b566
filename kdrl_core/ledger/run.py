"""A run: its folder, its frozen recipe, and the refusal to resume it with another recipe."""

import hashlib
import json
import logging
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import kdrl_core
from kdrl_core.config import (
    Recipe,
    anchored,
    config_hash,
    did_you_mean,
    diff_recipes,
    dump_recipe,
    load_recipe,
    unsafe_changes,
)
from kdrl_core.config.changes import SAFE_FIELDS
from kdrl_core.config.paths import artifacts_root, read_json, why
from kdrl_core.errors import RecipeError, RunError
from kdrl_core.ledger.graph import folders
from kdrl_core.ledger.identity import Outside, difference, identify, is_outside, unmoved
from kdrl_core.ledger.lock import run_lock
from kdrl_core.ledger.manifest import verify_published
from kdrl_core.ledger.names import RunPaths
from kdrl_core.ledger.publish import replace_file, require_writable

_VERSIONED = ("torch", "transformers", "prefect", "pyarrow", "math-verify", "numpy")
_MIN_FREE_MB = 64
_REWRITE = "restore it from a backup, or have it written anew: kdrl run --recipe RECIPE"
_CARRIED = ("adopted", "outside", "served_teacher")
"""Keys of manifest.json that stay when it is written anew."""
_logger = logging.getLogger("kdrl")


@dataclass(frozen=True, slots=True)
class Run:
    """An opened run: paths and recipe."""

    paths: RunPaths
    recipe: Recipe

    @property
    def name(self) -> str:
        """The run's name."""
        return self.paths.name

    @property
    def started_at(self) -> str:
        """When the run was created, ISO 8601 in UTC."""
        return _created(self.paths.manifest)

    def inputs(self, *paths: Path) -> dict[str, str]:
        """What a new artifact is made from: each published file, verified now, with its hash."""
        return {self.paths.relative(path): verify_published(path).sha256 for path in paths}


def create_run(name: str, recipe: Recipe, *, artifacts: Path | None = None) -> Run:
    """Make the folder of a new run, or open it again under the same recipe.

    If a run has lost recipe.yaml or manifest.json, the other file tells whether `recipe` is its recipe. If it is, the
    lost file is written anew. The run's recipe has absolute paths.

    Raises:
        RunError: bad name, or the run's recipe differs in a field that changes results, or is lost with its manifest;
            or a file that the recipe names is not what it was (`settle_outside`).
        RunLockedError: another process works on it, so its recipe cannot be changed.
        StorageError: the folder cannot be written or the disk is full.
    """
    paths = RunPaths.of(name, artifacts)
    require_writable(paths.root.parent, free_mb=_MIN_FREE_MB)
    given, recipe = recipe, anchored(recipe)
    if not _is_begun(paths):
        with run_lock(paths.lock):
            replace_file(paths.recipe, dump_recipe(recipe).encode())
            _write_manifest(paths, recipe, history=[], outside=identify(recipe))
        return Run(paths, recipe)
    _restore_identity(paths, given)
    run = open_run(name, artifacts=artifacts)
    settle_outside(Run(paths, recipe))
    changes = diff_recipes(run.recipe, recipe)
    if not changes:
        return run
    entry = {"at": datetime.now(UTC).isoformat("T", "seconds"), "changes": [str(change) for change in changes]}
    with run_lock(paths.lock):
        history = _read_manifest(paths).get("history", [])
        # Announced first, so that a crash between the two files leaves a run that opens under either recipe.
        _write_manifest(paths, run.recipe, history=history, announced=recipe)
        replace_file(paths.recipe, dump_recipe(recipe).encode())
        _write_manifest(paths, recipe, history=[*history, entry])
    return Run(paths, recipe)


def require_same_recipe(name: str, recipe: Recipe, *, artifacts: Path | None = None) -> None:
    """Raise the RunError that `create_run` would raise for an existing run; writes nothing."""
    paths = RunPaths.of(name, artifacts)
    if _is_begun(paths):
        _identify(paths, recipe)
        require_same_outside(Run(paths, anchored(recipe)))


def require_resumable(run: Run, recipe: Recipe) -> None:
    """Raise RunError if `recipe` differs from the run's in fields that change results; the error lists them. A path may
    change if what it names now has the content that the run has recorded: a model that was moved."""
    old = anchored(run.recipe)
    if unsafe := unsafe_changes(old, unmoved(old, anchored(recipe), outside_of(run))):
        raise RunError(
            f"run {run.name} was started with another recipe: {'; '.join(map(str, unsafe))}. "
            "Use another run name, or resume with the recipe it was started with. "
            f"Safe to change are {', '.join(SAFE_FIELDS)}, and more steps in the last stage"
        )


def settle_outside(run: Run) -> Outside:
    """Compare the models, data and code that the recipe names with what manifest.json has recorded of them, and record
    what is new there. Returns all that is recorded.

    Raises:
        RunError: a content differs.
        RunLockedError: there is something to record, but another process works on the run.
    """
    recorded, found = require_same_outside(run)
    now = {**recorded, **found}
    if now != recorded:
        if new := sorted(found.keys() - recorded.keys()):
            _logger.info("the content of %s is recorded in %s from now on", ", ".join(new), run.paths.manifest)
        note(run, "outside", now)
    return now


def note(run: Run, key: str, value: Any) -> Any:
    """Write a value into the run's manifest.json; returns the one before. Raises RunLockedError if it differs and
    another process works on the run."""
    if _read_manifest(run.paths).get(key) == value:
        return value
    with run_lock(run.paths.lock):
        manifest = _read_manifest(run.paths)
        replace_file(run.paths.manifest, _as_json({**manifest, key: value}))
    return manifest.get(key)


def require_same_outside(run: Run) -> tuple[Outside, Outside]:
    """What is recorded and what is there now. Raises RunError as `settle_outside` does; writes nothing."""
    recorded = outside_of(run)
    found = identify(run.recipe, recorded)
    # A slot that has no files any more is not in `found`: whoever needs the files says that they are missing.
    told = {slot: difference(recorded[slot], found[slot]) for slot in found if slot in recorded}
    if changed := [f"{slot}={found[slot]['path']}: {what}" for slot, what in told.items() if what is not None]:
        raise RunError(
            f"run {run.name} began with other files than are there now: {'; '.join(changed)}. "
            "Restore the files that it began with, or start a new run with these"
        )
    return recorded, found


def outside_of(run: Run) -> Outside:
    """What the run's manifest.json has recorded of models, data and code outside of the run; empty for a run of an
    earlier version of kdrl, and if the manifest is lost."""
    found: object = {}
    with suppress(RunError, OSError):
        found = _read_manifest(run.paths).get("outside", {})
    if not is_outside(found):
        raise RunError(f"{run.paths.manifest}, 'outside': not what kdrl wrote; {_REWRITE} --name {run.name}")
    return found


def record_adoption(run: Run, donor: Run, what: str, artifacts: Mapping[str, str]) -> None:
    """Note in the run's manifest.json that `what` comes from another run: which one, its recipe's hash and versions,
    when, and a hash over the adopted artifacts (place → sha256). The note is written before them, so that none is ever
    there without it."""
    listing = "".join(f"{artifacts[place]} {place}\n" for place in sorted(artifacts))
    theirs = _read_manifest(donor.paths)
    entry = {
        "what": what,
        "run": donor.name,
        "config_hash": theirs.get("config_hash"),
        "versions": theirs.get("versions"),
        "num_artifacts": len(artifacts),
        "sha256": hashlib.sha256(listing.encode()).hexdigest(),
        "at": datetime.now(UTC).isoformat("T", "seconds"),
    }
    kept = [one for one in adopted(run) if one["what"] != what]  # replaces an interrupted adoption
    note(run, "adopted", [*kept, entry])


def adopted(run: Run) -> list[dict[str, Any]]:
    """What the run took over from others, as `record_adoption` notes it."""
    found: list[dict[str, Any]] = _read_manifest(run.paths).get("adopted", [])
    return found


def open_run(name: str, *, artifacts: Path | None = None) -> Run:
    """Open a run by name.

    Raises:
        RunError: no such run (the nearest names are given), or recipe.yaml is not the one that the manifest records.
    """
    paths = RunPaths.of(name, artifacts)
    if paths.recipe.exists() and not paths.manifest.exists():
        raise RunError(
            f"{paths.manifest} is missing; to have it written anew: kdrl run --recipe {paths.recipe} --name {name}"
        )
    if not paths.manifest.exists():
        known = list_runs(artifacts)
        listing = f"runs here: {', '.join(known[-8:])}" if known else "there are none yet; start one with kdrl run"
        raise RunError(f"no run '{name}' in {paths.root.parent}{did_you_mean(name, known)}; {listing}")
    manifest = _read_manifest(paths)
    if not paths.recipe.exists():
        raise RunError(f"{paths.recipe} is missing; {_REWRITE} --name {name}, with the recipe it was started with")
    recipe = load_recipe(paths.recipe)
    if config_hash(recipe) not in (manifest.get("config_hash"), manifest.get("announced_config_hash")):
        raise RunError(
            f"{paths.recipe} was changed by hand: it is not the recipe of the run's manifest. "
            "Undo the change, or start a new run with it"
        )
    return Run(paths, recipe)


def open_run_dir(run_dir: str | Path) -> Run:
    """Open a run by its folder. Raises RunError as `open_run` does."""
    root = Path(run_dir)
    return open_run(root.name, artifacts=root.parent.parent)


def list_runs(artifacts: Path | None = None) -> list[str]:
    """Names of the runs in the artifacts folder, oldest first, also of those that lack recipe.yaml or manifest.json."""
    folder = (artifacts or artifacts_root()) / "runs"
    roots = {path.parent for name in ("manifest.json", "recipe.yaml") for path in folder.glob(f"*/{name}")}
    return [root.name for root in sorted(roots, key=lambda root: (_created(root / "manifest.json"), root))]


def _is_begun(paths: RunPaths) -> bool:
    return paths.manifest.is_file() or any((paths.root / folder).exists() for folder in folders())


def _identify(paths: RunPaths, recipe: Recipe) -> tuple[Recipe | None, Mapping[str, Any] | None]:
    """Contents of recipe.yaml and manifest.json of a begun run; None for a file that is lost or cannot be read.

    Raises:
        RunError: both are lost, or the run may not be resumed with `recipe`.
    """
    kept: Recipe | None = None
    with suppress(RecipeError):
        kept = load_recipe(paths.recipe) if paths.recipe.is_file() else None
    try:
        recorded = _read_manifest(paths) if paths.manifest.is_file() else None
    except RunError:
        recorded = None
    if kept is not None:
        if recorded is not None:
            open_run(paths.name, artifacts=paths.root.parent.parent)
        require_resumable(Run(paths, kept), recipe)
    elif recorded is None:
        raise RunError(
            f"{paths.root} holds artifacts, but no readable recipe.yaml or manifest.json says what they are; "
            "restore one of them, or use another run name"
        )
    elif recorded.get("config_hash") not in (config_hash(recipe), config_hash(anchored(recipe))):
        raise RunError(
            f"{paths.recipe} is missing or cannot be read, and the recipe given is not the one that the run was "
            "started with; give that one, or use another run name"
        )
    return kept, recorded


def _restore_identity(paths: RunPaths, recipe: Recipe) -> None:
    """Write the run's manifest.json from its recipe.yaml, or the other way round, if one is lost and `recipe` fits.

    Raises:
        RunError: as `_identify`.
    """
    kept, recorded = _identify(paths, recipe)
    if recorded is None and kept is not None:
        _logger.warning("%s is missing or cannot be read; it is written anew from recipe.yaml", paths.manifest)
        with run_lock(paths.lock):
            _write_manifest(paths, kept, history=[])
    elif kept is None:
        _logger.warning("%s is missing or cannot be read; it is written anew", paths.recipe)
        if recorded is not None and recorded.get("config_hash") != config_hash(recipe):
            recipe = anchored(recipe)
        with run_lock(paths.lock):
            replace_file(paths.recipe, dump_recipe(recipe).encode())


def _created(path: Path) -> str:
    try:
        return str(read_json(path)["created_at"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _read_manifest(paths: RunPaths) -> Mapping[str, Any]:
    try:
        manifest = read_json(paths.manifest)
    except (OSError, ValueError) as error:
        raise RunError(f"{paths.manifest} cannot be read ({why(error)}); {_REWRITE} --name {paths.name}") from error
    if not isinstance(manifest, dict):
        raise RunError(f"{paths.manifest} is not a manifest; {_REWRITE} --name {paths.name}")
    return manifest


def _write_manifest(
    paths: RunPaths,
    recipe: Recipe,
    *,
    history: list[Any],
    announced: Recipe | None = None,
    outside: Outside | None = None,
) -> None:
    created, carried = _created(paths.manifest) if paths.manifest.is_file() else "", {}
    with suppress(RunError, OSError):
        old = _read_manifest(paths)
        carried = {key: old[key] for key in _CARRIED if old.get(key)}
    if outside:
        carried["outside"] = outside
    manifest: dict[str, Any] = {
        "run": paths.name,
        "recipe": recipe.name,
        "config_hash": config_hash(recipe),
        "seed": recipe.seed,
        "created_at": created or datetime.now(UTC).isoformat("T", "milliseconds"),
        "versions": {"kdrl": kdrl_core.__version__, "python": platform.python_version(), **_versions()},
        "history": history,
    }
    if announced is not None:
        manifest["announced_config_hash"] = config_hash(announced)
    replace_file(paths.manifest, _as_json({**manifest, **carried}))


def _as_json(manifest: Mapping[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1) + "\n").encode()


def _versions() -> dict[str, str]:
    found = {}
    for package in _VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
