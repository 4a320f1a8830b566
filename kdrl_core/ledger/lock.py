"""Working on a run: the lock, the log that is kept meanwhile, and the wish to stop.

One process at a time works on a run. The lock is the kernel's (flock): it ends with its holder, however killed. Who
looks takes a shared lock for a moment, never the exclusive one: lookers do not see each other, and a process that wants
the lock waits for them.

The log is `run.log`, rotated: DEBUG of kdrl, WARNING of everything else. `run.error.json` holds the error that ended
the last session. Neither holds keys. Both are no artifacts: nothing depends on them, and they may be deleted any time.
"""

import fcntl
import json
import logging
import os
import platform
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path

from filelock import FileLock, Timeout

from kdrl_core.config.paths import read_json
from kdrl_core.config.secrets import resolved, shown
from kdrl_core.errors import RunLockedError, Stopped, told
from kdrl_core.ledger.manifest import begin_memory, end_memory
from kdrl_core.ledger.publish import replace_file, storage_errors

_PATIENCE_S = 1.0
"""How long a process tries, because a looker may be in its way for a moment."""
_POLL_S = 0.02
_RUN_LOCK = "run.lock"


@contextmanager
def run_lock(path: Path) -> Iterator[None]:
    """Hold the lock. Meanwhile a run's log is kept, if the lock is a run's (other work has locks of its own).
    Re-entrant within the process: a pipeline holds it around the stages that take it again.

    Raises:
        RunLockedError: another process holds it; its pid, host and start are named.
        StorageError: the folder cannot be written.
    """
    lock = FileLock(path, is_singleton=True, thread_local=False)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=_PATIENCE_S, poll_interval=_POLL_S)
        except Timeout:
            raise _locked(path, _holder(_holder_file(path))) from None
    is_outermost = lock.lock_counter == 1
    try:
        with ExitStack() as session:
            if is_outermost:
                begin_memory(path.parent)
                session.callback(end_memory, path.parent)
                holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
                replace_file(_holder_file(path), json.dumps(holder).encode())
                if path.name == _RUN_LOCK:
                    session.enter_context(_logging_to(path.with_suffix(".log")))
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


def _now() -> str:
    return datetime.now(UTC).isoformat("T", "seconds")


# --- the wish to stop -------------------------------------------------------------------------------------------------

_why: str | None = None


def request_stop(why: str) -> None:
    """Ask this process to stop at the next place where nothing in hand is lost; the first reason counts. Called by who
    gets the wish: a signal, a cancelled flow run."""
    global _why
    _why = _why or why


def stop_requested() -> str | None:
    """Why this process is to stop; None if it is not."""
    return _why


def forget_stop() -> None:
    """Take the wish back: the work has stopped, or has come to its end before."""
    global _why
    _why = None


def stop_if_requested() -> None:
    """Call between two publications. Raises Stopped if this process is to stop."""
    if _why is not None:
        raise Stopped(_why)


# --- the log ----------------------------------------------------------------------------------------------------------

_LOGGER = "kdrl"
_MAX_BYTES = 4 * 2**20
_KEPT = 3
_MAX_ERROR_CHARS = 2_000
_NOTE = "log: "


def log_file(root: Path) -> Path:
    """The log of the run in a folder."""
    return root / "run.log"


def log_of(error: BaseException) -> str | None:
    """The log that has the traceback of an error that ended a session."""
    notes = [note for note in getattr(error, "__notes__", []) if note.startswith(_NOTE)]
    return notes[0].removeprefix(_NOTE) if notes else None


def last_error(root: Path) -> dict[str, str] | None:
    """The error that ended a session in this folder, unless a later one was stopped in order: `at`, `error`, `log`."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = read_json(_error_file(log_file(root)))
        return {name: str(found[name])[:_MAX_ERROR_CHARS] for name in ("at", "error", "log")}
    return None


class _RunLog(RotatingFileHandler):
    """Writes what belongs into a run's log. A full disk, a deleted folder, or a link or FIFO in the log's place never
    disturbs the work."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, maxBytes=_MAX_BYTES, backupCount=_KEPT, delay=True)
        self.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"))

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or record.name.split(".")[0] == _LOGGER

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))

    def _open(self) -> TextIOWrapper:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        return os.fdopen(os.open(self.baseFilename, flags, 0o666), "a", encoding="utf-8", errors="replace")

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Let the record go."""


@contextmanager
def _logging_to(file: Path) -> Iterator[None]:
    """Keep a log while the context is open. An error that ends it is written there with its traceback, and gets a note
    that names the log (`log_of`)."""
    handler = _RunLog(file)
    log = logging.getLogger(_LOGGER)
    known = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    loggers = [logging.root, *(one for one in known if not one.propagate)]  # so each record comes once
    for logger in loggers:
        logger.addHandler(handler)
    level = log.level
    log.setLevel(logging.DEBUG)
    log.debug("session begins: python %s, %s", platform.python_version(), " ".join(map(shown, sys.argv)))
    try:
        yield
        log.debug("session ends")
    except BaseException as error:
        _note_error(file, error, handler)
        raise
    finally:
        log.setLevel(level)
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()


def _note_error(file: Path, error: BaseException, handler: logging.Handler) -> None:
    is_wanted = isinstance(error, Stopped) or not isinstance(error, Exception)  # asked for, or an interrupt
    level = logging.INFO if is_wanted else logging.ERROR
    trace = None if isinstance(error, Stopped) else (type(error), error, error.__traceback__)
    handler.handle(logging.LogRecord(_LOGGER, level, __file__, 0, "session ends: %s", (told(error),), trace))
    with suppress(OSError):
        if is_wanted:  # the session got past the last error
            _error_file(file).unlink(missing_ok=True)
            return
        if log_of(error) is None:
            error.add_note(f"{_NOTE}{file}")
        content = {"at": _now(), "error": redact(told(error)), "log": str(file)}
        replace_file(_error_file(file), json.dumps(content).encode())


def _error_file(log: Path) -> Path:
    return log.with_suffix(".error.json")


# --- no keys in a log -------------------------------------------------------------------------------------------------

_MIN_SECRET_CHARS = 6
"""Shorter values are not cut out of texts: a placeholder such as `EMPTY` may be an ordinary word there."""
_HIDDEN = "***"
_HOLDS_SECRET = re.compile(r"(?:_|^)(?:API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|AUTH)(?:_|$)", re.IGNORECASE)
"""Names of environment variables whose values are secrets."""
_USER_OF_URL = re.compile(r"(?<=://)[^\s/@]+(?=@)")
_AFTER_NAME = re.compile(
    r"((?:\b[\w-]*(?:api[_-]?key|token|secret|password)[\"']?\s*[:=]|--[\w-]*(?:key|token|secret|password)\s"
    r"|\b(?:bearer|authorization)\b[\"']?[:=\s])\s*[\"']?(?:(?:bearer|basic)\s+)?)[^\s\"',;&]{6,}",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """A text that goes to a log, without secrets: keys that were resolved, values of environment variables whose names
    tell that they are secret, users and passwords in URLs, and what is given as `api_key=…` or `Bearer …`."""
    known = resolved | {value for name, value in os.environ.items() if _HOLDS_SECRET.search(name)}
    for secret in sorted(known, key=len, reverse=True):
        if len(secret) >= _MIN_SECRET_CHARS and not secret.startswith("/"):
            text = text.replace(secret, _HIDDEN)
    return _AFTER_NAME.sub(rf"\1{_HIDDEN}", _USER_OF_URL.sub(_HIDDEN, text))
