"""The protocol of a tracker, and what it is sent."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The numbers of one step of a stage, or of an evaluation."""

    group: str
    """Stage or `summary`; the prefix of every name."""
    step: int
    """Within its stage, from 0."""
    global_step: int
    """Over all stages, ascending."""
    time_ms: int
    """Time of publication since the epoch, so that a point sent again is the same."""
    values: Mapping[str, float]


@dataclass(slots=True, kw_only=True)
class Sent:
    """What a tracker has of a run."""

    identity: str | None = None
    """What the run is called there."""
    steps: dict[str, int] = field(default_factory=dict)
    """Stage → steps that were sent."""
    evaluations: list[str] = field(default_factory=list)
    """Labels."""


class Tracker(Protocol):
    """One client, open for one run."""

    run_id: str | None
    """What the run is called there; None where it has no name of its own."""

    def log(self, point: Point) -> None:
        """Send a point."""
        ...

    def summarize(self, values: Mapping[str, float], time_ms: int) -> None:
        """Send numbers of the whole run; `time_ms` as in a point."""
        ...

    def flush(self) -> bool:
        """Write everything sent so far. Returns True if a kill can no longer lose any of it."""
        ...

    def close(self, *, complete: bool) -> None:
        """End. `complete`: everything was sent. The run may be opened again."""
        ...
