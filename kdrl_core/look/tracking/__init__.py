"""Metrics of a run in TensorBoard, MLflow or W&B, through their own clients, where the recipe asks for it.

What is sent is read from the run's published files, and what was sent is noted beside them: so a killed run goes on
where its trackers end, a run that is tracked only later sends what it has, and training never waits for a tracker that
fails.
"""

from kdrl_core.look.tracking.protocols import Tracker
from kdrl_core.look.tracking.stream import close_tracking, track

__all__ = ["Tracker", "close_tracking", "track"]
