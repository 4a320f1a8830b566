"""Programs as a user starts them: in a terminal of their own (a pty), or in a process group that gets signals whole."""

import fcntl
import os
import pty
import select
import signal
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

CTRL_C = b"\x03"
_PATIENCE_S = 240.0


class Terminal:
    """A program in a pty. It leads the foreground process group, so that Ctrl-C reaches it and its whole group."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], cwd: Path | None = None) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command,
            env={**environment, "TERM": "dumb", "COLUMNS": "200"},
            cwd=cwd,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self._said = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def said(self) -> str:
        """All that the program has written."""
        return self._said.decode(errors="replace").replace("\r\n", "\n")

    def type(self, keys: bytes) -> None:
        """Press keys."""
        os.write(self._master, keys)

    def signal_group(self, number: signal.Signals) -> None:
        """A signal to the whole process group, as `timeout` sends it."""
        os.killpg(self.process.pid, number)

    def close(self) -> None:
        """Close the window: the kernel sends SIGHUP to the foreground group."""
        master, self._master = self._master, -1
        os.close(master)

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait; fails if the program ends first."""
        deadline = time.monotonic() + _PATIENCE_S
        while not condition():
            assert self.process.poll() is None, f"ended before {what}:\n{self.said}"
            assert time.monotonic() < deadline, f"in vain: {what}\n{self.said}"
            time.sleep(0.05)

    def ended(self, timeout_s: float) -> tuple[int, float]:
        """Exit code, and the seconds until the end. SIGKILL to the program if it takes longer."""
        started = time.monotonic()
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"still there after {timeout_s} s:\n{self.said}") from None
        took = time.monotonic() - started
        self._reader.join(5)
        return code, took

    def _take(self, master: int) -> bytes:
        read = os.read(master, 65536)
        self._said += read
        return read

    def _read(self) -> None:
        with suppress(OSError, ValueError):  # EIO once the program and its children have closed the other end
            while (master := self._master) >= 0:  # a reader that waits in `read` would keep the window open
                if select.select([master], [], [], 0.1)[0] and not self._take(master):
                    return
