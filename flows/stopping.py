"""How a flow stops early: by a signal, or because somebody cancelled it in Prefect. It ends in the state Cancelled.

Once a step, the flow runs of this process are looked up on the server: for a run that no worker watches over, nobody
else does. The wish to stop is `kdrl_core.ledger.lock`'s; tasks ask before they begin, so what was begun is published.
"""

import functools
import logging
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, ParamSpec, TypeVar
from uuid import UUID

from httpx import HTTPError
from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.context import SettingsContext, get_settings_context
from prefect.events.clients import PrefectCloudEventsClient, PrefectEventsClient
from prefect.events.worker import EventsWorker, emit_events_to_cloud, should_emit_events_to_running_server
from prefect.exceptions import PrefectException, TerminationSignal
from prefect.states import Cancelled

from flows.signals import end_in_order, own_sigterm, publishing
from kdrl_core.errors import Stopped
from kdrl_core.ledger.lock import forget_stop, request_stop, stop_if_requested, stop_requested

P = ParamSpec("P")
R = TypeVar("R")

CANCELLED = "cancelled in Prefect"
_LOOK_EVERY_S = 1.0
_RECONNECTIONS = 3
"""They follow each other at once; before each further one Prefect's client would wait for a second."""
_WORKER_GRACE_S = 20.0
"""A worker kills a flow's process 30 s after SIGTERM."""

_logger = logging.getLogger("kdrl")
_running: list[UUID] = []
_looked = 0.0


def stoppable(body: Callable[P, R]) -> Callable[P, R]:
    """Decorate the function of a flow. If it is asked to stop, its flow run ends in the state Cancelled, whose message
    has the command that goes on."""

    @functools.wraps(body)
    def call(*args: P.args, **kwargs: P.kwargs) -> Any:
        if runtime.flow_run.id is None:  # called as a plain function
            return body(*args, **kwargs)
        if not _running:
            let_no_event_wait()
        _running.append(UUID(str(runtime.flow_run.id)))
        try:
            with publishing(), own_sigterm(_sigterm_in_a_worker):
                return body(*args, **kwargs)
        except (Stopped, KeyboardInterrupt):
            if (why := stop_requested()) is None:
                raise
            end_in_order()
            if _worker_ends_us and not look():
                raise TerminationSignal(signal=signal.SIGTERM) from None  # as Prefect would have, had we let it
            told = f"{why}; go on with: {_way_on(runtime.flow_run.parameters)}"
            _logger.info("%s", told)
            return Cancelled(message=told, data=Stopped(told))  # the caller of this flow gets the exception
        finally:
            _running.pop()
            if not _running:
                forget_stop()

    return call


def stop_if_cancelled() -> None:
    """Call once a step, where everything is published. Raises Stopped if the process is to stop, or if one of its flow
    runs was cancelled."""
    global _looked
    if time.monotonic() - _looked > _LOOK_EVERY_S:
        _looked = time.monotonic()
        if look():
            request_stop(CANCELLED)
    stop_if_requested()


def look() -> bool:
    """Whether somebody has cancelled a flow run of this process. A server that does not answer has not."""
    with suppress(HTTPError, PrefectException), trying_once(), get_client(sync_client=True) as client:
        states = [client.read_flow_run(one).state for one in _running]
        return any(state is not None and (state.is_cancelling() or state.is_cancelled()) for state in states)
    return False


def trying_once() -> SettingsContext:
    """Inside, Prefect's client asks once. `temporary_settings` would validate all settings anew, for 50 ms a step."""
    now = get_settings_context()
    client = now.settings.client.model_copy(update={"max_retries": 0})
    return SettingsContext(profile=now.profile, settings=now.settings.model_copy(update={"client": client}))


def let_no_event_wait() -> None:
    """An event that cannot be sent is kept, and sent with the next one once the server is back. Prefect would try each
    for 7 s, at the end of the process as well: when a server is gone for good, dozens are left."""
    if should_emit_events_to_running_server():
        client = PrefectCloudEventsClient if emit_events_to_cloud() else PrefectEventsClient
        EventsWorker.set_client_override(client, reconnection_attempts=_RECONNECTIONS)


def _way_on(parameters: dict[str, Any]) -> str:
    """The command that continues the work of a flow run."""
    if run_dir := parameters.get("run_dir"):
        return f"kdrl resume {Path(run_dir).name}"
    if "run_name" in parameters:
        return f"kdrl resume {parameters['run_name'] or runtime.flow_run.name}"
    if "source" in parameters:
        return f"kdrl sweep run {parameters['name'] or parameters['source'] or 'grid'}"
    return "the same flow with the same parameters"


# --- the process of a worker ------------------------------------------------------------------------------------------

_worker_ends_us = False


def _sigterm_in_a_worker(number: int, frame: FrameType | None) -> None:
    """Handler of SIGTERM where no command line handles it: a worker ends the process, for a cancelled flow run or for
    reasons of its own. The first lets the work go on to where it may stop; the second does what Prefect's handler does.
    """
    global _worker_ends_us
    del frame
    if _worker_ends_us:
        raise TerminationSignal(signal=number)
    _worker_ends_us = True
    request_stop("stopped by its worker")
    overdue = threading.Timer(_WORKER_GRACE_S, _again)
    overdue.daemon = True
    overdue.start()


def _again() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
