"""The log of a run, `run.log` in its folder, rotated; and in `run.error.json` the error that ended its last session.

DEBUG of kdrl, WARNING of everything else, while a process works on the run. It holds no keys. It is no artifact: it has
no manifest, nothing depends on it, and it may be deleted at any time.
"""

import json
import logging
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path

from kdrl_core.config.secrets import redact, shown
from kdrl_core.errors import KdrlError, Stopped

LOGGER = "kdrl"
_MAX_BYTES = 4 * 2**20
_KEPT = 3
_MAX_ERROR_CHARS = 2_000
_NOTE = "log: "


class _Redacting(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class _RunLog(RotatingFileHandler):
    """Writes what belongs into a run's log. A full disk or a deleted folder never disturbs the work."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, maxBytes=_MAX_BYTES, backupCount=_KEPT, encoding="utf-8", errors="replace", delay=True)
        self.setFormatter(_Redacting("%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"))
        self.addFilter(lambda record: record.levelno >= logging.WARNING or record.name.split(".")[0] == LOGGER)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Let the record go."""


def log_file(root: Path) -> Path:
    """The log of the run in a folder."""
    return root / "run.log"


@contextmanager
def logging_to(file: Path) -> Iterator[None]:
    """Keep a log while this process works in its folder. An error that ends the work is written there with its
    traceback, and gets a note that names the log (`log_of`)."""
    handler = _RunLog(file)
    log = logging.getLogger(LOGGER)
    known = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    loggers = [logging.root, *(one for one in known if not one.propagate)]  # so each record comes once
    for logger in loggers:
        logger.addHandler(handler)
    level = log.level
    log.setLevel(logging.DEBUG)
    log.debug(
        "session begins: python %s, %s", platform.python_version(), " ".join(shown(redact(one)) for one in sys.argv)
    )
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


def log_of(error: BaseException) -> str | None:
    """The log that has the traceback of an error, as `logging_to` noted it."""
    notes = [note for note in getattr(error, "__notes__", []) if note.startswith(_NOTE)]
    return notes[0].removeprefix(_NOTE) if notes else None


def last_error(root: Path) -> dict[str, str] | None:
    """The error that ended a session in this folder, unless a later one was stopped in order: `at`, `error`, `log`."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        found = json.loads(_error_file(log_file(root)).read_text(encoding="utf-8"))
        return {name: str(found[name])[:_MAX_ERROR_CHARS] for name in ("at", "error", "log")}
    return None


def told(error: BaseException) -> str:
    """An error in one line: kdrl's own as they are, others with their type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, KdrlError) else f"{type(error).__name__}: {text}".removesuffix(": ")


def _error_file(log: Path) -> Path:
    return log.with_suffix(".error.json")


def _note_error(file: Path, error: BaseException, handler: logging.Handler) -> None:
    is_wanted = isinstance(error, Stopped) or not isinstance(error, Exception)  # asked for, or an interrupt
    level = logging.INFO if is_wanted else logging.ERROR
    trace = None if isinstance(error, Stopped) else (type(error), error, error.__traceback__)
    handler.handle(logging.LogRecord(LOGGER, level, __file__, 0, "session ends: %s", (told(error),), trace))
    if is_wanted:  # the session got past the last error
        with suppress(OSError):
            _error_file(file).unlink(missing_ok=True)
        return
    if log_of(error) is None:
        error.add_note(f"{_NOTE}{file}")
    content = {"at": datetime.now(UTC).isoformat("T", "seconds"), "error": redact(told(error)), "log": str(file)}
    with suppress(OSError):
        temporary = _error_file(file).with_suffix(".tmp")
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(_error_file(file))
