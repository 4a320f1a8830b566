"""Verdicts for many responses: format in this process, accuracy in worker processes that can be killed.

The rules are in :mod:`kdrl_core.verify.screening` and :mod:`kdrl_core.verify.accuracy`.

What the pool promises, for any input:

- an item costs at most ``timeout_s`` of a worker (kind ``timeout``: worker killed and replaced) and about
  ``memory_limit_mb`` (kind ``error``), and the other items are not touched by it;
- verdicts come in the order of the items; the call does not raise because of an item's content;
- no worker outlives ``close()``, the end of this process, or (by more than the time limit) its being killed.

Pebble owns the processes and the deadline. Around it: at most two items per worker are in flight, so that a pool that
breaks (its workers killed from outside while idle, or unable to start) can be replaced without losing an item.
"""

import atexit
import contextlib
import os
import signal
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from types import TracebackType
from typing import TypedDict

from pebble import ProcessExpired, ProcessPool

from kdrl_core.errors import VerificationError
from kdrl_core.types import Verdict, VerdictKind
from kdrl_core.verify._spawn import WorkerContext
from kdrl_core.verify.accuracy import EXIT_OUT_OF_MEMORY, Outcome, judge, start_worker
from kdrl_core.verify.clock import Clock
from kdrl_core.verify.format import FormatResult
from kdrl_core.verify.screening import Job, make_verdict, screen

DEFAULT_TIMEOUT_S = 10.0
DEFAULT_MEMORY_LIMIT_MB = 2_048
MIN_MEMORY_LIMIT_MB = 384

_ORPHAN_GRACE_S = 2.0  # the kernel's timer in the worker comes this much after the pool's deadline
_START_GRACE_S = 60.0  # a worker that has to start may take this long on a busy machine
_POLL_S = 0.25
_MAX_REPLACEMENTS = 3

Item = tuple[str, str]
Progress = Callable[[int, int], None]


class VerdictOptions(TypedDict):
    """What a verdict depends on besides response and ground truth."""

    require_format: bool
    think_opened: bool


