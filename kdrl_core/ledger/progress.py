"""What a run is doing right now, for whoever watches: a small file in its scratch folder, often replaced.

It is a hint, never a truth: nothing is decided by it, and it may be missing or stale.
"""

import json
import time
from contextlib import suppress
from typing import Any

from kdrl_core.ledger import Run, RunPaths

_MIN_INTERVAL_S = 0.2
_last_report = 0.0


def report_progress(
    run: Run, *, stage: str, at: int = 0, phase: str, done: int | None = None, total: int | None = None
) -> None:
    """Say which phase of which step or shard is under way, at most five times a second."""
    global _last_report
    now = time.monotonic()
    if now - _last_report < _MIN_INTERVAL_S:
        return
    _last_report = now
    content = {"stage": stage, "step": at, "phase": phase, "done": done, "total": total, "at": time.time()}
    target = run.paths.scratch / "progress.json"
    with suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".tmp")
        temporary.write_text(json.dumps(content))
        temporary.replace(target)


def read_progress(paths: RunPaths) -> dict[str, Any] | None:
    """The latest report, or None: also for a file that is none, since it only hints."""
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads((paths.scratch / "progress.json").read_text())
        kinds = {"stage": str, "step": int, "phase": str}
        if isinstance(content, dict) and all(isinstance(content.get(name), kind) for name, kind in kinds.items()):
            return content
    return None
