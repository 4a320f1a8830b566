"""Runs code that a model has written, with tests of it, in a locked process (:mod:`kdrl_core.rewards.jail`)."""

import json
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

_JAIL = Path(__file__).with_name("jail.py")
_MAX_SHOWN = 300


def longest_wait_s(cpu_s: float) -> float:
    """Seconds after which code that uses no CPU time is ended."""
    return 3.0 * cpu_s + 5.0


def run_tests(code: str, tests: str, *, cpu_s: int, memory_mb: int) -> str | None:
    """What went wrong with the code or its tests; None if both ran to their end.

    Raises RuntimeError if the kernel lacks the locks.
    """
    secret, wait_s = secrets.token_hex(16), longest_wait_s(cpu_s)
    given = {"code": code, "tests": tests, "secret": secret, "cpu_s": cpu_s, "memory_mb": memory_mb}
    with tempfile.TemporaryFile() as told:
        try:
            done = subprocess.run(
                [sys.executable, "-s", "-P", "-S", "-B", str(_JAIL)],
                input=json.dumps(given).encode(),
                stdout=told,
                stderr=subprocess.DEVNULL,
                env={"PYTHONHASHSEED": "0"},  # sets have one order, so code passes or fails each time
                cwd="/",
                timeout=wait_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"no result after {wait_s:g} s of waiting"
        told.seek(0)
        text = told.read(10_000).decode(errors="replace")
    if text == secret:
        return None
    if text.startswith("no locks: "):
        raise RuntimeError(f"code is not run, since {text.removeprefix('no locks: ')}; leave python_tests out")
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"no result within {cpu_s} s of CPU time"
    return text[:_MAX_SHOWN] or f"it ended its process (exit code {done.returncode})"
