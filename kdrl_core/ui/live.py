"""Runs that are still going on: when the app looks for new steps."""

import threading
import time

from kdrl_core.rollouts.query import RolloutStore

EVERY_S = 2.0
"""Seconds at least between two looks at the disk."""


class Live:
    """Follows a store; `revision` counts how often there was something new."""

    def __init__(self, store: RolloutStore, *, every_s: float = EVERY_S) -> None:
        self._store, self._every_s = store, every_s
        self._revision, self._looked = 0, time.monotonic()
        self._lock = threading.Lock()

    def look(self) -> int:
        """Look for new steps, at most every few seconds however many pages ask; the revision."""
        with self._lock:
            if time.monotonic() - self._looked >= self._every_s:
                self._revision += self._store.refresh()
                self._looked = time.monotonic()
            return self._revision
