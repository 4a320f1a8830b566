"""A model ─▶ evaluate ─▶ evaluations/<model>/<benchmark>/: sample, verify, sum up, in shards that survive a kill.

    artifacts/evaluations/<name>-<id>/<benchmark>-<settings>/       responses.parquet, results.json, lm_eval.json
    artifacts/evaluations/<name>-<id>/<benchmark>-<settings>.work/  its shards, until it is whole

<id> is a hash of the model. <settings> is a hash of all that its responses and verdicts depend on. So a finished
evaluation is found again, and a stopped one goes on after its last response.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from kdrl_core.config import BenchmarkConfig
from kdrl_core.errors import DamagedArtifactError
from kdrl_core.evaluation.answering import SamplerOf, connect, sampler_of_directory, sampler_of_endpoint
from kdrl_core.evaluation.evaluation_plan import EvaluationPlan, plain_name, refuse_short_context, settings_of
from kdrl_core.evaluation.lm_eval import lm_eval_results
from kdrl_core.evaluation.outcome import publish_outcome
from kdrl_core.evaluation.results import read_results
from kdrl_core.ledger import RunPaths, find_intact, is_published, model_identity, verify_published
from kdrl_core.models.loading import read_config
from kdrl_core.models.prepare import prepared_model
from kdrl_core.sampling.job import SamplingJob, hold_work, settings_hash
from kdrl_core.tables.schemas import EVALUATION

Progress = Callable[[str, int, int], None]
"""Called with the benchmark, the responses done and the responses in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedBenchmark:
    """A benchmark's figures and where they lie."""

    name: str
    folder: Path
    result: dict[str, Any]
    """As `benchmark_result` returns it."""
    seconds: float
    """Time of sampling and judging, over all calls."""
    is_new: bool
    """Whether this call made it."""


def evaluate_plan(plan: EvaluationPlan, root: Path, *, on_progress: Progress | None = None) -> list[EvaluatedBenchmark]:
    """Evaluate; a finished evaluation is only read, a stopped one goes on.

    Args:
        root: the artifacts folder.
        on_progress: its counts include the responses of earlier calls.

    Raises:
        EngineError: an engine cannot be started, or the endpoint cannot be reached.
        RecipeError: the recipe's device is not there.
        ModelError: model or tokenizer cannot be loaded, or a prompt leaves no room for a response.
        RunLockedError: another process evaluates the same.
        DamagedArtifactError: a shard, or a model that kdrl published, was altered.
        VerificationError: too many verdicts of a shard are timeouts or errors.
    """
    with ExitStack() as stack:
        load: Callable[[], SamplerOf]
        if plan.endpoint is None:
            path = prepared_model(plan.model, RunPaths.of("evaluate").root)
            refuse_short_context(plan.recipe, read_config(path), plan.model.path)
            load = cache(partial(_directory, plan, path, stack))
            name, identity = plan.name, {"sha256": model_identity(path).rpartition(" ")[2]}
        else:  # if the model's name is given, finished evaluations are read without a connection
            endpoint = cache(partial(connect, plan, stack))
            load = cache(partial(sampler_of_endpoint, plan, endpoint, stack))
            served, urls = plan.endpoint.model or endpoint().model, [url.rstrip("/") for url in plan.endpoint.urls]
            name, identity = plain_name(served.rpartition("/")[2]), {"urls": " ".join(urls), "served_as": served}
        folder = root / "evaluations" / f"{name}-{_short(identity)}"
        return [_one(plan, benchmark, identity, folder, load, on_progress) for benchmark in plan.benchmarks]


def combined_lm_eval(found: Sequence[EvaluatedBenchmark]) -> bytes:
    """`lm_eval.json` of several benchmarks of one model as one file."""
    contents = [read_results(each.folder) for each in found]
    settings = contents[0]["settings"]
    dates = [content["date"] for content in contents if "date" in content]
    merged = {
        "model": contents[0]["model"],
        **({"date": min(dates)} if dates else {}),
        "seconds": sum(content["seconds"] for content in contents),
        "benchmarks": {name: result for content in contents for name, result in content["benchmarks"].items()},
    }
    shaped = lm_eval_results(merged, temperature=settings["temperature"], seed=settings["seed"])
    return (json.dumps(shaped, indent=1) + "\n").encode()


