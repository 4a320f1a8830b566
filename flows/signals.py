"""Ctrl-C, SIGTERM and SIGHUP: the first asks the work to stop, the second ends it at once, and neither takes long.

While a flow publishes (`publishing`), the first signal becomes a wish (`kdrl_core.ledger.lock`): the work stops at the
next place where nothing is lost. If that takes longer than the grace, it is interrupted. At any other time the first
signal interrupts at once. A thread watches over the limits. Past the last one, it ends the process, and the guard
(`flows.guard`) ends the children.

This module imports no Prefect.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from kdrl_core.ledger.lock import request_stop

GRACE_S = 6.0
"""Time for what is in hand to be published."""
LIMIT_S = 8.5
"""The process ends this long after the first signal."""
AT_ONCE_S = 1.5
"""And this long after the second."""

STOPPED = 130
"""Exit code of a program that a signal has stopped: the same for each of `STOP_SIGNALS`."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGHUP: "the end of its terminal (SIGHUP)"}

_handling: "Signals | None" = None
_publishing = 0


class Signals:
    """Handles the stop signals of this process while the context is open. To be entered in the main thread."""

    def __init__(
        self, tell: Callable[[str], None], last_words: str, *, grace_s: float = GRACE_S, limit_s: float = LIMIT_S
    ) -> None:
        """`tell` prints a line; `last_words` are printed if the process has to end in the middle of its work."""
        self.number: signal.Signals | None = None
        """The first signal that came."""
        self.is_told = False
        """Whether the user has been told the last words."""
        self._tell, self._last_words = tell, last_words
        self._grace_s, self._limit_s = grace_s, limit_s
        self._count = 0
        self._is_interrupted = self._is_overdue = False
        self._previous: dict[signal.Signals, Any] = {}
        self._terminals = [fd for fd in (0, 1, 2) if os.isatty(fd)]

    @property
    def name(self) -> str:
        """The signal in words."""
        number = self.number or signal.SIGINT
        return _NAMES.get(number, number.name)

    def __enter__(self) -> "Signals":
        global _handling
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._thread = threading.Thread(target=self._watch, name="kdrl-signals", daemon=True)
        self._thread.start()
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, and commands in the background of a script
                self._previous[number] = signal.signal(number, self.handle)
        _handling = self
        return self

    def __exit__(self, *_: object) -> None:
        global _handling
        if self._count:  # the program is ending; the limits hold for what is left of it
            return
        _handling = None
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        os.close(self._write)
        self._thread.join(1.0)
        os.close(self._read)

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """The handler. Raises KeyboardInterrupt, at most once, when the work is to be interrupted."""
        del frame
        goes_on = not self._is_overdue and self._count == 0 and _publishing > 0
        interrupts = not goes_on and not self._is_interrupted
        self._is_interrupted = self._is_interrupted or interrupts  # before the watcher, which tells of it, hears of it
        if not self._is_overdue:
            self.number = self.number or signal.Signals(number)
            self._count += 1
            if number == signal.SIGHUP:  # writing to a terminal that is gone fails
                _to_nowhere(self._terminals)
            with suppress(OSError):
                os.write(self._write, b"s")
        if goes_on:
            request_stop(f"stopped by {self.name}")
        if interrupts:
            raise KeyboardInterrupt

    def end_in_order(self) -> None:
        """Interrupt nothing from here on; the limits hold."""
        self._is_interrupted = True

    def _watch(self) -> None:
        overdue_at = end_at = float("inf")
        count = 0
        while True:
            now = time.monotonic()
            if now >= end_at:
                self._end()
            if now >= overdue_at:
                overdue_at = float("inf")
                self._is_overdue = True
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            wait_s = max(0.0, min(overdue_at, end_at) - now)
            if not select.select([self._read], [], [], None if wait_s == float("inf") else wait_s)[0]:
                continue
            if not os.read(self._read, 1):
                return
            count += 1
            now = time.monotonic()
            if count == 1:
                overdue_at, end_at = now + self._grace_s, now + self._limit_s
                if not self._is_interrupted:
                    self._say(f"{self.name}: stopping when the work in hand is published; once more to stop at once")
            else:
                end_at = min(end_at, now + AT_ONCE_S) if count == 2 else now

    def _say(self, text: str) -> None:
        with suppress(OSError, ValueError):
            self._tell(text)

    def _end(self) -> None:
        if not self.is_told:
            self._say(self._last_words)
        os._exit(STOPPED)


@contextmanager
def publishing() -> Iterator[None]:
    """While this is open, the first signal lets the work go on to the next place where it may stop."""
    global _publishing
    _publishing += 1
    try:
        yield
    finally:
        _publishing -= 1


def end_in_order() -> None:
    """Call where the work has stopped: no signal interrupts what is left, which is to report it; the limits hold."""
    if _handling is not None:
        _handling.end_in_order()


@contextmanager
def own_sigterm(otherwise: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle SIGTERM as `Signals` does, also inside of a flow, where Prefect has put a handler of its own; in a process
    without `Signals`, such as a worker's, call `otherwise`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, otherwise if _handling is None else _handling.handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _to_nowhere(fds: list[int]) -> None:
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_RDWR)
        for fd in fds:
            os.dup2(nowhere, fd)
