"""The parent of the child that does a step for real: passes its events on, and names the check that it died in.

A child may be ended by the kernel, crash in compiled code, or hang. Then the check that was under way failed, with the
signal or the time limit, and every process that the child has started is ended.
"""

import json
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from kdrl_core import process_guard
from kdrl_core.look.doctor.checks import CheckStatus, Emit
from kdrl_core.look.doctor.machine import kernel_kills
from kdrl_core.look.doctor.remedies import remedy_for_text
from kdrl_core.process_guard import how_ended, kill_group

_LOG_LINES = 30
_STACKS_S = 1.0
"""Time for a child that hangs to write its stacks into the log."""
_POLL_S = 0.5
_GONE_S = 5.0
_MARK = "KDRL_DOCTOR"
"""Environment variable of the child and of all processes below it."""
_STARTING, _BETWEEN = "child process starts", "between two checks"
_START_LIMIT_S = 120.0


_UnderWay = tuple[str, float, float]
"""A check, when it began, its limit in seconds."""


class _Watched:
    """What is known of the child."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self.pid: int | None = None
        self.is_done = False
        self._under_way: list[_UnderWay] = []
        """Inner checks last."""
        self._between: _UnderWay = _STARTING, time.monotonic(), _START_LIMIT_S

    def take(self, event: dict[str, Any]) -> None:
        """Note an event of the child, and pass on what it says of checks."""
        kind = event["event"]
        if kind == "started":
            self.pid = event["pid"]
        self.is_done = kind == "done"
        if kind in ("begin", "end"):
            self._emit(event)
        if kind == "begin":
            self._under_way.append((event["check"], time.monotonic(), event["limit_s"]))
            return
        if self._under_way and event.get("check") == self._under_way[-1][0]:
            inner_s = time.monotonic() - self._under_way.pop()[1]
            if self._under_way:  # the limit of the check around it is for its own time
                name, began, limit_s = self._under_way.pop()
                self._under_way.append((name, began + inner_s, limit_s))
        self._between = _BETWEEN, time.monotonic(), _START_LIMIT_S

    @property
    def innermost(self) -> _UnderWay:
        """What is under way."""
        return self._under_way[-1] if self._under_way else self._between

    @property
    def left_s(self) -> float:
        """Seconds until it exceeds its limit."""
        _, began, limit_s = self.innermost
        return max(0.0, began + limit_s - time.monotonic())

    def fail(self, says: str, log: str) -> None:
        """What is under way failed as `says`; the checks around it are skipped."""
        name, began, _ = self.innermost
        seconds = round(time.monotonic() - began, 3)
        remedy = remedy_for_text(says) or remedy_for_text(log)
        self._end(name, CheckStatus.FAILED, says, seconds=seconds, remedy=remedy, figures={"log": log})
        for around, _, _ in reversed(self._under_way[:-1]):
            self._end(around, CheckStatus.SKIPPED, f"needs: {name}", seconds=0.0, remedy=None, figures={})

    def _end(self, check: str, status: CheckStatus, says: str, **values: Any) -> None:
        self._emit({"event": "end", "check": check, "status": status, "says": says, **values})


def watch_child(spec: Path, emit: Emit, *, log: Path, environment: dict[str, str]) -> None:
    """Run the child to its end, or to that of its processes. What it prints goes to `log`."""
    kills = kernel_kills()
    watched = _Watched(emit)
    mark = secrets.token_hex(8)
    guard = _start(spec, log, {**environment, _MARK: mark})
    try:
        overdue = _read_events(guard, watched)
        if overdue is not None:
            if watched.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(watched.pid, signal.SIGUSR1)
                time.sleep(_STACKS_S)
            watched.fail(f"no end within {overdue:g} s: it hangs, or this machine is very slow", _tail(log))
        elif not watched.is_done:
            killed, more = kernel_kills(), ""
            if kills is not None and killed is not None and killed > kills:
                more = f"; the kernel has ended {killed - kills} processes for want of memory meanwhile"
            watched.fail(f"the process ended with {how_ended(guard.wait())}{more}", _tail(log))
    finally:
        _end_all(guard, mark)


def _start(spec: Path, log: Path, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    """The child, below a guard that ends it if this process is gone. Its stdout is the pipe of events."""
    child = [sys.executable, "-P", "-m", f"{__package__}.child", str(spec)]
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-I", process_guard.__file__, str(os.getpid()), *child],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=file,
            start_new_session=True,
            env={**os.environ, **environment},
        )


def _read_events(guard: "subprocess.Popen[bytes]", watched: _Watched) -> float | None:
    """Pass events on until the child has ended; or return the limit that a check has exceeded."""
    assert guard.stdout is not None  # a pipe
    read, rest = guard.stdout.fileno(), b""
    while True:
        if not select.select([read], [], [], min(_POLL_S, watched.left_s))[0]:
            if guard.poll() is not None:  # a process below it may still hold the pipe
                return None
            if watched.left_s == 0.0:
                return watched.innermost[2]
            continue
        content = os.read(read, 2**16)
        if not content:
            return None
        *lines, rest = (rest + content).split(b"\n")
        for line in lines:
            watched.take(json.loads(line))


def _end_all(guard: "subprocess.Popen[bytes]", mark: str) -> None:
    """End the child and every process that it has started, also those in other sessions, or whose parent died."""
    kill_group(guard.pid)
    guard.wait()
    if guard.stdout is not None:
        guard.stdout.close()
    left = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get(_MARK) == mark:
                process.kill()
                left.append(process)
    psutil.wait_procs(left, timeout=_GONE_S)


def _tail(log: Path) -> str:
    with suppress(OSError):
        return "\n".join(log.read_text(errors="replace").strip().splitlines()[-_LOG_LINES:])
    return ""
