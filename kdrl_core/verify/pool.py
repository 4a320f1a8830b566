"""Verdicts for many responses: format in this process, accuracy in worker processes that can be killed.

The rules are in :mod:`kdrl_core.verify.screening` and :mod:`kdrl_core.verify.accuracy`, the processes in
:mod:`kdrl_core.verify.workers`.

What the verifier promises, for any input:

- an item costs at most ``timeout_s`` of a worker's CPU time (kind ``timeout``: worker killed and replaced) and about
  ``memory_limit_mb`` (kind ``error``), and it does not affect the other items;
- a verdict does not depend on what happens to the machine. An item whose worker dies, or gives no result without using
  its CPU time, is judged once more, alone, before that becomes its verdict. A stopped process group, a suspended
  machine and a step of the clock are not counted;
- verdicts come in the order of the items; the call does not raise because of an item's content;
- no worker outlives ``close()`` or the end of this process. If this process is killed, a worker ends within the limit
  of its CPU time.

At most two items per worker are in flight, so that a broken pool can be replaced without losing an item.
"""

import atexit
import contextlib
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from types import TracebackType
from typing import Any, Unpack

from kdrl_core.errors import VerificationError
from kdrl_core.types import Verdict, VerdictKind
from kdrl_core.verify.screening import FormatResult, Job, Outcome, VerdictOptions, make_verdict, screen
from kdrl_core.verify.workers import AwakeTime, Clock, JobResult, Workers

DEFAULT_TIMEOUT_S = 10.0
DEFAULT_MEMORY_LIMIT_MB = 2_048
MIN_MEMORY_LIMIT_MB = 384

_START_GRACE_S = 15.0
"""A worker may take so long to begin with a comparison; twice as long after each pool that was given up."""
_POLL_S = 0.25
_WAITS = 5.0
_WAIT_GRACE_S = 5.0
"""A comparison is given up after `_WAITS` times its CPU limit and `_WAIT_GRACE_S`: it got under a fifth of a CPU."""
_MAX_REPLACEMENTS = 3

Item = tuple[str, str]
Progress = Callable[[int, int], None]