def benchmark_job(
    plan: EvaluationPlan,
    benchmark: BenchmarkConfig,
    load: Callable[[], SamplerOf],
    folder: Path,
    inputs: Mapping[str, str],
    *,
    whole: str | None = None,
) -> SamplingJob:
    """The job that samples one benchmark into shards in `folder`; their manifests name `inputs`.

    Args:
        load: called when a shard is to be sampled.
        whole: makes the benchmark one shard. Errors use this name, and a damaged shard is sampled again.
    """
    problems = {problem.problem_id: problem for problem in plan.problems[benchmark.name]}
    return SamplingJob(
        folder=folder,
        inputs=inputs,
        ground_truths={problem_id: problem.answer for problem_id, problem in problems.items()},
        samples=benchmark.samples,
        seed_names=(plan.recipe.seed, "evaluation", benchmark.name),  # other benchmarks do not change a response
        shard_prompts=len(problems) if whole else plan.shard_problems(benchmark),
        name=lambda ids: whole or f"{benchmark.name}, problems {ids[0]} to {ids[-1]}",
        max_failed_share=plan.recipe.verification.max_failed_share,
        schema=EVALUATION,
        more_columns=lambda ids: {
            "benchmark": [benchmark.name] * len(ids),
            "question": [problems[problem_id].question for problem_id in ids],
        },
        load=lambda: load()(benchmark),
        is_timed=True,
        heals=whole is not None,
    )


def _one(
    plan: EvaluationPlan,
    benchmark: BenchmarkConfig,
    identity: dict[str, str],
    folder: Path,
    load: Callable[[], SamplerOf],
    on_progress: Progress | None,
) -> EvaluatedBenchmark:
    settings = {"model": identity, **settings_of(plan, benchmark)}
    target = folder / f"{benchmark.name}-{_short(settings)}"
    inputs = {"settings": settings_hash(settings)}
    if _is_intact(target, inputs):
        return _read(benchmark.name, target, is_new=False)
    work = target.with_name(f"{target.name}.work")
    with hold_work(work, "evaluate.lock", remedy=", which evaluates the same; wait for it"):
        if not find_intact(target, inputs, is_exact=False):  # else another process made it while we waited
            job = benchmark_job(plan, benchmark, load, work, inputs)
            shards = job.run(on_progress and partial(on_progress, benchmark.name))
            publish_outcome(
                plan,
                target,
                {benchmark.name: shards},
                label=folder.name.rpartition("-")[0],
                model=folder.name,
                inputs=inputs,
                settings=settings,
            )
        shutil.rmtree(work, ignore_errors=True)  # a process that waited for it does the same
    return _read(benchmark.name, target, is_new=True)


def _is_intact(target: Path, inputs: dict[str, str]) -> bool:
    """Check without the lock; damaged files are set aside later, under the lock."""
    try:
        return is_published(target) and verify_published(target).inputs == inputs
    except DamagedArtifactError:
        return False


def _directory(plan: EvaluationPlan, path: Path, stack: ExitStack) -> SamplerOf:
    """Raises DamagedArtifactError if kdrl published the model, and it was altered since."""
    if is_published(path):
        verify_published(path)
    return sampler_of_directory(plan, path, lambda benchmark: f"{plan.name}, {benchmark.name}", stack)


def _read(name: str, target: Path, *, is_new: bool) -> EvaluatedBenchmark:
    found = read_results(target)
    return EvaluatedBenchmark(
        name=name, folder=target, result=found["benchmarks"][name], seconds=found["seconds"], is_new=is_new
    )


def _short(settings: dict[str, Any]) -> str:
    return settings_hash(settings)[:10]
