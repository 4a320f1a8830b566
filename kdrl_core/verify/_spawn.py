"""A "spawn" context whose children do not import the parent's ``__main__``.

Plain spawn imports it again in every child. Our children need nothing from it, and importing it may do harm: a script
without an ``if __name__ == "__main__"`` guard would fail, and a command line that imports torch and Prefect takes
seconds per worker and gigabytes of address space, more than the worker's memory limit allows.
"""

import signal
import sys
from multiprocessing import popen_spawn_posix, resource_tracker, spawn
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess
from types import FunctionType, SimpleNamespace
from typing import Any


def _preparation_data(name: str) -> dict[str, Any]:
    """As multiprocessing's, without the entries that name the main module."""
    data = spawn.get_preparation_data(name)
    return {key: value for key, value in data.items() if not key.startswith("init_main_from")}


_SPAWN = SimpleNamespace(**{**vars(spawn), "get_preparation_data": _preparation_data})


class _Popen(popen_spawn_posix.Popen):
    # The standard method with `spawn` bound to ours. It has no hook, and a copy would age with each Python version.
    _launch = FunctionType(
        popen_spawn_posix.Popen._launch.__code__,  # type: ignore[attr-defined]
        {**vars(popen_spawn_posix), "spawn": _SPAWN},
        "_launch",
    )


class WorkerProcess(SpawnProcess):
    """A spawned process that starts from an empty ``__main__``. Its parent stops it; it never sees SIGINT."""

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> _Popen:  # noqa: N802 (the name that multiprocessing calls)
        # Ctrl-C reaches the whole process group, and a worker that is still starting would print a traceback. So SIGINT
        # is blocked here, and the worker inherits that. The tracker starts first, since its start unblocks SIGINT.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return _Popen(process_obj)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class WorkerContext(SpawnContext):
    """The ``context`` of a pebble pool."""

    Process = WorkerProcess


if sys.platform == "win32":
    raise ImportError("kdrl_core.verify needs a POSIX system: it limits the memory and time of worker processes")
