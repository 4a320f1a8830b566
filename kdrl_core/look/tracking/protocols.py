"""What a tracker does for a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The numbers of one step of a stage, or of an evaluation."""

    group: str
    """Stage, or `summary`: stands before every name."""
    step: int
    """Within its stage, from 0."""
    global_step: int
    """Over all stages, ascending."""
    time_ms: int
    """When it was published, since the epoch: sent again, a point is the same."""
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

    def log(self, point: Point) -> None:
        """Send a point."""
        ...

    def summarize(self, values: Mapping[str, float], time_ms: int) -> None:
        """Send numbers that belong to the run as a whole, published at a time as a point's."""
        ...

    def flush(self) -> bool:
        """Have everything sent so far written. Returns whether a kill can take none of it any more."""
        ...

    def close(self, *, complete: bool) -> None:
        """End, with everything sent or in the middle; the run may be opened again."""
        ...
