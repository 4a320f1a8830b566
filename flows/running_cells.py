"""Cells of a sweep while they run: subflows in processes of their own, or in the workers of a deployment."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from httpx import HTTPError
from prefect import Task
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import FlowRunContext
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.states import Cancelled, Cancelling, Crashed, Pending

from flows.full_pipeline import full_pipeline
from flows.signals import STOPPED, Signals, publishing
from flows.stopping import trying_once
from kdrl_core.errors import KdrlError, RunError, Stopped, told
from kdrl_core.process_guard import kill_group

_GRACE_S = 4.0
STOP_TIMEOUT_S = 5.5
"""A cell that is asked to stop ends sooner than its sweep has to."""


class LocalCell:
    """A subflow in a process of its own, its output in a file."""

    def __init__(self, run: str, parameters: dict[str, Any], *, log: Path) -> None:
        self._log = log
        with get_client(sync_client=True) as client:
            self._flow_run = _create_subflow(client, run, parameters)
            api = str(client.api_url)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "flows.cell", str(self._flow_run.id)],
                env={**os.environ, "PREFECT_API_URL": api.rstrip("/"), "PREFECT_LOGGING_LEVEL": "INFO"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the sweep, which stops its cells one by one
            )

    def is_over(self) -> bool:
        """Whether it has ended, in success or failure."""
        if self._process.poll() is None:
            return False
        if self._process.returncode < 0:  # killed: it told Prefect nothing, and left its children behind
            kill_group(self._process.pid)
            _force(self._flow_run.id, Crashed(message=self.reason()))
        return True

    def reason(self) -> str | None:
        """Why it failed, in one line; None if it did not say."""
        code = self._process.returncode
        if code is not None and code < 0:
            return f"its process was ended by {signal.Signals(-code).name} ({self._log})"
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return errors[-1] if errors else f"exit code {code} ({self._log})"

    def interrupt(self) -> None:
        """Ask it to end. This takes seconds."""
        self._process.terminate()

    def stop(self, deadline: float) -> None:
        """Wait until it ends; at the deadline, of `time.monotonic`, kill it and its children."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            kill_group(self._process.pid)
            self._process.wait()
        _cancel_unless_final(self._flow_run.id)


class DeployedCell:
    """A subflow that a worker of a deployment runs."""

    def __init__(self, deployment: str, run: str, parameters: dict[str, Any]) -> None:
        try:
            found = run_deployment(deployment, flow_run_name=run, parameters=parameters, timeout=0)
        except PrefectException as error:
            raise RunError(
                f"deployment {deployment} cannot be run ({type(error).__name__}); deploy it first "
                "(kdrl deploy), or leave --deployment out"
            ) from error
        assert isinstance(found, FlowRun)  # awaitable in async flows only
        self._id = found.id
        self._state: State[Any] | None = None
        self._is_gone = False

    def is_over(self) -> bool:
        with suppress(HTTPError, PrefectException), get_client(sync_client=True) as client:
            try:
                self._state = client.read_flow_run(self._id).state
            except ObjectNotFound:
                self._is_gone = True
        return self._is_gone or (self._state is not None and self._state.is_final())

    def reason(self) -> str | None:
        if self._is_gone:
            return f"its flow run {self._id} was deleted on the server"
        return None if self._state is None else self._state.message

    def interrupt(self) -> None:
        _force(self._id, Cancelling())

    def stop(self, deadline: float) -> None:
        """Do nothing: its worker ends it."""


def _create_subflow(client: SyncPrefectClient, run: str, parameters: dict[str, Any]) -> FlowRun:
    """A flow run of the full pipeline, which Prefect shows below the current flow run."""
    parent = FlowRunContext.get()
    assert parent is not None
    assert parent.flow_run is not None
    placeholder: Task[[], None] = Task(fn=_stand_in, name=run)
    stands_for = client.create_task_run(
        task=placeholder, flow_run_id=parent.flow_run.id, dynamic_key=str(uuid4()), name=run, state=Pending()
    )
    return client.create_flow_run(full_pipeline, name=run, parameters=parameters, parent_task_run_id=stands_for.id)


def _stand_in() -> None:
    """The task that Prefect requires between a flow run and the flow run below it."""


def _cancel_unless_final(flow_run_id: UUID) -> None:
    """For a cell that was ended before it could tell its state."""
    with suppress(HTTPError, PrefectException), trying_once(), get_client(sync_client=True) as client:
        state = client.read_flow_run(flow_run_id).state
        if state is not None and not state.is_final():
            client.set_flow_run_state(flow_run_id, Cancelled(message="stopped with its sweep"), force=True)


def _force(flow_run_id: UUID, state: State[Any]) -> None:
    with suppress(HTTPError, PrefectException), get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run_id, state, force=True)


def run_cell(flow_run_id: str) -> int:
    """Run one cell in this process. The last line of the output says what went wrong."""
    from prefect.flow_engine import load_flow_run, run_flow

    from kdrl_core.boxes.session import close_sessions

    tell, last_words = partial(print, flush=True), "error: stopped with the sweep, within a step"
    with Signals(tell, last_words, grace_s=_GRACE_S, limit_s=STOP_TIMEOUT_S) as came:
        try:
            with publishing():  # Prefect's own work around the flow as well
                run_flow(full_pipeline, flow_run=load_flow_run(UUID(flow_run_id)))
        except (Stopped, KeyboardInterrupt) as stop:
            print(f"error: {'stopped with the sweep' if came.number else stop}", flush=True)
            return STOPPED if came.number else 1
        except Exception as error:
            print(f"error: {told(error)}", flush=True)
            if not isinstance(error, KdrlError):
                raise
            return 1
        finally:
            close_sessions()
    return 0
