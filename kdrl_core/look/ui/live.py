"""Runs that still go on: when the app looks for new steps."""

import threading
import time

from kdrl_core.errors import KdrlError
from kdrl_core.look.rollouts.query import RolloutStore

EVERY_S = 2.0
"""Seconds at least between two looks at the disk."""

_PATIENCE_S = 0.5
_SHARE = 0.1


class Live:
    """Follows a store; `revision` counts how often something was new.

    A look at thousands of steps takes a second. So it runs in a thread, for which pages wait only a moment, and takes a
    tenth of the time at most, however many pages ask. With `every_s=0` each call looks.
    """

    def __init__(self, store: RolloutStore, *, every_s: float = EVERY_S) -> None:
        self._store, self._every_s = store, every_s
        self._revision, self._next = 0, time.monotonic() + every_s
        self._error: KdrlError | None = None
        self._looking: threading.Thread | None = None
        self._lock = threading.Lock()

    def look(self) -> int:
        """Look for new steps if it is time to. Returns the revision; a slow look raises it only by the next call.

        Raises:
            KdrlError: the runs could not be read any more.
        """
        with self._lock:
            if self._looking is None and time.monotonic() >= self._next:
                self._looking = threading.Thread(target=self._refresh, name="kdrl-ui-look", daemon=True)
                self._looking.start()
            looking = self._looking
        if looking is not None:
            looking.join(_PATIENCE_S)
        if self._error is not None:
            raise self._error
        return self._revision

    def _refresh(self) -> None:
        began, is_new, error = time.monotonic(), False, None
        try:
            is_new = self._store.refresh()
        except KdrlError as raised:
            error = raised
        finally:
            with self._lock:
                took = time.monotonic() - began
                self._revision += is_new
                self._error = error
                self._next = time.monotonic() + max(self._every_s, took / _SHARE if self._every_s else 0.0)
                self._looking = None
