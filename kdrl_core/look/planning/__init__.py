"""Whether a recipe fits the GPUs, and how long it takes, before any GPU is used. Reads neither weights nor data, and
imports neither torch nor Prefect."""

from kdrl_core.look.planning.cluster import Cluster, Engines, Work, default_gpus, engines_of, work_of
from kdrl_core.look.planning.conditions import conditions, ranks_note
from kdrl_core.look.planning.cost import Rates
from kdrl_core.look.planning.shapes import KNOWN_SHAPES, ModelShape, shape_of
from kdrl_core.look.planning.stage_plan import StagePlan, plan_stage, total_hours

__all__ = [
    "KNOWN_SHAPES",
    "Cluster",
    "Engines",
    "ModelShape",
    "Rates",
    "StagePlan",
    "Work",
    "conditions",
    "default_gpus",
    "engines_of",
    "plan_stage",
    "ranks_note",
    "shape_of",
    "total_hours",
    "work_of",
]
