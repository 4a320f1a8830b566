"""Whether a recipe fits the GPUs at hand, and how long it takes, before any of them is used. Reads neither weights nor
data; imports neither torch nor Prefect."""

from kdrl_core.planning.cluster import Cluster, Engines, Work, work_of
from kdrl_core.planning.cost import Rates
from kdrl_core.planning.plan import StagePlan, plan_stage, total_hours
from kdrl_core.planning.shapes import KNOWN_SHAPES, ModelShape, shape_of

__all__ = [
    "KNOWN_SHAPES",
    "Cluster",
    "Engines",
    "ModelShape",
    "Rates",
    "StagePlan",
    "Work",
    "plan_stage",
    "shape_of",
    "total_hours",
    "work_of",
]
