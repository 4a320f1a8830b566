"""The worker processes of a verifier, the outcomes of their jobs, and the time for which they worked.

Pebble owns the processes. A pool that breaks (its workers were killed from outside while idle, or cannot start) can be
discarded; the next job then gets a new pool.

The kernel ends a worker that has used up its CPU time. Pebble's own deadline is not used: it reads the wall clock in
this process, so that a clock step or a stopped process group would end comparisons that did nothing wrong. If a worker
uses no CPU time and gives no result, its caller asks the pool to `give_up` the job.

Workers are spawned, but unlike with plain spawn they do not import the parent's ``__main__``. They need nothing from
it, and importing it may do harm: a script without an ``if __name__ == "__main__"`` guard would fail, and a command line
that imports torch and Prefect takes seconds per worker and gigabytes of address space, more than the worker's memory
limit allows.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from multiprocessing import popen_spawn_posix, resource_tracker, spawn, util
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess
from types import FunctionType, SimpleNamespace
from typing import Any, NamedTuple

from pebble import ProcessExpired, ProcessPool

from kdrl_core.errors import VerificationError
from kdrl_core.types import VerdictKind
from kdrl_core.verify.accuracy import EXIT_OUT_OF_MEMORY, judge, start_worker
from kdrl_core.verify.screening import Outcome

if sys.platform == "win32":
    raise ImportError("kdrl_core.verify needs a POSIX system: it limits the memory and time of worker processes")


class JobResult(NamedTuple):
    """What came of a job. If the machine may be at fault, ``is_certain`` is False: then the job is judged once more."""

    outcome: Outcome
    is_certain: bool
    found: Any = None
    """What a task other than a comparison returned; None if its worker died, which `outcome` then tells."""


def _preparation_data(name: str) -> dict[str, Any]:
    """As multiprocessing's, without the entries that name the main module."""
    data = spawn.get_preparation_data(name)
    return {key: value for key, value in data.items() if not key.startswith("init_main_from")}


def _in_own_session(path: str, arguments: Sequence[str], passed: Sequence[int]) -> int:
    """As multiprocessing's `spawnv_passfds`, in a new session: Ctrl-C, `timeout` and a closed terminal signal the whole
    group of the parent, which stops its workers itself."""
    process = subprocess.Popen(
        arguments,
        executable=path,
        pass_fds=passed,
        restore_signals=False,
        start_new_session=True,
        env={**os.environ, "PYTHONHASHSEED": "0"},  # sets have one order, so a function finds the same twice
    )
    process.returncode = 0  # multiprocessing waits for it, `subprocess` must not
    return process.pid


_SPAWN = SimpleNamespace(**{**vars(spawn), "get_preparation_data": _preparation_data})
_UTIL = SimpleNamespace(**{**vars(util), "spawnv_passfds": _in_own_session})


class _Popen(popen_spawn_posix.Popen):
    # The standard method with `spawn` and `util` bound to ours. It has no hook, and a copy would age with each version
    # of Python.
    _launch = FunctionType(
        popen_spawn_posix.Popen._launch.__code__,  # type: ignore[attr-defined]
        {**vars(popen_spawn_posix), "spawn": _SPAWN, "util": _UTIL},
        "_launch",
    )
    _has_group = True

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        """As multiprocessing's. What a dead worker has started in its session ends with it."""
        code = super().poll(flag)
        if code is not None and self._has_group:
            self._has_group = False
            with contextlib.suppress(OSError):
                os.killpg(self.pid, signal.SIGKILL)
        return code


class WorkerProcess(SpawnProcess):
    """A spawned process that starts from an empty ``__main__``, in a session of its own. Its parent stops it."""

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> _Popen:  # noqa: N802 (the name that multiprocessing calls)
        # Whoever sends it SIGINT by its pid gets no traceback: it is blocked here, and the worker inherits that. The
        # tracker starts first, since its start unblocks SIGINT.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return _Popen(process_obj)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class WorkerContext(SpawnContext):
    """The ``context`` of a pebble pool."""

    Process = WorkerProcess


