"""Ends the children (e.g. a Prefect server) of a program that was killed (SIGKILL) and cannot end them itself.

A guard is a small process that reads from a pipe; the program holds the other end. When the program ends, the pipe
closes, and the guard terminates every process that still has the program's mark in its environment. After an orderly
end no such process is left.
"""

import os
import secrets
import subprocess
import sys

_MARK = "KDRL_STARTED_BY"
_GRACE_S = 5.0


def guard_children() -> None:
    """Start a guard, unless there is one: if this process is killed, the guard ends its children."""
    if _pipes:
        return
    mark = secrets.token_hex(8)
    environment = {name: value for name, value in os.environ.items() if name != _MARK}
    guard = subprocess.Popen(
        [sys.executable, "-P", "-m", "flows.guard", mark],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # so that Ctrl-C and SIGHUP do not end it
    )
    _pipes.append(guard)  # never closed by us: the end of this process closes it
    os.environ[_MARK] = mark


_pipes: list[subprocess.Popen[bytes]] = []


def _terminate_marked(mark: str) -> None:
    import psutil

    marked = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARK) == mark:
                process.terminate()
                marked.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    for process in psutil.wait_procs(marked, timeout=_GRACE_S)[1]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


if __name__ == "__main__":
    sys.stdin.buffer.read()
    _terminate_marked(sys.argv[1])
