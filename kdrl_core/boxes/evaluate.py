"""A model ─▶ evaluate ─▶ evaluation/<label>/{responses.parquet, results.json} (Sec. 4.1).

evaluation/<label>/             published as a whole
evaluation/.scratch-<label>/    responses sampled so far: a shard per benchmark, hidden from readers of the run
"""

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any

from kdrl_core.boxes.builders import initial_policy
from kdrl_core.boxes.make import report_progress
from kdrl_core.boxes.session import rest_sessions
from kdrl_core.config import BenchmarkConfig, EngineName, ModelConfig
from kdrl_core.data.benchmarks import load_benchmark, select_benchmarks
from kdrl_core.errors import ModelError
from kdrl_core.evaluation.answering import SamplerOf, sampler_of_directory
from kdrl_core.evaluation.evaluate import benchmark_job
from kdrl_core.evaluation.evaluation_plan import EvaluationPlan, settings_of
from kdrl_core.evaluation.outcome import publish_outcome
from kdrl_core.evaluation.results import read_results
from kdrl_core.ledger import (
    Run,
    find_intact,
    is_published,
    model_identity,
    settle_outside,
    verify_own,
    verify_published,
)
from kdrl_core.ledger.graph import model_node
from kdrl_core.models.prepare import prepared_model
from kdrl_core.sampling.job import settings_hash


def model_of(run: Run, label: str) -> tuple[Path, ModelConfig]:
    """Model directory and config behind an evaluation label.

    Labels: `base` and `teacher`; `<stage>` for a finished stage; `<stage>-step-<000012>` for a checkpoint; the names of
    `evaluation.also`.
    """
    recipe = run.recipe
    if label == "teacher":
        if recipe.teacher is None:
            raise ModelError("the recipe has no teacher to evaluate; set teacher.path")
        return prepared_model(recipe.teacher, run.paths.root), recipe.teacher
    if label in recipe.evaluation.also:
        return prepared_model(recipe.evaluation.also[label], run.paths.root), recipe.evaluation.also[label]
    if label == "base":
        return initial_policy(run, recipe.stages[0]), recipe.student
    node = model_node(recipe, label)
    if node is None:
        raise ModelError(f"no model of run {run.name} is called {label}")
    return run.paths.root / node.place, recipe.student


def evaluate_model(run: Run, label: str, benchmarks: Sequence[str] | None = None) -> dict[str, Any]:
    """Evaluate the model behind `label` on the named benchmarks (default: all) and publish responses and results.

    A stopped evaluation continues after its last response.

    Returns:
        results.json: `label`, `model`, `date` (Unix time), `seconds`, and the `benchmark_result` of each benchmark.

    Raises:
        VerificationError: too many verdicts of a benchmark are timeouts or errors.
        RunError: models or benchmarks are not those that the run began with.
    """
    target = run.paths.evaluation(label)
    work = target.with_name(f".scratch-{label}")
    wanted = select_benchmarks(run.recipe.evaluation.benchmarks, benchmarks)
    path, config = model_of(run, label)
    inputs = _inputs(run, path)
    if find_intact(target, inputs, is_exact=False):
        content = read_results(target)
    else:
        settle_outside(run)
        rest_sessions()
        plan = _plan(run, label, config, wanted)
        with ExitStack() as stack:
            load = cache(partial(sampler_of_directory, plan, path, lambda _: label, stack))
            identity = inputs or {"model": model_identity(path)}
            shards = {each.name: _sample(run, plan, each, load, work, identity) for each in wanted}
        content = publish_outcome(plan, target, shards, label=label, model=path.name, inputs=inputs)
    shutil.rmtree(work, ignore_errors=True)
    return content


def _sample(
    run: Run,
    plan: EvaluationPlan,
    benchmark: BenchmarkConfig,
    load: Callable[[], SamplerOf],
    work: Path,
    model: dict[str, str],
) -> list[Path]:
    """Sample a benchmark. Returns its only shard."""
    settings = settings_hash({"model": model, **settings_of(plan, benchmark)})
    folder, inputs = work / f"{benchmark.name}-{settings[:10]}", {"settings": settings}
    whole = f"evaluation of {plan.name}, {benchmark.name}"
    report = partial(report_progress, run, stage=f"evaluate {plan.name}", phase=benchmark.name)
    job = benchmark_job(plan, benchmark, load, folder, inputs, whole=whole)
    return job.run(lambda done, total: report(done=done, total=total))


def _plan(run: Run, label: str, config: ModelConfig, benchmarks: Sequence[BenchmarkConfig]) -> EvaluationPlan:
    """The student uses the engine of rollouts. The teacher uses its own, since student replicas cannot load it, and so
    do models for comparison if there are replicas."""
    recipe = run.recipe
    engine: EngineName = recipe.rollout.engine
    is_foreign = label == "teacher" or (label in recipe.evaluation.also and engine == "server")
    if is_foreign:
        engine = "transformers" if recipe.teacher is None else recipe.teacher.engine
    return EvaluationPlan(
        recipe=recipe,
        endpoint=None,
        model=config,
        engine=engine,
        name=label,
        benchmarks=tuple(benchmarks),
        problems={benchmark.name: load_benchmark(benchmark) for benchmark in benchmarks},
    )


def _inputs(run: Run, path: Path) -> dict[str, str]:
    """Path → hash of the evaluated model if kdrl published it, in this run or another; else empty."""
    if path.is_relative_to(run.paths.root):
        return {run.paths.relative(path): verify_own(run, path).sha256}
    return {str(path): verify_published(path).sha256} if is_published(path) else {}
