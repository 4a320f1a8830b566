"""All checks of a recipe on this machine, and their report. Nothing of kdrl's is left on the disk."""

import fcntl
import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kdrl_core.config import Recipe, dump_recipe
from kdrl_core.config.paths import artifacts_root
from kdrl_core.errors import EngineError
from kdrl_core.ledger.lock import redact
from kdrl_core.ledger.publish import storage_errors
from kdrl_core.look.doctor import machine, versions
from kdrl_core.look.doctor.checks import CheckFailed, CheckResult, CheckStatus, Emit, Observed, Recorder
from kdrl_core.look.doctor.child import ChildSpec
from kdrl_core.look.doctor.watch import watch_child
from kdrl_core.models.devices import Gpu, gpus

PYTHON, PACKAGES, CUDA, DRIVER = "Python", "packages", "CUDA of torch", "driver"
COMPILER = "C compiler"
GPUS, LINKS, SHARED_MEMORY, OPEN_FILES, DISK = "GPUs", "links of the GPUs", "shared memory", "open files", "disk"
REAL = "a step for real"
_BLOCKING = (PYTHON, PACKAGES, CUDA, DRIVER, GPUS, DISK)
"""Checks without which nothing can be loaded."""
_PREFIX = ".doctor-"
_LOCK = "lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What all checks found."""

    recipe: str
    checks: tuple[CheckResult, ...]
    versions: dict[str, str]
    machine: dict[str, Any]
    folder: Path
    """On the disk that was measured."""

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed."""
        return [each.check for each in self.checks if each.status == CheckStatus.FAILED]

    def to_json(self) -> dict[str, Any]:
        """Plain values for a bug report; without keys, and with places of this machine by name only."""
        values = {
            "recipe": self.recipe,
            "failed": self.failed,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "versions": self.versions,
            "machine": self.machine,
            "checks": [asdict(each) for each in self.checks],
        }
        names = {str(self.folder): "FOLDER", str(Path.cwd()): ".", str(Path.home()): "~", socket.gethostname(): "HOST"}
        return dict(_each_text(values, partial(_discreet, names)))


def examine(recipe: Recipe, *, folder: Path | None = None, on_event: Emit) -> Diagnosis:
    """Check the machine, then try the recipe for real, as far as what is found allows.

    Args:
        folder: on the disk to measure; default: the artifacts folder.
        on_event: told of each check as it begins and ends.
    """
    results: list[CheckResult] = []

    def emit(event: dict[str, Any]) -> None:
        if event["event"] == "end":
            results.append(CheckResult(**{name: value for name, value in event.items() if name != "event"}))
        on_event(event)

    recorder = Recorder(emit)
    found: list[Gpu] = []
    _check_versions(recipe, recorder, found)
    root = folder or artifacts_root()
    try:
        with doctor_folder(root) as place:
            recorder.run(DISK, partial(machine.check_disk, place))
            failed = [each.check for each in results if each.status == CheckStatus.FAILED]
            if blocking := [check for check in _BLOCKING if check in failed]:
                _skip(emit, f"nothing can be loaded before this is mended: {', '.join(blocking)}")
            else:
                _try(recipe, place, tuple(found), emit)
    except OSError as error:
        if any(each.check == DISK for each in results):
            raise
        recorder.run(DISK, partial(_refuse, error))
        _skip(emit, f"nothing can be written before this is mended: {DISK}")
    return Diagnosis(
        recipe=recipe.name,
        checks=tuple(results),
        versions=versions.installed_versions(),
        machine=machine.describe_machine(found),
        folder=root,
    )


def _check_versions(recipe: Recipe, recorder: Recorder, found: list[Gpu]) -> None:
    """The checks before anything is written; fills `found` with the GPUs."""

    def look() -> Observed:
        try:
            found.extend(gpus())
        except EngineError as error:
            if machine.gpus_needed(recipe):
                raise
            return Observed(says=str(error))
        return machine.check_visible_gpus(recipe, found)

    recorder.run(PYTHON, versions.check_python)
    recorder.run(PACKAGES, partial(versions.check_packages, recipe))
    recorder.run(CUDA, partial(versions.check_torch_cuda, recipe))
    recorder.run(COMPILER, partial(versions.check_compiler, recipe))
    recorder.run(GPUS, look)
    recorder.run(DRIVER, partial(versions.check_driver, recipe, found))
    recorder.run(LINKS, partial(machine.check_links, recipe, found))
    recorder.run(SHARED_MEMORY, partial(machine.check_shared_memory, recipe))
    recorder.run(OPEN_FILES, partial(machine.check_open_files, recipe))


def _try(recipe: Recipe, place: Path, found: Sequence[Gpu], emit: Emit) -> None:
    spec = ChildSpec(recipe=place / "recipe.yaml", folder=place, gpus=tuple(found))
    spec.recipe.write_text(dump_recipe(recipe), encoding="utf-8")
    spec.write(file := place / "spec.json")
    watch_child(file, emit, log=place / "child.log", environment={"KDRL_ARTIFACTS": str(place)})


def _skip(emit: Emit, why: str) -> None:
    emit({"event": "end", "check": REAL, "status": CheckStatus.SKIPPED, "seconds": 0.0, "says": why})


def _refuse(error: OSError) -> Observed:
    raise CheckFailed(str(error), "give a folder that can be written: --folder DIR, KDRL_ARTIFACTS=DIR") from error


@contextmanager
def doctor_folder(root: Path) -> Iterator[Path]:
    """A new folder below `root`, removed at the end, with folders of doctors that were killed. Raises StorageError."""
    is_new = not root.exists()
    with storage_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        place = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
        lock = os.open(place / _LOCK, os.O_CREAT | os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with this process, however it ends
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        os.close(lock)
        if is_new:
            with suppress(OSError):
                root.rmdir()


def _sweep(root: Path) -> None:
    """Remove what doctors have left that were killed: folders whose lock nobody holds."""
    for place in root.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            lock = os.open(place / _LOCK, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(place, ignore_errors=True)
            finally:
                os.close(lock)


def _each_text(value: Any, change: Any) -> Any:
    """A JSON value with `change` applied to every text in it."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {name: _each_text(each, change) for name, each in value.items()}
    return [_each_text(each, change) for each in value] if isinstance(value, list | tuple) else value


def _discreet(names: dict[str, str], text: str) -> str:
    """Without keys, and with `names` in place of folders and hosts that may be called after a person."""
    for place, name in names.items():
        if len(place) > 1:
            text = text.replace(place, name)
    return redact(text)
