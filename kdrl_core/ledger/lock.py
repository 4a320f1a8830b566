"""One process at a time works on a run. The lock is the kernel's (flock): it ends with its holder, however killed.

Who looks takes a shared lock for a moment, never the exclusive one: lookers do not see each other, and a process that
wants the lock waits for them.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from kdrl_core.config.paths import read_json
from kdrl_core.errors import RunLockedError
from kdrl_core.ledger.manifest import begin_memory, end_memory
from kdrl_core.ledger.publish import replace_file, storage_errors
from kdrl_core.ledger.run_log import logging_to

_PATIENCE_S = 0.2
_MAX_PATIENCE_S = 5.0
"""How long a process tries while nobody but lookers is in its way."""


@contextmanager
def run_lock(path: Path, *, keeps_log: bool = True) -> Iterator[None]:
    """Hold the run's lock, and keep the run's log meanwhile, unless `keeps_log` is false. Re-entrant within the
    process: a pipeline holds it around the stages that take it again.

    Raises:
        RunLockedError: another process holds it; its pid, host and start are named.
        StorageError: the folder cannot be written.
    """
    lock = FileLock(path, is_singleton=True, thread_local=False)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _acquire(lock, path)
    is_outermost = lock.lock_counter == 1
    try:
        with ExitStack() as session:
            if is_outermost:
                begin_memory(path.parent)
                session.callback(end_memory, path.parent)
                holder = {
                    "pid": os.getpid(),
                    "host": socket.gethostname(),
                    "since": datetime.now(UTC).isoformat("T", "seconds"),
                }
                replace_file(_holder_file(path), json.dumps(holder).encode())
                if keeps_log:
                    session.enter_context(logging_to(path.with_suffix(".log")))
            yield
    finally:
        if is_outermost:
            with suppress(OSError):
                _holder_file(path).unlink(missing_ok=True)
        lock.release()


def require_free(path: Path) -> None:
    """Raise RunLockedError if another process holds the lock at `path`. For commands that would notice it late."""
    if (holder := lock_holder(path)) is not None:
        raise _locked(path, holder)


def lock_holder(path: Path) -> str | None:
    """Who holds the lock at `path`, in words, or None if nobody does."""
    return _holder(_holder_file(path)) if _is_held(path) else None


def _acquire(lock: FileLock, path: Path) -> None:
    deadline = time.monotonic() + _MAX_PATIENCE_S
    while True:
        try:
            lock.acquire(timeout=_PATIENCE_S, poll_interval=_PATIENCE_S / 8)
        except Timeout:
            if _is_held(path) or time.monotonic() > deadline:
                raise _locked(path, _holder(_holder_file(path))) from None
        else:
            return


def _is_held(path: Path) -> bool:
    """Whether a process holds the lock exclusively."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:  # no lock yet, or a disk that nobody can work on
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(file)
    return False


def _locked(path: Path, holder: str) -> RunLockedError:
    return RunLockedError(
        f"run {path.parent.name} is in use by {holder}; wait for it, stop it, or use another run name"
    )


def _holder_file(path: Path) -> Path:
    return path.with_suffix(".holder.json")


def _holder(file: Path) -> str:
    try:
        holder = read_json(file)
        return f"pid {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