class _LruCache:
    """Outcomes of the most recently used jobs. Not synchronised: the Verifier's lock is held around it."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._outcomes: OrderedDict[Job, Outcome] = OrderedDict()

    def get(self, job: Job) -> Outcome | None:
        outcome = self._outcomes.get(job)
        if outcome is not None:
            self._outcomes.move_to_end(job)
        return outcome

    def put(self, job: Job, outcome: Outcome) -> None:
        self._outcomes[job] = outcome
        self._outcomes.move_to_end(job)
        while len(self._outcomes) > self._size:
            self._outcomes.popitem(last=False)


class Verifier:
    """Workers that are started once and judge many batches; a context manager, usable from any thread.

    ``with Verifier(...)`` starts the workers at once, in the background; otherwise the first batch that needs them
    does. Identical (answer, truth) pairs are computed once; timeouts and errors are not remembered between calls.
    """

    def __init__(
        self,
        *,
        workers: int = 2,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        memory_limit_mb: int = DEFAULT_MEMORY_LIMIT_MB,
        cache_size: int = 16_384,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers}: at least one worker process is needed")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s={timeout_s}: must be positive")
        if memory_limit_mb < MIN_MEMORY_LIMIT_MB:
            raise ValueError(
                f"memory_limit_mb={memory_limit_mb}: sympy alone needs more; set at least {MIN_MEMORY_LIMIT_MB}"
            )
        self.workers = workers
        self.timeout_s = float(timeout_s)
        self.memory_limit_mb = memory_limit_mb
        self._lock = threading.RLock()
        self._cache = _LruCache(cache_size)
        self._pool: ProcessPool | None = None
        self._is_closed = False
        self._num_computed = 0
        self._ahead: dict[Job, Future[Outcome]] = {}
        self._max_ahead = cache_size
        self._ahead_clock = Clock()

    @property
    def num_computed(self) -> int:
        """How many comparisons workers have been asked for; the rest came from the cache or needed none."""
        return self._num_computed

    def start(self) -> None:
        """Start the workers without waiting until they have imported math-verify."""
        _ = self._running_pool().active  # pebble starts a pool on the first look at its state

    def close(self) -> None:
        """Stop the workers now; batches that are still running in other threads end with ``error`` verdicts."""
        with self._lock:
            self._is_closed = True
            pool, self._pool = self._pool, None
            self._ahead.clear()
        if pool is not None:
            _stop(pool)

    def __enter__(self) -> "Verifier":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def verify(
        self, response: str, ground_truth: str, *, require_format: bool = True, think_opened: bool = False
    ) -> Verdict:
        """The verdict on one response."""
        item = (response, ground_truth)
        return self.verify_batch([item], require_format=require_format, think_opened=think_opened)[0]

    def verify_batch(
        self,
        items: Iterable[Item],
        *,
        require_format: bool = True,
        think_opened: bool = False,
        on_progress: Progress | None = None,
    ) -> list[Verdict]:
        """Verdicts on ``(response, ground_truth)`` pairs, in their order.

        ``on_progress(done, total)`` is called in the calling thread as verdicts become known.
        Raises VerificationError if the verifier is closed, and nothing because of an item's content.
        """
        if self._is_closed:
            raise VerificationError("the verifier is closed; make a new one")
        items = list(items)
        verdicts: list[Verdict | None] = [None] * len(items)
        waiting: dict[Job, list[tuple[int, FormatResult]]] = {}
        for index, item in enumerate(items):
            settled = screen(item, require_format=require_format, think_opened=think_opened)
            if isinstance(settled, Verdict):
                verdicts[index] = settled
                continue
            form, found = settled
            outcome = found if isinstance(found, Outcome) else self._remembered(found)
            if outcome is not None:
                verdicts[index] = make_verdict(form, outcome, require_format=require_format)
            else:
                assert isinstance(found, Job)
                waiting.setdefault(found, []).append((index, form))
        num_done = len(items) - sum(map(len, waiting.values()))
        if on_progress is not None:
            on_progress(num_done, len(items))

        def settle(job: Job, outcome: Outcome) -> None:
            nonlocal num_done
            for index, form in waiting[job]:
                verdicts[index] = make_verdict(form, outcome, require_format=require_format)
            num_done += len(waiting[job])
            if on_progress is not None:
                on_progress(num_done, len(items))

        self._compute(list(waiting), settle)
        return [verdict for verdict in verdicts if verdict is not None]

    def verify_ahead(self, items: Iterable[Item], *, require_format: bool = True, think_opened: bool = False) -> None:
        """Let the workers begin with these items, and return at once.

        A later `verify_batch` takes what they have found by then and waits for the rest; its verdicts are the same as
        without this. Does nothing if the workers cannot take the items.
        """
        settled = (screen(item, require_format=require_format, think_opened=think_opened) for item in items)
        found = (one[1] for one in settled if not isinstance(one, Verdict))
        jobs = dict.fromkeys(job for job in found if isinstance(job, Job))  # in their order: the last are remembered
        with contextlib.suppress(VerificationError, RuntimeError, OSError), self._lock:  # `verify_batch` will see to it
            if len(self._ahead) > self._max_ahead:  # nobody has asked for them: a rollout failed, say
                self._let_go_of_finished()
            for job in jobs:
                if job not in self._ahead and self._cache.get(job) is None:
                    self._ahead[job] = self._submit(self._running_pool(), job)
                    self._ahead_clock.start()
                    self._ahead[job].add_done_callback(self._ahead_clock.stop)

    def hidden_seconds(self) -> float:
        """For how long workers have been judging items of `verify_ahead` since this was last asked."""
        return self._ahead_clock.read()

    def _remembered(self, job: Job) -> Outcome | None:
        with self._lock:
            return self._cache.get(job)

    def _remember(self, job: Job, outcome: Outcome) -> None:
        if outcome.kind not in (VerdictKind.TIMEOUT, VerdictKind.ERROR):  # these may be the machine's fault
            with self._lock:
                self._cache.put(job, outcome)

    def _compute(self, jobs: Sequence[Job], settle: Callable[[Job, Outcome], None]) -> None:
        """Have workers judge ``jobs``; calls ``settle`` once for each, in this thread."""
        in_flight = self._taken_ahead(jobs)
        begun = set(in_flight.values())
        pending = deque(job for job in jobs if job not in begun)
        num_replacements = 0
        last_progress = time.monotonic()
        pool: ProcessPool | None = None
        while pending or in_flight:
            try:
                pool = pool or self._running_pool()
                while pending and len(in_flight) < 2 * self.workers:
                    future = self._submit(pool, pending[0])
                    in_flight[future] = pending.popleft()
                is_broken = not pool.active
            except (VerificationError, RuntimeError, OSError):  # closed, or the pool broke under our hands
                is_broken = True
            done, _ = wait(in_flight, timeout=0 if is_broken else _POLL_S, return_when=FIRST_COMPLETED)
            for future in done:
                job = in_flight.pop(future)
                outcome = _outcome(future, self.timeout_s)
                if outcome is None:
                    pending.append(job)
                    is_broken = True
                    continue
                num_replacements, last_progress = 0, time.monotonic()
                self._remember(job, outcome)
                settle(job, outcome)
            # Two rounds in flight, each within its deadline; beyond that the pool itself is stuck.
            patience_s = 2 * self.timeout_s + _START_GRACE_S
            if is_broken or time.monotonic() - last_progress > patience_s:
                pending.extend(in_flight.values())
                in_flight.clear()
                if not pending:
                    break
                num_replacements += 1
                if self._is_closed or num_replacements > _MAX_REPLACEMENTS:
                    reason = (
                        "the verifier was closed before this item was judged"
                        if self._is_closed
                        else f"the verification workers could not be kept alive ({_MAX_REPLACEMENTS} new starts failed)"
                    )
                    for job in pending:
                        settle(job, Outcome(VerdictKind.ERROR, reason))
                    return
                if pool is not None:
                    self._discard(pool)
                pool, last_progress = None, time.monotonic()

    def _taken_ahead(self, jobs: Sequence[Job]) -> "dict[Future[Outcome], Job]":
        """Those that workers have begun with, less those whose pool has broken since."""
        with self._lock:
            ahead = {self._ahead.pop(job): job for job in jobs if job in self._ahead}
        return {
            future: job
            for future, job in ahead.items()
            if not future.done() or _outcome(future, self.timeout_s) is not None
        }

    def _let_go_of_finished(self) -> None:
        for job in [job for job, future in self._ahead.items() if future.done()]:
            outcome = _outcome(self._ahead.pop(job), self.timeout_s)
            if outcome is not None:
                self._remember(job, outcome)

    def _submit(self, pool: ProcessPool, job: Job) -> "Future[Outcome]":
        with self._lock:
            self._num_computed += 1
        args = (job.answer, job.ground_truth, job.is_text, self.timeout_s + _ORPHAN_GRACE_S, self.memory_limit_mb)
        return pool.schedule(judge, args=args, timeout=self.timeout_s)

    def _running_pool(self) -> ProcessPool:
        with self._lock:
            if self._is_closed:
                raise VerificationError("the verifier is closed; make a new one")
            if self._pool is None:
                self._pool = ProcessPool(
                    max_workers=self.workers,
                    initializer=start_worker,
                    initargs=(self.memory_limit_mb,),
                    context=WorkerContext(),
                )
            return self._pool

    def _discard(self, pool: ProcessPool) -> None:
        """Stop a broken pool; whoever needs one next makes it."""
        with self._lock:
            if self._pool is pool:
                self._pool = None
        _stop(pool)


def verify_batch(
    items: Iterable[Item],
    *,
    workers: int,
    timeout_s: float,
    memory_limit_mb: int = DEFAULT_MEMORY_LIMIT_MB,
    require_format: bool = True,
    think_opened: bool = False,
    on_progress: Progress | None = None,
) -> list[Verdict]:
    """Verdicts on ``(response, ground_truth)`` pairs, in their order, by workers that live for this call.

    Starting them takes a second or two: a caller with many batches keeps a :class:`Verifier`.
    """
    items = list(items)
    verifier = Verifier(
        workers=max(1, min(workers, len(items))) if workers > 0 else workers,
        timeout_s=timeout_s,
        memory_limit_mb=memory_limit_mb,
    )
    with contextlib.closing(verifier):
        return verifier.verify_batch(
            items, require_format=require_format, think_opened=think_opened, on_progress=on_progress
        )


_shared: tuple[int, Verifier] | None = None
_shared_lock = threading.Lock()


def verify(response: str, ground_truth: str, *, require_format: bool = True, think_opened: bool = False) -> Verdict:
    """The verdict on one response, by a single worker that stays until this process ends."""
    return _shared_verifier().verify(response, ground_truth, require_format=require_format, think_opened=think_opened)


def _shared_verifier() -> Verifier:
    global _shared
    with _shared_lock:
        if _shared is None or _shared[0] != os.getpid():  # a forked child has no right to its parent's worker
            verifier = Verifier(workers=1)
            atexit.register(verifier.close)
            _shared = (os.getpid(), verifier)
        return _shared[1]


def _outcome(future: "Future[Outcome]", timeout_s: float) -> Outcome | None:
    """What became of a job; None if its pool broke before the job was judged, through no fault of the job."""
    too_late = Outcome(VerdictKind.TIMEOUT, f"no result within {timeout_s:g} s; the worker was killed")
    try:
        return Outcome(*future.result(timeout=0))
    except FutureTimeoutError:
        return too_late
    except ProcessExpired as error:
        if error.exitcode == -signal.SIGALRM:  # the kernel's timer came first: this process was held up
            return too_late
        if error.exitcode == EXIT_OUT_OF_MEMORY:
            return Outcome(VerdictKind.ERROR, "the comparison reached the memory limit; the worker was replaced")
        return Outcome(VerdictKind.ERROR, f"the worker died (exit code {error.exitcode}) and was replaced")
    except Exception:  # BrokenProcessPool, CancelledError, a channel error
        return None


def _stop(pool: ProcessPool) -> None:
    """Kill a pool's workers and wait for its threads; a pool that is broken already must not break the caller."""
    with contextlib.suppress(RuntimeError, OSError, ValueError):
        pool.stop()
        pool.join()
