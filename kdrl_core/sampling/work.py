"""Work folders of jobs outside of runs: held by one process at a time, and bound to settings by their hash."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from kdrl_core.errors import RunLockedError
from kdrl_core.ledger import lock_holder, run_lock, sweep_temporaries


def settings_hash(settings: dict[str, Any]) -> str:
    """sha256 over the settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


@contextmanager
def hold_work(work: Path, lock_name: str, *, remedy: str) -> Iterator[None]:
    """Hold the folder `work` alone, and sweep what a kill has left in it.

    Args:
        remedy: end of the error's sentence, behind who holds it.

    Raises:
        RunLockedError: another process works in it.
    """
    lock = work / lock_name
    with ExitStack() as stack:
        try:
            stack.enter_context(run_lock(lock))
        except RunLockedError as error:
            holder = lock_holder(lock) or "another process"
            raise RunLockedError(f"{work} is in use by {holder}{remedy}") from error
        sweep_temporaries(work)
        yield
