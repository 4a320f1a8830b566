"""Ends what a program has started if the program is killed (SIGKILL): a temporary Prefect server would outlive it.

A guard is a small process that reads from a pipe to which the program holds the other end. The pipe closes with the
program, however that ends; then whatever still carries the program's mark in its environment is terminated. After an
orderly end there is nothing left to terminate.
"""

import os
import secrets
import subprocess
import sys

_MARK = "KDRL_STARTED_BY"
_GRACE_S = 5.0


def guard_children() -> None:
    """Have everything that this process starts from now on ended, should this process be killed."""
    mark = secrets.token_hex(8)
    environment = {name: value for name, value in os.environ.items() if name != _MARK}
    guard = subprocess.Popen(
        [sys.executable, "-m", "flows.guard", mark],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C and SIGHUP are not for it
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
