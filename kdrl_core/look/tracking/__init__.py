"""Metrics of a run in TensorBoard, MLflow or W&B, through their own clients, where the recipe asks for it.

Points are read from the run's published files, and a note beside them says what was sent. So after a kill each tracker
continues where it stopped, and a tracker that is added later gets all points. Training never waits for a tracker that
fails.
"""

from kdrl_core.look.tracking.clients import Tracker
from kdrl_core.look.tracking.stream import close_tracking, track

__all__ = ["Tracker", "close_tracking", "track"]
