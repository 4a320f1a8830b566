"""What is to be labelled, by which model and how: settled and checked before a tokenizer or a model is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from kdrl_core.config import Recipe, StageConfig
from kdrl_core.data import read_problems
from kdrl_core.engines.models import check_model_dir, context_limit
from kdrl_core.errors import DataError, RecipeError
from kdrl_core.preflight import check_device


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelPlan:
    """Problems, those of them to sample, and the settings, all checked."""

    recipe: Recipe
    """Its student is the model that is sampled."""
    stage: str
    label: str
    """Name that the counts get in `failures`."""
    problems: pa.Table
    """PROBLEM_SCHEMA, what the output will hold, with the labels there were."""
    todo: tuple[int, ...]
    """Rows of `problems` to sample; of rows with one problem_id the first."""

    @property
    def config(self) -> StageConfig:
        """The stage whose temperature, token limits and `data.difficulty` apply."""
        return self.recipe.stage(self.stage)

    @property
    def num_samples(self) -> int:
        """Responses per problem: k of pass@k."""
        return self.config.data.difficulty.num_samples


def plan_labels(
    recipe: Recipe,
    files: Sequence[str],
    *,
    stage: str | None = None,
    model: str | None = None,
    label: str | None = None,
    samples: int | None = None,
    only_missing: bool = True,
    max_problems: int | None = None,
    on_error: Literal["fail", "drop"] | None = None,
) -> LabelPlan:
    """Read the problems and settle what to sample.

    Args:
        files: problems in any known format; paths, globs or `builtin:…`.
        stage: default: the recipe's last.
        model: directory of the model to sample in place of the recipe's student, whose other fields stay.
        label: default: the stage's data.difficulty.student.
        samples: default, and if given necessarily, the stage's data.difficulty.num_samples.
        only_missing: leave problems alone that have the label.
        max_problems: the first problems only; the others are not in the output either.
        on_error: malformed rows; default: the stage's data.on_error.

    Raises:
        RecipeError: no such stage, another number of samples, limits beyond the model's context, or no GPU.
        DataError: files, rows, or two problems under one id.
        ModelError: the model's directory is missing or incomplete.
    """
    stage = recipe.stages[-1] if stage is None else stage
    if stage not in recipe.stages:
        raise RecipeError(f"recipe {recipe.name} has no stage '{stage}'; set --stage to {' or '.join(recipe.stages)}")
    config = recipe.stage(stage)
    if samples is not None and samples != config.data.difficulty.num_samples:
        raise RecipeError(
            f"--samples {samples} differs from {stage}.data.difficulty.num_samples="
            f"{config.data.difficulty.num_samples}, out of which labels are counted; leave --samples out, or add "
            f"--set {stage}.data.difficulty.num_samples={samples} here and where the labels are used"
        )
    if model is not None:
        student = recipe.student.model_copy(update={"path": model, "gguf_file": None})
        recipe = recipe.model_copy(update={"student": student})
    _check_model(recipe, stage)
    data = config.data.model_copy(
        update={"files": list(files), "format": "auto", "on_error": on_error or config.data.on_error}
    )
    problems = read_problems(data).slice(0, max_problems)
    if not len(problems):
        raise DataError(f"--input {' '.join(files)}: no problems in it; give files with rows")
    name = label or config.data.difficulty.student
    todo = _select(problems, name, only_missing=only_missing)
    return LabelPlan(recipe=recipe, stage=stage, label=name, problems=problems, todo=todo)


def _check_model(recipe: Recipe, stage: str) -> None:
    config = recipe.stage(stage)
    limit = context_limit(check_model_dir(recipe.student, role="student"))
    needed = config.max_prompt_tokens + config.max_response_tokens
    if limit is not None and needed > limit:
        raise RecipeError(
            f"{stage}.max_response_tokens: {config.max_response_tokens} response and {config.max_prompt_tokens} prompt "
            f"tokens are {needed}, beyond the context of {recipe.student.path} of {limit}; "
            f"add --set {stage}.max_response_tokens={limit - config.max_prompt_tokens}"
        )
    check_device(recipe)


def _select(problems: pa.Table, label: str, *, only_missing: bool) -> tuple[int, ...]:
    """Rows to sample. A problem that stands in several rows is sampled once, for its first row."""
    first: dict[str, tuple[str, str]] = {}
    chosen: dict[str, int] = {}
    columns = [problems[name].to_pylist() for name in ("problem_id", "question", "answer", "failures")]
    for row, (problem_id, question, answer, failures) in enumerate(zip(*columns, strict=True)):
        content = (question, answer)
        if (known := first.setdefault(problem_id, content)) != content:
            raise DataError(
                f"row {row + 1} of the input, field 'problem_id': {problem_id!r} stands on another problem as well "
                f"({known[0][:40]!r}); make ids unique, or leave them out (they are then made from the questions)"
            )
        if not only_missing or label not in dict(failures or []):
            chosen.setdefault(problem_id, row)
    return tuple(chosen.values())
