"""Runs a command in a process group that does not outlive the program which started it.

Run as a file, with the pid of that program and the command: `python -I process_guard.py PID COMMAND…`, in a session of
its own. It ends with the command's exit status. When the program is gone, however it died, the guard kills the whole
group, itself included; no process in it has to cooperate. The command alone heeds a SIGTERM to the group.
"""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

_POLL_S = 0.1


def kill_group(group: int) -> None:
    """End every process of a group at once; does nothing if none is left."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def how_ended(code: int) -> str:
    """An exit status in words. The guard reports a signal as 128 + its number, DeepSpeed's launcher as 256 − it."""
    number = -code if code < 0 else 256 - code if code > 192 else code - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"status {code}"
    return f"signal {name}" + (", which the kernel sends when memory has run out" if name == "SIGKILL" else "")


def main() -> int:
    """Start the command, and wait for it or for the program's end."""
    program, command = int(sys.argv[1]), sys.argv[2:]
    signal.signal(signal.SIGTERM, lambda *_: None)  # one to the group is for the command, which may end in order
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while child.poll() is None:
        if os.getppid() != program:
            os.killpg(0, signal.SIGKILL)
        time.sleep(_POLL_S)
    code = child.returncode
    return 128 - code if code < 0 else code  # as a shell reports signals


if __name__ == "__main__":
    sys.exit(main())
