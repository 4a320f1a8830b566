"""The recipe that the doctor tries: the engines, ranks, dtype and lengths of the given one, on a handful of problems.

What differs: one stage (the one with the longest sequences), few prompts, random models and problems in the doctor's
folder, no trackers. The learning rate is at least 1e-3, so that an update moves the logprobs of a random model by far
more than rounding: an engine that keeps its old weights then shows. Servers that the recipe lists belong to somebody,
and would be given random weights, so engines of the same kind are started here in their place.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrl_core.config import ModelConfig, Recipe, StageConfig
from kdrl_core.config.load import validate_recipe
from kdrl_core.look.doctor.random_models import tokenizer_folder

NAME = "doctor"
"""Of the recipe and of its run."""
_PROBLEMS = 16
_GROUP = 2
_LEARNING_RATE = 1e-3
_STEPS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A recipe to try, and what differs from the given one in a way that matters for what is tried."""

    recipe: Recipe
    stage: str
    """The stage of the given recipe that is tried, and the only one of `recipe`."""
    notes: tuple[str, ...]

    @property
    def config(self) -> StageConfig:
        """The stage's part of the recipe."""
        return self.recipe.stage(self.stage)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and response together."""
        return self.config.max_prompt_tokens + self.config.max_response_tokens


def stage_to_try(recipe: Recipe) -> str:
    """The stage with the longest sequences; of equals the last, which has the teacher."""
    return max(recipe.stages, key=lambda name: (_context(recipe.stage(name)), name))


def models_to_try(recipe: Recipe) -> dict[str, ModelConfig]:
    """Role → model of the stage that is tried."""
    models: dict[str, ModelConfig] = {"student": recipe.student}
    if recipe.teacher is not None and recipe.stage(stage_to_try(recipe)).uses_teacher:
        models["teacher"] = recipe.teacher
    return models


def make_trial(recipe: Recipe, folder: Path) -> Trial:
    """The recipe to try, with models and problems in `folder`. Writes the problems."""
    stage, values = stage_to_try(recipe), recipe.model_dump(mode="json")
    problems = folder / "problems.jsonl"
    rows = [{"problem": f"{number}+{number}", "answer": str(2 * number)} for number in range(1, _PROBLEMS + 1)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    roles = models_to_try(recipe)
    for role in ("student", "teacher"):
        values[role] = _model(values[role], folder / "models" / role) if role in roles else None
    if tokenizer_folder(roles) is None:  # the tokenizer is the doctor's
        values["student"]["chat_template"] = None
        values["prompt"] |= {"chat_template_kwargs": {}}
    if recipe.rollout.engine == "server":
        values["rollout"] |= {"engine": "vllm", "server": None}
    values |= {
        "name": NAME,
        "stage1": None,
        "stage2": None,
        "tracking": {},
        "evaluation": {"benchmarks": [{"name": NAME, "file": str(problems)}]},
        stage: values[stage] | _few(recipe.stage(stage), problems),
    }
    return Trial(recipe=validate_recipe(values, origin=NAME), stage=stage, notes=tuple(_notes(recipe, stage)))


def _model(values: dict[str, Any], place: Path) -> dict[str, Any]:
    told = values | {"path": str(place), "gguf_file": None}
    return told | {"server": None, "engine": "vllm"} if told.get("server") else told


def _few(config: StageConfig, problems: Path) -> dict[str, Any]:
    """The fields of a stage that make it small."""
    is_sft = config.objective == "sft"
    return {
        "objective": "kd_rkl" if is_sft else config.objective,
        **({"beta": {"init": 1e-3}, "kd_masking": "none"} if is_sft else {}),
        "data": {"files": [str(problems)], "decontamination": None},
        "steps": _STEPS,
        "prompts_per_step": 2,
        "mini_batch_prompts": 2,
        "group_size": _GROUP,
        "batch_size": None,
        "learning_rate": max(config.learning_rate, _LEARNING_RATE),
        "warmup_steps": 0,
        "evaluate_every": None,
    }


def _notes(recipe: Recipe, stage: str) -> Iterator[str]:
    if len(recipe.stages) > 1:
        yield f"{stage} is tried, whose sequences are the longest"
    if recipe.stage(stage).objective == "sft":
        yield f"{stage}.objective=sft is tried as kd_rkl: the teacher scores in place of sampling"
    if recipe.rollout.engine == "server":
        yield "rollout.server: your replicas are left alone; one vLLM engine is started here in their place"
    if recipe.teacher is not None and recipe.teacher.server is not None:
        yield "teacher.server: your servers are left alone; one vLLM engine is started here in their place"


def _context(config: StageConfig) -> int:
    return config.max_prompt_tokens + config.max_response_tokens