Call = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function and its arguments."""


class Workers:
    """A pool of worker processes that is started when it is first needed. Usable from any thread.

    They compare answers; a subclass gives them another task.
    """

    what = "the comparison"
    """What a worker does, for reasons."""

    def __init__(self, count: int, timeout_s: float, memory_limit_mb: int) -> None:
        self.is_closed = False
        self.num_submitted = 0
        self.pool: ProcessPool | None = None
        """None until a worker is needed, and after the pool was discarded."""
        self._count = count
        self.timeout_s = timeout_s
        self._memory_limit_mb = memory_limit_mb
        self._lock = threading.Lock()

    def running(self) -> ProcessPool:
        """The pool, made anew if there is none. Raises VerificationError once the workers are closed."""
        with self._lock:
            if self.is_closed:
                raise VerificationError("the verifier is closed; make a new one")
            if self.pool is None:
                initializer, initargs = self._start()
                self.pool = ProcessPool(
                    max_workers=self._count, initializer=initializer, initargs=initargs, context=WorkerContext()
                )
            return self.pool

    def submit(self, pool: ProcessPool, job: Any) -> "Future[Any]":
        """Give a job to a pool. Raises RuntimeError or OSError if the pool is broken."""
        with self._lock:
            self.num_submitted += 1
        function, args = self._task(job)
        return pool.schedule(function, args=args)

    def _start(self) -> Call:
        """What a new worker does first."""
        return start_worker, (self._memory_limit_mb,)

    def _task(self, job: Any) -> Call:
        """What a worker does for a job."""
        return judge, (job.answer, job.ground_truth, job.is_text, self.timeout_s, self._memory_limit_mb)

    def _read(self, returned: Any) -> JobResult:
        """What a worker returned."""
        return JobResult(Outcome(*returned), is_certain=True)

    def finding(self, future: "Future[Any]") -> JobResult | None:
        """What came of a job that is done. None if the pool broke first and the job was not the cause."""
        try:
            error = future.exception(timeout=0)  # not `result`: a worker may send SystemExit
        except Exception:  # CancelledError
            return None
        if error is None:
            return self._read(future.result(timeout=0))
        if isinstance(error, ProcessExpired):
            if error.exitcode == -signal.SIGPROF:
                reason = f"no result within {self.timeout_s:g} s; the worker was killed"
                return JobResult(Outcome(VerdictKind.TIMEOUT, reason), is_certain=True)
            if error.exitcode == EXIT_OUT_OF_MEMORY:  # perhaps earlier jobs had left little room
                reason = f"{self.what} reached the memory limit; the worker was replaced"
            else:
                reason = f"the worker died (exit code {error.exitcode}) and was replaced"
            return JobResult(Outcome(VerdictKind.ERROR, reason), is_certain=False)
        return None  # BrokenProcessPool, a channel error

    @staticmethod
    def give_up(future: "Future[Any]", waited_s: float) -> JobResult:
        """Have the pool kill the worker of a job that has run for ``waited_s`` seconds, and replace it."""
        future.cancel()
        reason = f"no result after {waited_s:.0f} s of waiting; the worker was killed"
        return JobResult(Outcome(VerdictKind.TIMEOUT, reason), is_certain=False)

    def discard(self, pool: ProcessPool) -> None:
        """Stop a broken pool, unless another thread does. Whoever needs workers next makes a new one."""
        with self._lock:
            if self.pool is not pool:
                return
            self.pool = None
        _stop(pool)

    def close(self) -> None:
        """Stop the workers for good."""
        with self._lock:
            self.is_closed = True
            pool, self.pool = self.pool, None
        if pool is not None:
            _stop(pool)


def _stop(pool: ProcessPool) -> None:
    """Kill a pool's workers and wait for its threads. A pool that is broken already must not break the caller."""
    with contextlib.suppress(RuntimeError, OSError, ValueError):
        pool.stop()
        pool.join()


class AwakeTime:
    """The seconds that this process has lived through: time in which it is stopped or suspended hardly counts.

    Between two looks at most ``longest_s`` pass, so its owner looks more often than that.
    """

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._seen = time.monotonic()
        self._total = 0.0

    def look(self) -> float:
        """Seconds lived through since the start."""
        seen, self._seen = self._seen, time.monotonic()
        self._total += min(self._seen - seen, self._longest_s)
        return self._total


class Clock:
    """The time during which at least one of several tasks was running."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._since = self._total = 0.0

    def start(self) -> None:
        with self._lock:
            if not self._running:
                self._since = time.monotonic()
            self._running += 1

    def stop(self, _: object = None) -> None:
        with self._lock:
            self._running -= 1
            if not self._running:
                self._total += time.monotonic() - self._since

    def read(self) -> float:
        """Seconds since the last call."""
        with self._lock:
            now = time.monotonic()
            total, self._total = self._total + (now - self._since if self._running else 0.0), 0.0
            self._since = now
            return total
