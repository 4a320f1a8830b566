"""The plan of an evaluation: model, benchmarks and settings, checked before a tokenizer or a model is loaded."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kdrl_core.config import BenchmarkConfig, ColumnsConfig, ModelConfig, Recipe, ServersConfig, resolve_path
from kdrl_core.config.fetch import fetched, fetched_files
from kdrl_core.config.hub import HubPath, is_remote
from kdrl_core.data.benchmarks import BenchmarkProblem, load_benchmark, select_benchmarks
from kdrl_core.engines.from_recipe import EngineName
from kdrl_core.errors import DataError, ModelError, RecipeError
from kdrl_core.ledger.identity import reward_settings
from kdrl_core.models.loading import check_model_dir, context_limit
from kdrl_core.verify import verifier_version

SHARD_RESPONSES = 512
"""Responses of a shard, approximately."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOptions:
    """Options beside recipe and model. Raises RecipeError if a number is below 1."""

    benchmarks: Sequence[str] = ()
    """Names from the recipe, or `NAME=FILE` for your own; empty: all of the recipe's."""
    columns: ColumnsConfig | None = None
    """Columns of the benchmarks given as `NAME=FILE`; None: those of their format."""
    samples: int | None = None
    """Responses per problem, in place of each benchmark's own."""
    max_problems: int | None = None
    """Take only the first problems of each benchmark."""
    gguf_file: str | None = None
    """In the model's directory."""
    served_as: str | None = None
    """Name of the model at the endpoint; default: the only one there."""
    api_key: str | None = None
    """`env:NAME` or `block:NAME`."""
    concurrency: int = 32
    """Requests in flight at the endpoint."""
    timeout_s: float = 3600.0
    """Of one request at the endpoint; 32K tokens take a while."""
    retry_for_s: float = 120.0
    """How long a request is tried again after its first fault, if the fault may pass."""

    def __post_init__(self) -> None:
        for option in ("samples", "max_problems", "concurrency"):
            number = getattr(self, option)
            if number is not None and number < 1:
                raise RecipeError(f"{option}: {number} is too small; give 1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPlan:
    """A model, benchmarks and settings, all checked."""

    recipe: Recipe
    """Its `evaluation`, `prompt`, `verification` and `runtime` sections apply, and `rollout` without its engine."""
    endpoint: ServersConfig | None
    """Where the model is served; None: it is in a directory."""
    model: ModelConfig
    """The model in a directory."""
    engine: EngineName
    """Engine that samples from the directory."""
    name: str
    """Name of the model in folders and tables; an endpoint may report it instead."""
    benchmarks: tuple[BenchmarkConfig, ...]
    problems: dict[str, list[BenchmarkProblem]]
    """By benchmark."""

    def shard_problems(self, benchmark: BenchmarkConfig) -> int:
        """Problems of one shard."""
        return max(1, SHARD_RESPONSES // benchmark.samples)


def plan_evaluation(recipe: Recipe, model: str, options: EvaluationOptions | None = None) -> EvaluationPlan:
    """Settle what is evaluated.

    Args:
        model: directory, `run:NAME`, `builtin:…`, `package:…` or `hf://…`; or the URL of an OpenAI-compatible API,
            which ends in `/v1`.

    Raises:
        DataError: an unknown benchmark, or a fault in its file, with row and field.
        ModelError: the directory is missing or incomplete.
        RecipeError: options that contradict each other, or a model whose context is too short.
    """
    options = options or EvaluationOptions()
    chosen = [
        benchmark.model_copy(update={"file": fetched_files([benchmark.file])[0]})
        for benchmark in _chosen(recipe, options)
    ]
    endpoint = None
    if re.match(r"https?://", model):
        endpoint, name = _endpoint(model, options), options.served_as or ""
    else:
        for option, value in (("--served-as", options.served_as), ("--api-key", options.api_key)):
            if value is not None:
                raise RecipeError(f"{option} is of an endpoint, but {model} is no URL; give http://HOST:PORT/v1")
        recipe, name = _of_directory(recipe, model, options.gguf_file)
    return EvaluationPlan(
        recipe=recipe,
        endpoint=endpoint,
        model=recipe.student,
        engine=recipe.rollout.engine,
        name=plain_name(name),
        benchmarks=tuple(chosen),
        problems={benchmark.name: load_benchmark(benchmark) for benchmark in chosen},
    )


def plain_name(name: str) -> str:
    """The name without characters that a folder's name should not have; a server may call its model anything."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80] or "model"


def settings_of(plan: EvaluationPlan, benchmark: BenchmarkConfig) -> dict[str, Any]:
    """Everything beside the model that a response or a verdict depends on."""
    recipe = plan.recipe
    content = hashlib.sha256()
    for problem in plan.problems[benchmark.name]:
        content.update(json.dumps([problem.problem_id, problem.question, problem.answer]).encode())
    found: dict[str, Any] = {
        "benchmark": benchmark.name,
        "problems": f"{len(plan.problems[benchmark.name])} sha256 {content.hexdigest()[:16]}",
        "samples": benchmark.samples,
        "temperature": recipe.evaluation.temperature,
        "max_context_tokens": recipe.evaluation.max_context_tokens,
        "prompt": {name: value for name, value in recipe.prompt.model_dump().items() if value != {}},
        "seed": recipe.seed,
        "verification": [recipe.verification.timeout_s, recipe.verification.memory_limit_mb],
        "verifier": verifier_version(),
        "shard_problems": plan.shard_problems(benchmark),
        **reward_settings(recipe),
    }
    if plan.endpoint is None:
        found |= {
            "engine": plan.engine,
            "runtime.dtype": recipe.runtime.dtype,
            "chat_template": plan.model.chat_template,
        }
    return found


def refuse_short_context(recipe: Recipe, config: dict[str, Any], model: str) -> None:
    """Raise RecipeError if the context in the model's config.json is shorter than the evaluation asks for: its figures
    could not be compared with those of other models."""
    limit, asked = context_limit(config), recipe.evaluation.max_context_tokens
    if limit is not None and limit < asked:
        raise RecipeError(
            f"evaluation.max_context_tokens: {asked} tokens are beyond the context of {model} of {limit}; "
            f"add --set evaluation.max_context_tokens={limit}, for every model that is compared"
        )


def _chosen(recipe: Recipe, options: EvaluationOptions) -> list[BenchmarkConfig]:
    known = list(recipe.evaluation.benchmarks)
    wanted: list[str] = []
    if options.columns is not None and not any("=" in given for given in options.benchmarks):
        raise RecipeError("--columns is for benchmarks of your own; add --benchmark NAME=FILE")
    for given in options.benchmarks:
        name, is_file, file = given.partition("=")
        if is_file:
            if name in [benchmark.name for benchmark in known]:
                raise DataError(f"--benchmark {given}: there is a benchmark '{name}' already; choose another name")
            try:
                known.append(BenchmarkConfig(name=name, file=file, columns=options.columns or ColumnsConfig()))
            except ValidationError as error:
                said = error.errors()[0]["msg"]
                raise DataError(f"--benchmark {given}: {said}; give NAME=FILE, a name of letters and digits") from error
        wanted.append(name)
    return [
        benchmark.model_copy(
            update={
                "samples": options.samples or benchmark.samples,
                "max_problems": options.max_problems or benchmark.max_problems,
            }
        )
        for benchmark in select_benchmarks(known, wanted or None)
    ]


def _endpoint(url: str, options: EvaluationOptions) -> ServersConfig:
    if options.gguf_file is not None:
        raise RecipeError(
            f"--gguf-file {options.gguf_file} is of a directory, but {url} is a URL; leave one of them out"
        )
    try:
        return ServersConfig(
            urls=[url],
            model=options.served_as,
            api_key=options.api_key,
            concurrency=options.concurrency,
            timeout_s=options.timeout_s,
            retry_for_s=options.retry_for_s,
        )
    except ValidationError as error:
        said = "; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())  # never the input
        raise RecipeError(f"MODEL or --api-key: {said}") from None


def _of_directory(recipe: Recipe, model: str, gguf_file: str | None) -> tuple[Recipe, str]:
    student = recipe.student.model_copy(update={"path": model, "gguf_file": gguf_file})
    if model != recipe.student.path:  # code beside a model is trusted for that model alone
        student = student.model_copy(update={"trust_remote_code": False})
    recipe = fetched(recipe.model_copy(update={"student": student}), "student.path")
    student = recipe.student
    try:
        found = check_model_dir(student, role="student")
    except ModelError as error:
        raise ModelError(f"MODEL {model}: {str(error).removeprefix(f'student.path={model}: ')}") from error
    refuse_short_context(recipe, found, model)
    if gguf_file is not None:
        return recipe, Path(gguf_file).stem
    if is_remote(model):
        return recipe, HubPath.of(model).name
    return recipe, model.removeprefix("run:") if model.startswith("run:") else resolve_path(model).name
