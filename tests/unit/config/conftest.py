"""A small valid recipe as plain values, and loading it through YAML as a user's file is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdrl_core.config import Recipe, load_recipe

STAGE: dict[str, Any] = {
    "data": {"files": ["problems.json"]},
    "steps": 4,
    "prompts_per_step": 2,
    "mini_batch_prompts": 2,
    "group_size": 2,
    "learning_rate": 1e-6,
    "temperature": 0.6,
    "max_prompt_tokens": 16,
    "max_response_tokens": 16,
    "entropy_coef": 0.0,
    "terms": [{"function": "mine.terms:length", "coefficient": 0.0}],
}


@pytest.fixture
def values() -> dict[str, Any]:
    """A valid recipe: GRPO, then KDRL with a teacher, each with a term of one's own, and a reward of one function."""
    return {
        "name": "small",
        "student": {"path": "models/student"},
        "teacher": {"path": "models/teacher"},
        "stage1": {"objective": "grpo", **STAGE},
        "stage2": {"objective": "kdrl", **STAGE, "beta": {"init": 0.002}},
        "reward": {"functions": [{"function": "math"}]},
        "evaluation": {"benchmarks": [{"name": "a", "file": "a.jsonl"}, {"name": "b", "file": "b.jsonl"}]},
    }


@pytest.fixture
def load(values: dict[str, Any], tmp_path: Path) -> Callable[..., Recipe]:
    """`load(*overrides)`: the recipe of `values` from a YAML file with `--set` overrides."""

    def load_with(*overrides: str) -> Recipe:
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return load_recipe(path, overrides)

    return load_with
