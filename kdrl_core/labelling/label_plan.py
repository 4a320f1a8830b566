"""The plan of a labelling: problems, model and settings, checked before a tokenizer or a model is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from kdrl_core.config import Recipe, StageConfig
from kdrl_core.config.fetch import fetched
from kdrl_core.data import find_files, read_problems
from kdrl_core.data.text import normalize_questions
from kdrl_core.errors import DataError, ModelError, RecipeError
from kdrl_core.models.loading import check_device, check_model_dir, context_limit

ORIGIN_KEY = "kdrl.label."
"""Prefix of a label's name as a key in a Parquet file's metadata; the value says how the label was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelPlan:
    """Problems, the rows to sample, and the settings, all checked."""

    recipe: Recipe
    """Its student is the model that is sampled."""
    stage: str
    label: str
    """Name that the counts get in `failures`."""
    problems: pa.Table
    """PROBLEM_SCHEMA: the rows of the output, with the labels that they already have."""
    todo: tuple[int, ...]
    """Rows of `problems` to sample; only the first row of each problem_id."""
    origins: dict[bytes, bytes]
    """How the existing labels were measured: the files' metadata under ORIGIN_KEY."""

    @property
    def config(self) -> StageConfig:
        """The stage whose temperature, token limits and `data.difficulty` apply."""
        return self.recipe.stage(self.stage)

    @property
    def num_samples(self) -> int:
        """Responses per problem: k of pass@k."""
        return self.config.data.difficulty.num_samples


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelOptions:
    """Options beside recipe and files."""

    stage: str | None = None
    """Default: the recipe's last stage."""
    model: str | None = None
    """Directory of the model to sample; replaces the path of the recipe's student. Needs `label`."""
    label: str | None = None
    """Default: the stage's data.difficulty.student."""
    samples: int | None = None
    """Must equal the stage's data.difficulty.num_samples, which is also the default."""
    only_missing: bool = True
    """Skip problems that already have the label."""
    max_problems: int | None = None
    """Take only the first problems; the output leaves out the others too."""
    on_error: Literal["fail", "drop"] | None = None
    """Malformed rows; default: the stage's data.on_error."""


def plan_labels(recipe: Recipe, files: Sequence[str], options: LabelOptions | None = None) -> LabelPlan:
    """Read the problems and settle what to sample.

    Args:
        files: problems in any known format; paths, globs or `builtin:…`.

    Raises:
        RecipeError: no such stage, another number of samples, a model without a label's name, limits beyond the
            model's context, or no GPU.
        DataError: a fault in files or rows, or two questions or answers under one id.
        ModelError: the model's directory is missing or incomplete.
    """
    options = options or LabelOptions()
    stage = recipe.stages[-1] if options.stage is None else options.stage
    if stage not in recipe.stages:
        raise RecipeError(f"recipe {recipe.name} has no stage '{stage}'; set --stage to {' or '.join(recipe.stages)}")
    recipe, name = _model_and_label(recipe, stage, options)
    config = recipe.stage(stage).data
    data = config.model_copy(
        update={"files": list(files), "format": "auto", "on_error": options.on_error or config.on_error}
    )
    problems = read_problems(data).slice(0, options.max_problems)
    if not len(problems):
        raise DataError(f"--input {' '.join(files)}: no problems in it; give files with rows")
    todo = _select(problems, name, only_missing=options.only_missing)
    origins = _origins(find_files(data))
    return LabelPlan(recipe=recipe, stage=stage, label=name, problems=problems, todo=todo, origins=origins)


def _model_and_label(recipe: Recipe, stage: str, options: LabelOptions) -> tuple[Recipe, str]:
    """The recipe with the model that is sampled as its student, checked, and the label's name."""
    difficulty, model = recipe.stage(stage).data.difficulty, options.model
    if options.samples is not None and options.samples != difficulty.num_samples:
        raise RecipeError(
            f"--samples {options.samples} differs from {stage}.data.difficulty.num_samples={difficulty.num_samples}, "
            f"out of which labels are counted; leave --samples out, or add "
            f"--set {stage}.data.difficulty.num_samples={options.samples} here and where the labels are used"
        )
    if model is not None and not options.label:
        raise RecipeError(
            f"--model {model}: its label needs a name of its own, since '{difficulty.student}' is the student's; "
            "add --label NAME"
        )
    if model is not None:
        student = recipe.student.model_copy(update={"path": model, "gguf_file": None})
        recipe = recipe.model_copy(update={"student": student})
    recipe = fetched(recipe, "student.path")
    _check_model(recipe, stage, model=model)
    return recipe, options.label or difficulty.student


def _check_model(recipe: Recipe, stage: str, *, model: str | None) -> None:
    config = recipe.stage(stage)
    try:
        found = check_model_dir(recipe.student, role="student")
    except ModelError as error:
        if model is None:
            raise
        raise ModelError(f"--model {model}: {str(error).removeprefix(f'student.path={model}: ')}") from error
    limit = context_limit(found)
    needed = config.max_prompt_tokens + config.max_response_tokens
    if limit is not None and needed > limit:
        raise RecipeError(
            f"{stage}.max_response_tokens: {config.max_response_tokens} response and {config.max_prompt_tokens} prompt "
            f"tokens are {needed}, beyond the context of {recipe.student.path} of {limit}; "
            f"add --set {stage}.max_response_tokens={limit - config.max_prompt_tokens}"
        )
    check_device(recipe)


def _origins(files: Sequence[Path]) -> dict[bytes, bytes]:
    """Metadata under ORIGIN_KEY; if two files have the same label, the later file counts."""
    origins: dict[bytes, bytes] = {}
    for file in files:
        if file.suffix.lower() == ".parquet":
            metadata: dict[bytes, bytes] = pq.read_schema(file).metadata or {}
            origins |= {key: value for key, value in metadata.items() if key.startswith(ORIGIN_KEY.encode())}
    return origins


def _select(problems: pa.Table, label: str, *, only_missing: bool) -> tuple[int, ...]:
    """Rows to sample. A problem in several rows is sampled once, for its first row."""
    first: dict[str, tuple[str, str, str]] = {}
    chosen: dict[str, int] = {}
    columns = [problems[name].to_pylist() for name in ("problem_id", "answer", "source", "failures")]
    questions = normalize_questions(problems["question"]).to_pylist()
    for row, (question, problem_id, answer, source, failures) in enumerate(zip(questions, *columns, strict=True)):
        known_question, known_answer, known_source = first.setdefault(problem_id, (question, answer, source))
        if known_question != question:
            raise DataError(
                f"problem_id {problem_id!r} stands on two questions, {known_question[:40]!r} (source {known_source}) "
                f"and {question[:40]!r} (source {source}); "
                "make ids unique, or leave them out (they are then made from the questions)"
            )
        if known_answer != answer:
            raise DataError(
                f"problem_id {problem_id!r}, question {question[:40]!r}: the answer is {known_answer[:40]!r} in one "
                f"row (source {known_source}) and {answer[:40]!r} in another (source {source}); "
                "make the answers agree, remove one of the rows, or give each an id of its own"
            )
        if not only_missing or label not in dict(failures or []):
            chosen.setdefault(problem_id, row)
    return tuple(chosen.values())
