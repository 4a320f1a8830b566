"""Time during which background work was running."""

import threading
import time


class Clock:
    """The time during which at least one of several tasks was running."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._since = self._total = 0.0

    def start(self) -> None:
        with self._lock:
            if not self._running:
                self._since = time.monotonic()
            self._running += 1

    def stop(self, _: object = None) -> None:
        with self._lock:
            self._running -= 1
            if not self._running:
                self._total += time.monotonic() - self._since

    def read(self) -> float:
        """Seconds since the last call."""
        with self._lock:
            now = time.monotonic()
            total, self._total = self._total + (now - self._since if self._running else 0.0), 0.0
            self._since = now
            return total
