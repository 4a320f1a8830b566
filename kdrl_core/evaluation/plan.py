"""Which model is to be evaluated on what: settled and checked before a tokenizer or a model is loaded."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kdrl_core.config import BenchmarkConfig, ModelConfig, Recipe, ServersConfig, resolve_path
from kdrl_core.data.benchmarks import BenchmarkProblem, load_benchmark, select_benchmarks
from kdrl_core.errors import DataError, ModelError, RecipeError
from kdrl_core.ledger import model_identity
from kdrl_core.models.loading import check_model_dir, context_limit
from kdrl_core.verify import verifier_version

SHARD_RESPONSES = 512
"""Responses sampled and published together, about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPlan:
    """A model, benchmarks and settings, all checked."""

    recipe: Recipe
    """Its `evaluation`, `prompt`, `verification`, `runtime` and `rollout` sections apply; its student is the model."""
    endpoint: ServersConfig | None
    """Where the model is served; None: it is in a directory."""
    name: str
    """Of the model, for folders and tables; an endpoint tells its own."""
    benchmarks: tuple[BenchmarkConfig, ...]
    problems: dict[str, list[BenchmarkProblem]]
    """By benchmark."""

    @property
    def model(self) -> ModelConfig:
        """The model in a directory."""
        return self.recipe.student

    def shard_problems(self, benchmark: BenchmarkConfig) -> int:
        """Problems of one shard."""
        return max(1, SHARD_RESPONSES // benchmark.samples)


def plan_evaluation(
    recipe: Recipe,
    model: str,
    *,
    benchmarks: Sequence[str] = (),
    samples: int | None = None,
    max_problems: int | None = None,
    gguf_file: str | None = None,
    served_as: str | None = None,
    api_key: str | None = None,
    concurrency: int = 32,
    timeout_s: float = 3600.0,
    retry_for_s: float = 120.0,
) -> EvaluationPlan:
    """Settle what is evaluated.

    Args:
        model: directory, `run:NAME`, `builtin:…` or `package:…`; or the URL of an OpenAI-compatible API, up to and with
            `/v1`.
        benchmarks: names of the recipe's, or `NAME=FILE` for one's own; default: all of the recipe's.
        samples: responses per problem, in place of each benchmark's own.
        max_problems: the first problems of each benchmark only.
        gguf_file: in the directory.
        served_as: name of the model at the endpoint; default: the only one there.
        api_key: `env:NAME` or `block:NAME`.
        concurrency: requests in flight at the endpoint.
        timeout_s: of one request at the endpoint; 32K tokens take a while.
        retry_for_s: from a request's first fault on, what may pass is tried again for so long.

    Raises:
        DataError: an unknown benchmark, or a fault in its file, with row and field.
        ModelError: the directory is missing or incomplete.
        RecipeError: options that contradict each other, or a context shorter than is asked for.
    """
    for option, number in (("samples", samples), ("max_problems", max_problems), ("concurrency", concurrency)):
        if number is not None and number < 1:
            raise RecipeError(f"{option}: {number} is none; give 1 or more")
    chosen = [
        benchmark.model_copy(
            update={"samples": samples or benchmark.samples, "max_problems": max_problems or benchmark.max_problems}
        )
        for benchmark in _chosen(recipe, benchmarks)
    ]
    endpoint = None
    if re.match(r"https?://", model):
        if gguf_file is not None:
            raise RecipeError(f"--gguf-file {gguf_file} is of a directory, but {model} is a URL; leave one of them out")
        endpoint = _endpoint(
            model,
            model=served_as,
            api_key=api_key,
            concurrency=concurrency,
            timeout_s=timeout_s,
            retry_for_s=retry_for_s,
        )
        name = served_as or ""
    else:
        for option, value in (("--served-as", served_as), ("--api-key", api_key)):
            if value is not None:
                raise RecipeError(f"{option} is of an endpoint, but {model} is no URL; give http://HOST:PORT/v1")
        recipe, name = _of_directory(recipe, model, gguf_file)
    return EvaluationPlan(
        recipe=recipe,
        endpoint=endpoint,
        name=plain_name(name),
        benchmarks=tuple(chosen),
        problems={benchmark.name: load_benchmark(benchmark) for benchmark in chosen},
    )


def plain_name(name: str) -> str:
    """As part of a folder's name: a server may call its model anything."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80] or "model"


def identity_of(plan: EvaluationPlan, path: Path | None, served: str | None) -> dict[str, str]:
    """What tells the model from every other: the sha256 of its directory, or URL and name of what is served."""
    if path is not None:
        return {"sha256": model_identity(path).rpartition(" ")[2]}
    assert plan.endpoint is not None
    return {"urls": " ".join(url.rstrip("/") for url in plan.endpoint.urls), "served_as": served or ""}


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
        "prompt": recipe.prompt.model_dump(),
        "seed": recipe.seed,
        "verification": [recipe.verification.timeout_s, recipe.verification.memory_limit_mb],
        "verifier": verifier_version(),
        "shard_problems": plan.shard_problems(benchmark),
    }
    if plan.endpoint is None:
        found |= {
            "engine": recipe.rollout.engine,
            "runtime.dtype": recipe.runtime.dtype,
            "chat_template": plan.model.chat_template,
        }
    return found


def _chosen(recipe: Recipe, names: Sequence[str]) -> list[BenchmarkConfig]:
    known = list(recipe.evaluation.benchmarks)
    wanted: list[str] = []
    for given in names:
        name, is_file, file = given.partition("=")
        if is_file:
            if name in [benchmark.name for benchmark in known]:
                raise DataError(f"--benchmark {given}: there is a benchmark '{name}' already; choose another name")
            try:
                known.append(BenchmarkConfig(name=name, file=file))
            except ValidationError as error:
                said = error.errors()[0]["msg"]
                raise DataError(f"--benchmark {given}: {said}; give NAME=FILE, a name of letters and digits") from error
        wanted.append(name)
    return select_benchmarks(known, wanted or None)


def _endpoint(url: str, **options: Any) -> ServersConfig:
    try:
        return ServersConfig(urls=[url], **options)
    except ValidationError as error:
        said = "; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())  # never the input
        raise RecipeError(f"MODEL or --api-key: {said}") from None


def _of_directory(recipe: Recipe, model: str, gguf_file: str | None) -> tuple[Recipe, str]:
    student = recipe.student.model_copy(update={"path": model, "gguf_file": gguf_file})
    if model != recipe.student.path:  # code beside a model is trusted for that model alone
        student = student.model_copy(update={"trust_remote_code": False})
    recipe = recipe.model_copy(update={"student": student})
    try:
        found = check_model_dir(student, role="student")
    except ModelError as error:
        raise ModelError(f"MODEL {model}: {str(error).removeprefix(f'student.path={model}: ')}") from error
    refuse_short_context(recipe, found, model)
    if gguf_file is not None:
        return recipe, Path(gguf_file).stem
    return recipe, model.removeprefix("run:") if model.startswith("run:") else resolve_path(model).name


def refuse_short_context(recipe: Recipe, config: dict[str, Any], model: str) -> None:
    """Raise RecipeError if the model's config.json tells of a shorter context than the evaluation asks for: its figures
    would be of another setting than those that they are compared with."""
    limit, asked = context_limit(config), recipe.evaluation.max_context_tokens
    if limit is not None and limit < asked:
        raise RecipeError(
            f"evaluation.max_context_tokens: {asked} tokens are beyond the context of {model} of {limit}; "
            f"add --set evaluation.max_context_tokens={limit}, for every model that is compared"
        )
