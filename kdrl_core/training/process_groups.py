"""The end of a process group: a process that leads a session of its own, with all that it has started there."""

import os
import signal
from contextlib import suppress


def kill_group(group: int) -> None:
    """End every process of a group at once; nothing if none is left."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