class Verifier:
    """Workers that are started once and judge many batches; a context manager, usable from any thread.

    ``with Verifier(...)`` starts the workers at once, in the background. Otherwise they start with the first batch
    that needs them. Equal (answer, truth) pairs are computed once; timeouts and errors are computed anew in each call.
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
        self._workers = Workers(workers, self.timeout_s, memory_limit_mb)
        self._lock = threading.RLock()
        self._cache_size = cache_size
        self._cache: OrderedDict[Job, Outcome] = OrderedDict()  # least recently used first
        self._ahead: dict[Job, Future[Outcome]] = {}
        self._ahead_clock = Clock()
        self._alone = threading.Lock()

    @property
    def num_computed(self) -> int:
        """How many comparisons workers were asked for; the rest came from the cache or needed none."""
        return self._workers.num_submitted

    def start(self) -> None:
        """Start the workers without waiting until they have imported math-verify."""
        _ = self._workers.running().active  # pebble starts a pool on the first look at its state

    def close(self) -> None:
        """Stop the workers now. Batches that still run in other threads end with ``error`` verdicts."""
        self._workers.close()
        with self._lock:
            self._ahead.clear()

    def __enter__(self) -> "Verifier":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def verify(self, response: str, ground_truth: str, **options: Unpack[VerdictOptions]) -> Verdict:
        """The verdict on one response."""
        return self.verify_batch([(response, ground_truth)], **options)[0]

    def verify_batch(
        self,
        items: Iterable[Item],
        *,
        on_progress: Progress | None = None,
        **options: Unpack[VerdictOptions],
    ) -> list[Verdict]:
        """Verdicts on ``(response, ground_truth)`` pairs, in their order.

        ``on_progress(done, total)`` is called in the calling thread as verdicts become known.
        Raises VerificationError if the verifier is closed, but never because of an item's content.
        """
        if self._workers.is_closed:
            raise VerificationError("the verifier is closed; make a new one")
        items = list(items)
        verdicts: list[Verdict | None] = [None] * len(items)
        waiting: dict[Job, list[tuple[int, FormatResult]]] = {}
        for index, item in enumerate(items):
            settled = screen(item, **options)
            if isinstance(settled, Verdict):
                verdicts[index] = settled
                continue
            form, found = settled
            outcome = found if isinstance(found, Outcome) else self._remembered(found)
            if outcome is not None:
                verdicts[index] = make_verdict(form, outcome, **options)
            else:
                assert isinstance(found, Job)
                waiting.setdefault(found, []).append((index, form))
        num_done = len(items) - sum(map(len, waiting.values()))
        if on_progress is not None:
            on_progress(num_done, len(items))

        def settle(job: Job, outcome: Outcome) -> None:
            nonlocal num_done
            for index, form in waiting[job]:
                verdicts[index] = make_verdict(form, outcome, **options)
            num_done += len(waiting[job])
            if on_progress is not None:
                on_progress(num_done, len(items))

        self._compute(list(waiting), settle)
        return [verdict for verdict in verdicts if verdict is not None]

    def verify_ahead(self, items: Iterable[Item], **options: Unpack[VerdictOptions]) -> None:
        """Let the workers begin with these items, and return at once. Does nothing if they cannot take the items.

        A later `verify_batch` takes what they have found by then and waits for the rest. Its verdicts do not change.
        """
        settled = (screen(item, **options) for item in items)
        found = (one[1] for one in settled if not isinstance(one, Verdict))
        jobs = dict.fromkeys(job for job in found if isinstance(job, Job))  # in order: the cache keeps the last ones
        with contextlib.suppress(VerificationError, RuntimeError, OSError), self._lock:  # `verify_batch` handles it
            if len(self._ahead) > self._cache_size:  # nobody asked for them, for example if a rollout failed
                for job in [job for job, future in self._ahead.items() if future.done()]:
                    if (finding := self._workers.finding(self._ahead.pop(job))) is not None:
                        self._remember(job, finding.outcome)
            for job in jobs:
                if job not in self._ahead and self._remembered(job) is None:
                    self._ahead[job] = self._workers.submit(self._workers.running(), job)
                    self._ahead_clock.start()
                    self._ahead[job].add_done_callback(self._ahead_clock.stop)

    def hidden_seconds(self) -> float:
        """Seconds in which workers judged items of `verify_ahead` since the last call of this method."""
        return self._ahead_clock.read()

    def _remembered(self, job: Job) -> Outcome | None:
        with self._lock:
            if job in self._cache:
                self._cache.move_to_end(job)
            return self._cache.get(job)

    def _remember(self, job: Job, outcome: Outcome) -> None:
        if outcome.kind in (VerdictKind.TIMEOUT, VerdictKind.ERROR):  # these may be the machine's fault
            return
        with self._lock:
            self._cache[job] = outcome
            self._cache.move_to_end(job)
            if len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)

    def _compute(self, jobs: Sequence[Job], settle: Callable[[Job, Outcome], None]) -> None:
        """Have workers judge ``jobs``; calls ``settle`` once for each, in this thread."""
        doubtful: list[Job] = []

        def finish(job: Job, finding: JobResult) -> None:
            self._remember(job, finding.outcome)
            settle(job, finding.outcome)

        work_off(
            self._workers,
            jobs,
            self._taken_ahead(jobs),
            num_at_once=2 * self.workers,
            finish=lambda job, finding: finish(job, finding) if finding.is_certain else doubtful.append(job),
        )
        if doubtful:
            with self._alone:
                work_off(self._workers, doubtful, {}, num_at_once=1, finish=finish)

    def _taken_ahead(self, jobs: Sequence[Job]) -> "dict[Future[Outcome], Job]":
        """The jobs that workers have begun with, without those whose pool has broken since."""
        with self._lock:
            ahead = {self._ahead.pop(job): job for job in jobs if job in self._ahead}
        return {
            future: job
            for future, job in ahead.items()
            if not future.done() or self._workers.finding(future) is not None
        }


def _not_done(workers: Workers) -> JobResult:
    """Of a job that no worker can do any more."""
    reason = f"the verification workers could not be kept alive ({_MAX_REPLACEMENTS} new starts failed)"
    if workers.is_closed:
        reason = "the verifier was closed before this item was judged"
    return JobResult(Outcome(VerdictKind.ERROR, reason), is_certain=True)


def work_off(
    workers: Workers,
    jobs: Sequence[Any],
    in_flight: "dict[Future[Any], Any]",
    *,
    num_at_once: int,
    finish: Callable[[Any, JobResult], None],
    extra_s: float = 0.0,
) -> None:
    """Have workers do ``jobs``, some of which are in flight; calls ``finish`` once for each, in this thread.

    ``extra_s``: a job may wait so long without using CPU time."""
    begun = set(in_flight.values())
    pending = deque(job for job in jobs if job not in begun)
    num_replacements = 0
    awake = AwakeTime(longest_s=2 * _POLL_S)
    running_since: dict[Future[Any], float] = {}
    wait_s = _WAITS * workers.timeout_s + _WAIT_GRACE_S + extra_s
    last_progress, pool = awake.look(), None
    while pending or in_flight:
        try:
            pool = pool or workers.running()
            while pending and len(in_flight) < num_at_once:
                future = workers.submit(pool, pending[0])
                in_flight[future] = pending.popleft()
            is_broken = not pool.active
        except (VerificationError, RuntimeError, OSError):  # closed, or the pool has just broken
            is_broken = True
        done, _ = wait(in_flight, timeout=0 if is_broken else _POLL_S, return_when=FIRST_COMPLETED)
        now = awake.look()
        findings = {future: workers.finding(future) for future in done}
        for future in in_flight.keys() - done:
            if future.running() and now - running_since.setdefault(future, now) > wait_s:
                findings[future] = workers.give_up(future, wait_s)
        for future, finding in findings.items():
            job = in_flight.pop(future)
            if finding is None:
                pending.append(job)
                is_broken = True
                continue
            num_replacements, last_progress = 0, now
            finish(job, finding)
        # Beyond this the pool itself is stuck: a worker that is killed while it takes a job leaves a lock behind.
        patience_s = _START_GRACE_S * 2**num_replacements
        if any(future.running() for future in in_flight):
            patience_s += wait_s
        if is_broken or now - last_progress > patience_s:
            pending.extend(in_flight.values())
            in_flight.clear()
            if not pending:
                break
            num_replacements += 1
            if workers.is_closed or num_replacements > _MAX_REPLACEMENTS:
                for job in pending:
                    finish(job, _not_done(workers))
                return
            if pool is not None:
                workers.discard(pool)
            pool, last_progress = None, awake.look()


def verify_batch(
    items: Iterable[Item],
    *,
    workers: int,
    timeout_s: float,
    memory_limit_mb: int = DEFAULT_MEMORY_LIMIT_MB,
    on_progress: Progress | None = None,
    **options: Unpack[VerdictOptions],
) -> list[Verdict]:
    """Verdicts on ``(response, ground_truth)`` pairs, in their order, by workers that live for this call.

    Starting them takes a second or two, so a caller with many batches keeps a :class:`Verifier`.
    """
    items = list(items)
    verifier = Verifier(
        workers=max(1, min(workers, len(items))) if workers > 0 else workers,
        timeout_s=timeout_s,
        memory_limit_mb=memory_limit_mb,
    )
    with contextlib.closing(verifier):
        return verifier.verify_batch(items, on_progress=on_progress, **options)


_shared: tuple[int, Verifier] | None = None
_shared_lock = threading.Lock()


def verify(response: str, ground_truth: str, **options: Unpack[VerdictOptions]) -> Verdict:
    """The verdict on one response, by a single worker that stays until this process ends."""
    global _shared
    with _shared_lock:
        if _shared is None or _shared[0] != os.getpid():  # a forked child must not use its parent's worker
            verifier = Verifier(workers=1)
            atexit.register(verifier.close)
            _shared = (os.getpid(), verifier)
        verifier = _shared[1]
    return verifier.verify(response, ground_truth, **options)
