"""One process at a time works on a run. The lock is the kernel's (flock): it ends with its holder, however killed."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from kdrl_core.config.small_files import read_json
from kdrl_core.errors import RunLockedError
from kdrl_core.ledger.manifest import begin_memory, end_memory
from kdrl_core.ledger.publish import replace_file, storage_errors

_PATIENCE_S = 0.2
"""Longer than `lock_holder` in another process holds the lock for its test."""


@contextmanager
def run_lock(path: Path) -> Iterator[None]:
    """Hold the run's lock. Re-entrant within the process: a pipeline holds it around the stages that take it again.

    Raises:
        RunLockedError: another process holds it; its pid, host and start are named.
        StorageError: the folder cannot be written.
    """
    holder_file = path.with_suffix(".holder.json")
    lock = FileLock(path, is_singleton=True, thread_local=False)
    try:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=_PATIENCE_S, poll_interval=_PATIENCE_S / 4)
    except Timeout as error:
        raise RunLockedError(
            f"run {path.parent.name} is in use by {_holder(holder_file)}; wait for it, stop it, or use another run name"
        ) from error
    try:
        if lock.lock_counter == 1:
            begin_memory(path.parent)
            holder = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": datetime.now(UTC).isoformat("T", "seconds"),
            }
            replace_file(holder_file, json.dumps(holder).encode())
        yield
    finally:
        if lock.lock_counter == 1:
            end_memory(path.parent)
        lock.release()


def lock_holder(path: Path) -> str | None:
    """Who holds the lock at `path`, in words, or None if nobody does."""
    if not path.exists():
        return None
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return _holder(path.with_suffix(".holder.json"))
    except OSError:  # nobody can work on a run on a disk that cannot be written
        return None
    lock.release()
    return None


def _holder(file: Path) -> str:
    try:
        holder = read_json(file)
        return f"pid {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
