"""Retries calls that fail for a while, after growing pauses, on threads that end with the program."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, sleep_using_event, wait_exponential_jitter

from kdrl_core.engines.server_client import TransientError
from kdrl_core.errors import EngineError

_MAX_PAUSE_S = 30.0
_MAX_RETRY_AFTER_S = 60.0
_logger = logging.getLogger("kdrl")
_Result = TypeVar("_Result")


def retry_transient(
    what: str,
    call: Callable[[], _Result],
    *,
    retry_for_s: float,
    first_pause_s: float,
    over: threading.Event,
    advice: str,
) -> _Result:
    """The result of a call, retried while it raises TransientError. Raises EngineError once it gives up.

    Args:
        what: what is asked for, as messages name it.
        retry_for_s: from the first fault to the beginning of the last try.
        first_pause_s: before the second try; doubled with each, up to 30 s, with jitter.
        over: once set, a pause ends at once and nothing is retried.
        advice: end of the message when it gives up.
    """
    started = time.monotonic()
    pauses = wait_exponential_jitter(initial=first_pause_s, max=_MAX_PAUSE_S, jitter=first_pause_s)
    first: list[float] = []

    def since_first_fault() -> float:
        if not first:
            first.append(time.monotonic())
        return time.monotonic() - first[0]

    def pause(state: RetryCallState) -> float:
        fault = state.outcome.exception() if state.outcome else None
        asked = fault.retry_after_s if isinstance(fault, TransientError) else 0.0
        left = retry_for_s - since_first_fault()
        return max(0.0, min(max(min(asked, _MAX_RETRY_AFTER_S), pauses(state)), left))

    def tell(state: RetryCallState) -> None:
        fault = state.outcome.exception() if state.outcome else None
        _logger.warning("%s: %s; tried again in %.1f s", what, fault, state.upcoming_sleep)

    retrying = Retrying(
        stop=lambda _: since_first_fault() >= retry_for_s or over.is_set(),
        sleep=sleep_using_event(over),
        wait=pause,
        retry=retry_if_exception_type(TransientError),
        before_sleep=tell,
        reraise=True,
    )
    try:
        return retrying(call)
    except TransientError as fault:
        tries = retrying.statistics.get("attempt_number", 1)
        raise EngineError(
            f"{what}: {fault}; given up after {tries} tries in {time.monotonic() - started:.0f} s {advice}"
        ) from None


class DaemonThreads:
    """Daemon threads: unlike a ThreadPoolExecutor's, they end with the program, even during a long request."""

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._threads = 0
        self._waiting: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._over = threading.Event()

    def submit(self, call: Callable[..., _Result], *arguments: Any) -> "Future[_Result]":
        future: Future[_Result] = Future()

        def work() -> None:
            if self._over.is_set():
                future.cancel()
            elif future.set_running_or_notify_cancel():
                try:
                    future.set_result(call(*arguments))
                except BaseException as error:  # raised again where the result is asked for
                    future.set_exception(error)

        self._waiting.put(work)
        if self._threads < self._count:
            self._threads += 1
            threading.Thread(target=self._run, name=f"{self._name}-{self._threads}", daemon=True).start()
        return future

    def stop(self) -> None:
        """Cancel the calls that have not begun."""
        self._over.set()
        for _ in range(self._threads):
            self._waiting.put(None)

    def _run(self) -> None:
        while (work := self._waiting.get()) is not None:
            work()


def all_at_once(calls: Sequence[Callable[[], _Result]], name: str) -> "list[Future[_Result]]":
    """The finished futures of calls, each made in a daemon thread of its own."""
    workers = DaemonThreads(len(calls), name)
    futures = [workers.submit(call) for call in calls]
    wait(futures)
    workers.stop()
    return futures
