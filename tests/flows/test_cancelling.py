"""A flow run that is cancelled in Prefect, by its UI or by `prefect flow-run cancel`, stops after what is in hand."""

import os
import signal
import subprocess
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import flow, runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Cancelling
from support import TINY

from flows import stopping
from flows.full_pipeline import full_pipeline
from flows.running_cells import LocalCell
from flows.sweep import Cells, sweep
from kdrl_core.boxes.completion import is_finished
from kdrl_core.boxes.stage import checkpoint_steps
from kdrl_core.errors import Stopped
from kdrl_core.ledger import open_run
from kdrl_core.ledger.lock import last_error, log_file, request_stop
from tasks import boxes

STEPS = [*TINY, "stage2.steps=6", "stage2.evaluate_every=null"]


def _cancel(flow_run_id: UUID, state: Any) -> None:
    """As `prefect flow-run cancel` and the UI do."""
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run_id, state)


def _states(*names: str) -> dict[str, str]:
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=list(names))))
    return {run.name: f"{run.state_name}: {run.state.message if run.state else ''}" for run in found}


@pytest.fixture
def cancel_at_step_2(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Somebody cancels `whose(flow runs of this process, outermost first)` when step 2 of stage 2 is published."""

    def cancel(whose: int, state: Any) -> None:
        monkeypatch.setattr(stopping, "_LOOK_EVERY_S", 0.0)
        original = stopping.stop_if_cancelled

        def look() -> None:
            if runtime.flow_run.parameters.get("stage") == "stage2":
                run = open_run(Path(runtime.flow_run.parameters["run_dir"]).name)
                if max(checkpoint_steps(run, "stage2")) == 3:
                    _cancel(stopping._running[whose], state)
            original()

        monkeypatch.setattr("flows.stage_flows.stop_if_cancelled", look)

    return cancel


@pytest.mark.parametrize(("whose", "state"), [pytest.param(0, Cancelling, marks=pytest.mark.slow), (1, Cancelled)])
def test_a_cancelled_run_stops_and_is_cancelled(
    artifacts: Path, cancel_at_step_2: Any, monkeypatch: pytest.MonkeyPatch, whose: int, state: Any
) -> None:
    """The whole pipeline by `prefect flow-run cancel`, or its stage by the state that the UI can force."""
    cancel_at_step_2(whose, state())
    name = f"cancelled-{whose}"
    with pytest.raises(Stopped, match=f"cancelled in Prefect; go on with: kdrl resume {name}"):
        full_pipeline(recipe="miniature", run_name=name, overrides=STEPS)
    told = f"Cancelled: cancelled in Prefect; go on with: kdrl resume {name}"
    assert _states(name, f"{name}-stage2") == {name: told, f"{name}-stage2": told}
    run = open_run(name)
    assert max(checkpoint_steps(run, "stage2")) == 3
    assert last_error(run.paths.root) is None
    assert told.removeprefix("Cancelled: ") in log_file(run.paths.root).read_text()
    if whose:
        return
    monkeypatch.undo()
    monkeypatch.setenv("KDRL_ARTIFACTS", str(artifacts))
    full_pipeline(recipe="miniature", run_name=name, overrides=STEPS)  # the same process has forgotten the wish
    assert is_finished(open_run(name))


@pytest.mark.parametrize("is_killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_cancelled_sweep_stops_its_cells(artifacts: Path, monkeypatch: pytest.MonkeyPatch, is_killed: bool) -> None:
    """Prefect hears of the cells' end, also if they had no time to tell."""
    name = "killed" if is_killed else "s"  # the server has the flow runs of both
    if is_killed:
        monkeypatch.setattr(LocalCell, "interrupt", lambda cell: cell._process.kill())
    original = stopping.stop_if_cancelled

    def look() -> None:
        if any(artifacts.glob(f"runs/{name}-*/rollouts/stage=stage1/*/update.parquet")):
            _cancel(stopping._running[0], Cancelling())
        original()

    monkeypatch.setattr("flows.sweep.stop_if_cancelled", look)
    with pytest.raises(Stopped, match=f"cancelled in Prefect; go on with: kdrl sweep run {name}"):
        sweep(source=None, name=name, recipe="miniature", vary=["stage2.beta.init=0.5"], overrides=STEPS, seeds=1)
    told = f"Cancelled: cancelled in Prefect; go on with: kdrl sweep run {name}"
    assert _states(f"sweep-{name}") == {f"sweep-{name}": told}
    (cell,) = artifacts.glob(f"runs/{name}-*")
    assert _states(cell.name)[cell.name].startswith("Cancelled: stopped with its sweep" if is_killed else "Cancelled: ")


def test_cells_that_do_not_end_are_killed_at_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """At deadlines one after the other the sweep's own limit would pass, and cells would be left behind."""
    begun: list[float] = []
    monkeypatch.setattr("flows.sweep.end_in_order", lambda: begun.append(time.monotonic()))
    monkeypatch.setattr("flows.sweep.STOP_TIMEOUT_S", 0.6)
    monkeypatch.setattr("flows.running_cells._cancel_unless_final", lambda flow_run_id: None)
    sweeps_cells, frozen = object.__new__(Cells), [object.__new__(LocalCell) for _ in range(3)]
    for cell in frozen:
        cell._process = subprocess.Popen(["sleep", "60"], start_new_session=True)
        cell._flow_run = FlowRun(flow_id=uuid4())
        cell._process.send_signal(signal.SIGSTOP)
        os.waitpid(cell._process.pid, os.WUNTRACED)  # it has stopped
    sweeps_cells._running = {str(number): (None, cell, 0.0) for number, cell in enumerate(frozen)}  # type: ignore[misc]
    sweeps_cells._stop_all()
    assert 0.6 <= time.monotonic() - begun[0] < 1.1
    assert [cell._process.returncode for cell in frozen] == [-signal.SIGKILL] * 3


def test_a_server_that_is_not_ready_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect's client would try again for more than a minute."""
    asked: list[str] = []

    class NotReady(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(503)

    monkeypatch.setattr(stopping, "_running", [run := uuid4()])
    with ThreadingHTTPServer(("127.0.0.1", 0), NotReady) as server:
        Thread(target=server.serve_forever).start()
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{server.server_port}/api"}):
            assert not stopping.look()
        server.shutdown()
    assert [path for path in asked if "flow_runs" in path] == [f"/api/flow_runs/{run}"]


def test_a_task_that_is_called_after_the_wish_raises_it(artifacts: Path) -> None:
    @flow(name="asks")
    @stopping.stoppable
    def asks() -> dict[str, Any]:
        request_stop("stopped by a test")
        return boxes.evaluate(str(artifacts), "base")

    with pytest.raises(Stopped, match="stopped by a test; go on with: the same flow"):
        asks()
