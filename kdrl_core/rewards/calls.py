"""The task of a worker for a term that is an `async def`, such as a judge over HTTP: several calls at a time, each with
a deadline and further tries, within a budget."""

import asyncio
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from kdrl_core.rewards.loading import LoadedFunction
from kdrl_core.rewards.score import BadReturnError, Found, Scored, as_found
from kdrl_core.rewards.worker import (
    arguments_of,
    contained,
    failure,
    load_functions,
    loaded_function,
    refuse_changes,
    take_printed,
)
from kdrl_core.types import VerdictKind

JOB_S = 10.0
"""A worker begins no further call after this time, and gives back what is done."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 8.0
"""Seconds before the second try, doubled before each further one, and up to `FIRST_WAIT_S` more."""

_runners: list[asyncio.Runner] = []
"""The event loop of this process, kept so that a function may keep a client."""


@dataclass(slots=True)
class Left:
    """What is left of a budget; None: no limit."""

    calls: int | None
    seconds: float | None


class BudgetSpentError(Exception):
    """No further try is allowed."""


@dataclass(slots=True)
class _Tries:
    """Counts tries, and refuses one beyond the budget."""

    allowed: int | None
    end: float | None
    made: int = 0

    def begin(self) -> None:
        if self.allowed is not None and self.made >= self.allowed:
            raise BudgetSpentError("the budget calls.max_calls is spent; raise it, or judge fewer responses")
        if self.end is not None and time.monotonic() > self.end:
            raise BudgetSpentError("the budget calls.max_seconds is spent; raise it, or judge fewer responses")
        self.made += 1


@contained
def score_calls(
    items: Sequence[Scored], indices: Sequence[int], cpu_limit_s: float, calls: dict[str, Any], left: Left
) -> tuple[str | None, list[list[Found | None]], int]:
    """Call one term on as many of the items, in their order, as can begin within `JOB_S`, one at least.

    Returns:
        what is wrong with a function that cannot be loaded, or None; the rows of `score_batch`; and the tries made.
    """
    if (fault := load_functions(indices)) is not None:
        return fault, [], 0
    if not _runners:
        _runners.append(asyncio.Runner())
    tries = _Tries(left.calls, None if left.seconds is None else time.monotonic() + left.seconds)
    try:
        found = _runners[0].run(_all(loaded_function(indices[0]), items, cpu_limit_s, calls, tries))
    except BaseException:  # a task of the user's has ended the loop
        _runners.clear()
        raise
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        take_printed()  # of which response, nobody knows
    return None, [[one] for one in found], tries.made


async def _all(
    loaded: LoadedFunction, items: Sequence[Scored], cpu_limit_s: float, calls: dict[str, Any], tries: _Tries
) -> list[Found | None]:
    gate, end = asyncio.Semaphore(calls["at_once"]), time.monotonic() + JOB_S
    begun: list[asyncio.Task[Found | None]] = []
    for item in items:
        await gate.acquire()
        if begun and time.monotonic() > end:
            break
        begun.append(asyncio.create_task(_one(loaded, item, cpu_limit_s, calls, tries)))
        begun[-1].add_done_callback(lambda _: gate.release())
    return list(await asyncio.gather(*begun))


async def _one(
    loaded: LoadedFunction, item: Scored, cpu_limit_s: float, calls: dict[str, Any], tries: _Tries
) -> Found | None:
    """What a call found, after further tries if it raises. Does not raise."""
    retrying = AsyncRetrying(
        stop=stop_after_attempt(calls["retries"] + 1),
        wait=wait_exponential_jitter(initial=FIRST_WAIT_S, max=LONGEST_WAIT_S, jitter=FIRST_WAIT_S),
        retry=retry_if_exception(_may_pass),
        reraise=True,
    )
    last: BaseException | None = None
    try:
        async for attempt in retrying:
            last = attempt.retry_state.outcome.exception() if attempt.retry_state.outcome else last
            with attempt:
                tries.begin()
                signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
                return await _try(loaded, item, calls["timeout_s"])
    except TimeoutError as error:
        return failure(loaded, item, error, VerdictKind.TIMEOUT)
    except BudgetSpentError as error:
        more = "" if last is None else f"; the last try ended with {type(last).__name__}: {last}"
        return failure(loaded, item, BudgetSpentError(f"{error}{more}"))
    except BaseException as error:
        return failure(loaded, item, error)
    raise AssertionError("the last try returns or raises")


async def _try(loaded: LoadedFunction, item: Scored, timeout_s: float) -> Found | None:
    response, answer, problem = item
    given, arguments = problem.copy(), arguments_of(loaded)
    try:
        async with asyncio.timeout(timeout_s) as deadline:
            returned = await loaded.function(response, answer, given, **arguments)
    except TimeoutError as error:
        if deadline.expired():
            raise TimeoutError(f"no result within {timeout_s:g} s") from error
        raise
    refuse_changes(loaded, item, given, arguments)
    return as_found(returned)


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, Exception) and not isinstance(error, MemoryError | BadReturnError | BudgetSpentError)
