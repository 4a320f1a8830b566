"""Variants × seeds as subflows, a few at a time: the deployment `kdrl-sweep/sweep`.

Each cell is a run of `kdrl/full-pipeline` in its own process: torch, DeepSpeed and vLLM each expect a process for
themselves, and a cell that runs out of memory ends alone. With `deployment`, workers run the cells instead. If a cell
fails, it is reported, and the others go on.
"""

import logging
import time
from contextlib import ExitStack
from typing import Any

from prefect import flow, runtime

from flows import shown
from flows.guard import guard_children
from flows.running_cells import STOP_TIMEOUT_S, DeployedCell, LocalCell
from flows.signals import end_in_order
from flows.stopping import stop_if_cancelled, stoppable
from kdrl_core.boxes.make import read_progress
from kdrl_core.boxes.sharing import is_finished_part, parts_of
from kdrl_core.config.outside import named_models
from kdrl_core.errors import RunError, Stopped
from kdrl_core.ledger import RunPaths, lock_holder, run_lock
from kdrl_core.look.sweeps.comparison import write_sweep_report
from kdrl_core.look.sweeps.request import Request, check_request, donors_of, make_request, next_cell, write_record
from kdrl_core.look.sweeps.spec import Cell
from kdrl_core.look.sweeps.state import CellState, CellStatus, SweepPaths, cell_status, note_failure
from kdrl_core.models.prepare import prepared_model

_POLL_S = 0.5
_TELL_EVERY_S = 30.0
_logger = logging.getLogger("kdrl.sweep")


def sweep_run_name() -> str:
    """`sweep-<name>` from the parameters."""
    parameters = runtime.flow_run.parameters
    return f"sweep-{parameters.get('name') or parameters.get('source') or 'grid'}".replace("/", "-")


@flow(name="kdrl-sweep", flow_run_name=sweep_run_name)
@stoppable
def sweep(
    source: str | None = "table1",
    name: str | None = None,
    recipe: str | None = None,
    seeds: int | list[int] | None = None,
    vary: list[str] | None = None,
    overrides: list[str] | None = None,
    share_with: list[str] | None = None,
    workers: int = 1,
    deployment: str | None = None,
) -> str:
    """Run a sweep, or continue its unfinished cells. Returns the folder of its tables.

    Args:
        source: name of a shipped sweep, or path of a YAML file; None: `vary` alone.
        name: of the sweep; an existing one is continued.
        recipe: replaces the sweep's recipe.
        seeds: number of seeds, or a list of them.
        vary: fields and their values, each like `FIELD=a,b,c`.
        overrides: changes to every cell, each like `FIELD=VALUE`.
        share_with: other sweeps whose finished work may be taken over.
        workers: number of cells that run at a time.
        deployment: e.g. `kdrl/full-pipeline`; its workers run the cells, and must share this artifacts folder.

    Raises:
        RunError: at least one cell is not finished at the end.
    """
    request = make_request(
        source, name=name, recipe=recipe, seeds=seeds, vary=vary, overrides=overrides, share_with=share_with
    )
    check_request(request)
    paths = SweepPaths.of(request.spec.name)
    with run_lock(paths.lock):
        write_record(request)
        unfinished = [cell for cell in request.cells if cell_status(paths, cell).state is not CellState.FINISHED]
        _logger.info(
            "sweep %s: %d cells, %d of them finished already",
            paths.root.name,
            len(request.cells),
            len(request.cells) - len(unfinished),
        )
        try:
            if unfinished:
                _prepare_models(unfinished)
                Cells(request, paths, unfinished, workers=workers, deployment=deployment).run()
        except Exception as error:
            if not isinstance(error, Stopped):  # who stops it has no time for tables; `kdrl sweep report` writes them
                write_sweep_report(paths.root.name)
            raise
        report = write_sweep_report(paths.root.name)
        shown.swept(paths.root.name, report)
        _require_finished(request, paths)
    return str(paths.report)


