"""Recipes: every hyper-parameter of a run as one validated, frozen object. Imports neither torch nor Prefect."""

from kdrl_core.config.alarms import AlarmsConfig
from kdrl_core.config.answers import BenchmarkConfig, EvaluationConfig, VerificationConfig
from kdrl_core.config.changes import FieldChange, diff_recipes, unsafe_changes
from kdrl_core.config.data import ColumnsConfig, DataConfig, DecontaminationConfig
from kdrl_core.config.entries import expanded
from kdrl_core.config.faults import did_you_mean
from kdrl_core.config.load import (
    config_hash,
    dump_recipe,
    list_recipes,
    load_recipe,
    parse_value,
    read_fields,
)
from kdrl_core.config.models import LoraConfig, ModelConfig, ServersConfig
from kdrl_core.config.outside import anchored
from kdrl_core.config.paths import resolve_path
from kdrl_core.config.recipe import BetaConfig, Recipe, StageConfig
from kdrl_core.config.runtime import RuntimeConfig, TrackerName, TrackingConfig, TrainerConfig
from kdrl_core.config.section import EngineName, LocalEngine

__all__ = [
    "AlarmsConfig", "BenchmarkConfig", "BetaConfig", "ColumnsConfig", "DataConfig", "DecontaminationConfig",
    "EngineName", "EvaluationConfig", "FieldChange", "LocalEngine", "LoraConfig", "ModelConfig", "Recipe",
    "RuntimeConfig", "ServersConfig", "StageConfig", "TrackerName", "TrackingConfig", "TrainerConfig",
    "VerificationConfig", "anchored",
    "config_hash", "did_you_mean", "diff_recipes", "dump_recipe", "expanded", "list_recipes", "load_recipe",
    "parse_value", "read_fields", "resolve_path", "unsafe_changes",
]  # fmt: skip
