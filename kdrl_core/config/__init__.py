"""Recipes: every hyper-parameter of a run as one validated, frozen object. Imports neither torch nor Prefect."""

from kdrl_core.config.changes import FieldChange, diff_recipes, unsafe_changes
from kdrl_core.config.load import config_hash, dump_recipe, list_recipes, load_recipe
from kdrl_core.config.paths import resolve_path
from kdrl_core.config.recipe import (
    BenchmarkConfig,
    BetaConfig,
    DataConfig,
    DecontaminationConfig,
    EvaluationConfig,
    ModelConfig,
    Recipe,
    StageConfig,
    TrainerConfig,
    VerificationConfig,
)

__all__ = [
    "BenchmarkConfig",
    "BetaConfig",
    "DataConfig",
    "DecontaminationConfig",
    "EvaluationConfig",
    "FieldChange",
    "ModelConfig",
    "Recipe",
    "StageConfig",
    "TrainerConfig",
    "VerificationConfig",
    "config_hash",
    "diff_recipes",
    "dump_recipe",
    "list_recipes",
    "load_recipe",
    "resolve_path",
    "unsafe_changes",
]
