"""A sweep's folder: its record, the recipes of its cells, and why a cell failed. The runs themselves say what is done.

artifacts/sweeps/<sweep>/
  sweep.json          the record: the sweep as it was last started, with its options and its cells
  cells/<run>.yaml    the recipe of each cell, every field written out
  logs/<run>.log      what the cell's process wrote
  failures/<run>.json why it failed, until it is started again
  report/             of the results so far: sweep.html, sweep.md, sweep.csv, sweep.json
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from kdrl_core.boxes.completion import is_finished
from kdrl_core.config.paths import artifacts_root, read_json, validate_run_name, why
from kdrl_core.errors import KdrlError, RunError
from kdrl_core.ledger import RunPaths, lock_holder, open_run, replace_file
from kdrl_core.look.sweeps.spec import CellName, SweepSpec, validate_sweep


class CellState(StrEnum):
    """How far a cell is."""

    FINISHED = "finished"
    RUNNING = "running"
    FAILED = "failed"
    STOPPED = "stopped"
    PENDING = "pending"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Source and options of a sweep."""

    source: str | None = None
    """Name of a shipped sweep or of a file, or `--vary`; None for sweeps that an older version has started."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """recipe, seeds and vary (field → values), if they were given beside the source."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRecord:
    """A sweep as it was last started."""

    spec: SweepSpec
    overrides: tuple[str, ...]
    share_with: tuple[str, ...]
    """Other sweeps, whose cells may be shared as well."""
    cells: tuple[CellName, ...]
    origin: Origin


@dataclass(frozen=True, slots=True)
class SweepPaths:
    """The files of one sweep, all below `root`."""

    root: Path

    @classmethod
    def of(cls, name: str) -> "SweepPaths":
        """Paths of a sweep by name. Raises RunError for a name that is not one plain folder name."""
        return cls(artifacts_root() / "sweeps" / validate_run_name(name))

    @property
    def record(self) -> Path:
        return self.root / "sweep.json"

    @property
    def lock(self) -> Path:
        """Lock of the process that runs the sweep."""
        return self.root / "sweep.lock"

    @property
    def report(self) -> Path:
        return self.root / "report"

    def recipe(self, run: str) -> Path:
        return self.root / "cells" / f"{run}.yaml"

    def log(self, run: str) -> Path:
        return self.root / "logs" / f"{run}.log"

    def failure(self, run: str) -> Path:
        return self.root / "failures" / f"{run}.json"


def list_started() -> list[str]:
    """Names of the sweeps that were started."""
    return sorted(path.parent.name for path in artifacts_root().glob("sweeps/*/sweep.json"))


def read_record(name: str) -> SweepRecord:
    """A sweep that was started. Raises RunError if there is none of that name, or its record cannot be read."""
    path = SweepPaths.of(name).record
    if not path.exists():
        known = ", ".join(list_started()) or "none yet"
        raise RunError(f"no sweep '{name}' was started here (started: {known}); start it with: kdrl sweep run {name}")
    try:
        content = read_json(path)
        return SweepRecord(
            spec=validate_sweep(content["spec"], origin=str(path)),
            overrides=tuple(content["overrides"]),
            share_with=tuple(content["share_with"]),
            cells=tuple(CellName(**cell) for cell in content["cells"]),
            origin=Origin(**content.get("origin", {})),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path} cannot be read ({why(error)}); have it written anew: kdrl sweep run, with the options it had"
        ) from error


def note_failure(paths: SweepPaths, run: str, reason: str) -> None:
    content = {"reason": reason, "at": datetime.now(UTC).isoformat("T", "seconds")}
    replace_file(paths.failure(run), (json.dumps(content, ensure_ascii=False) + "\n").encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class CellStatus(CellName):
    """Where a cell stands."""

    state: CellState
    detail: str = ""
    """Running: the process. Failed: the reason. Stopped: the command that continues it."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def cell_status(paths: SweepPaths, cell: CellName) -> CellStatus:
    """The status of a cell, read from its run's files. A run that cannot be opened has failed."""
    failure = None
    with suppress(OSError, ValueError, KeyError, TypeError):
        failure = str(read_json(paths.failure(cell.run))["reason"])
    state, detail = state_of(cell.run, failure=failure)
    return CellStatus(run=cell.run, variant=cell.variant, seed=cell.seed, state=state, detail=detail)


def state_of(run_name: str, *, failure: str | None = None) -> tuple[CellState, str]:
    """State of a run, and its detail as in `CellStatus`. `failure`: why it failed when it was last started, if that is
    known."""
    files = RunPaths.of(run_name)
    if holder := lock_holder(files.lock):
        return CellState.RUNNING, holder
    if not files.root.is_dir():
        return (CellState.PENDING, "") if failure is None else (CellState.FAILED, failure)
    try:
        finished = is_finished(open_run(run_name))
    except KdrlError as error:
        return CellState.FAILED, str(error)
    if finished:
        return CellState.FINISHED, ""
    if failure is not None:
        return CellState.FAILED, failure
    return CellState.STOPPED, f"kdrl resume {run_name}"