class Cells:
    """Starts the unfinished cells of a sweep, watches them, and notes why one failed."""

    def __init__(
        self, request: Request, paths: SweepPaths, pending: list[Cell], *, workers: int, deployment: str | None
    ) -> None:
        self._paths = paths
        self._pending = pending
        self._total = len(request.cells)
        self._workers, self._deployment = workers, deployment
        self._donors = donors_of(request)
        self._parts = {cell.run: parts_of(cell.recipe) for cell in request.cells}
        self._made: set[str] = set()
        self._running: dict[str, tuple[Cell, LocalCell | DeployedCell, float]] = {}
        self._told = time.monotonic()

    def run(self) -> None:
        """Run until no cell is left. If this is interrupted or cancelled, the running cells are stopped."""
        guard_children()  # stops them if this process is killed
        with ExitStack() as stack:
            stack.callback(self._stop_all)
            while self._pending or self._running:
                self._reap()
                while len(self._running) < self._workers and (cell := self._next()) is not None:
                    self._start(cell)
                self._tell()
                stop_if_cancelled()
                time.sleep(_POLL_S)

    def _next(self) -> Cell | None:
        for run, parts in self._parts.items():
            root = RunPaths.of(run).root
            self._made |= {part.key for part in parts if part.key not in self._made and is_finished_part(root, part)}
        free = [cell for cell in self._pending if lock_holder(RunPaths.of(cell.run).lock) is None]
        running = [cell for cell, _, _ in self._running.values()]
        busy = [cell for cell in self._pending if cell not in free]  # somebody else works on them
        return next_cell(free, [*running, *busy], self._made, self._parts)

    def _start(self, cell: Cell) -> None:
        self._pending.remove(cell)
        self._paths.failure(cell.run).unlink(missing_ok=True)
        parameters: dict[str, Any] = {
            "recipe": str(self._paths.recipe(cell.run)),
            "run_name": cell.run,
            "overrides": [],
            "share_with": [run for run in self._donors if run != cell.run],
        }
        started = (
            LocalCell(cell.run, parameters, log=self._paths.log(cell.run))
            if self._deployment is None
            else DeployedCell(self._deployment, cell.run, parameters)
        )
        self._running[cell.run] = cell, started, time.monotonic()
        _logger.info("started  %s", cell.run)

    def _reap(self) -> None:
        for run, (cell, process, since) in list(self._running.items()):
            if not process.is_over():
                continue
            del self._running[run]
            status = cell_status(self._paths, cell)
            left = len(self._pending) + len(self._running)
            if status.state is CellState.FINISHED:
                seconds = time.monotonic() - since
                _logger.info("finished %s  %.0f s, %d of %d cells left", run, seconds, left, self._total)
            else:
                reason = process.reason() or status.detail
                note_failure(self._paths, run, reason)
                _logger.warning("cell %s failed: %s; others go on. To continue it: kdrl resume %s", run, reason, run)

    def _tell(self) -> None:
        if time.monotonic() - self._told > _TELL_EVERY_S:
            self._told = time.monotonic()
            for cell in [] if self._running else self._pending:
                holder = lock_holder(RunPaths.of(cell.run).lock)
                _logger.info("waiting for %s%s", cell.run, f", which is in use by {holder}" if holder else "")
            for run in self._running:
                if progress := read_progress(RunPaths.of(run)):
                    step = f" step {progress['step']}" if progress["stage"].startswith("stage") else ""
                    _logger.info("running  %s  %s%s, %s", run, progress["stage"], step, progress["phase"])

    def _stop_all(self) -> None:
        if not self._running:
            return
        end_in_order()  # the end of the sweep's own grace would leave cells behind
        for _, process, _ in self._running.values():
            process.interrupt()
        deadline = time.monotonic() + STOP_TIMEOUT_S  # one for all: the sweep has to end soon as well
        for _, process, _ in self._running.values():
            process.stop(deadline)


def _prepare_models(cells: list[Cell]) -> None:
    """Convert GGUF models first, so that no two cells do so at the same time."""
    for cell in cells:
        for model in named_models(cell.recipe).values():
            if model.gguf_file is not None:
                prepared_model(model, RunPaths.of(cell.run).root)


def _require_finished(request: Request, paths: SweepPaths) -> None:
    states = [cell_status(paths, cell) for cell in request.cells]
    if missing := [status for status in states if status.state is not CellState.FINISHED]:
        raise RunError(
            f"sweep {request.spec.name}: {len(missing)} of {len(states)} cells are not finished: "
            f"{'; '.join(map(_told, missing[:3]))}{'; …' if len(missing) > 3 else ''}. "
            f"Go on with: kdrl sweep run {request.spec.name} (or one alone: kdrl resume {missing[0].run})"
        )


def _told(status: CellStatus) -> str:
    return f"{status.run} {status.state}{f' ({status.detail})' if status.detail else ''}"
