"""A model ─▶ evaluate ─▶ evaluation/<label>/{responses.parquet, results.json} (Sec. 4.1)."""

import json
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa

from kdrl_core.boxes.session import initial_policy, rest_sessions
from kdrl_core.config import EngineName, ModelConfig, Recipe
from kdrl_core.data.benchmarks import select_benchmarks
from kdrl_core.engines.from_recipe import rollout_engine
from kdrl_core.errors import ModelError
from kdrl_core.evaluation.asked import ask_benchmark, response_limit
from kdrl_core.evaluation.lm_eval import LM_EVAL_RESULTS, lm_eval_results
from kdrl_core.evaluation.outcome import Response, benchmark_result, responses_table
from kdrl_core.evaluation.results import RESULTS, read_results
from kdrl_core.ledger import Run, find_intact, is_published, publish_directory, verify_own, verify_published
from kdrl_core.ledger.graph import model_node
from kdrl_core.ledger.progress import report_progress
from kdrl_core.models.loading import context_limit, load_tokenizer, read_config
from kdrl_core.models.prepare import prepared_model
from kdrl_core.sampling.verified import generate_and_verify
from kdrl_core.tables.schemas import write_table
from kdrl_core.verify import Verifier
from kdrl_core.verify.failures import refuse_failures


def model_of(run: Run, label: str) -> tuple[Path, ModelConfig]:
    """Model directory and config behind an evaluation label.

    Labels: `base` and `teacher`; `<stage>` for a finished stage; `<stage>-step-<000012>` for a checkpoint.
    """
    recipe = run.recipe
    if label == "teacher":
        if recipe.teacher is None:
            raise ModelError("the recipe has no teacher to evaluate; set teacher.path")
        return prepared_model(recipe.teacher, run.paths.root), recipe.teacher
    if label == "base":
        return initial_policy(run, recipe.stages[0]), recipe.student
    node = model_node(recipe, label)
    if node is None:
        raise ModelError(f"no model of run {run.name} is called {label}")
    return run.paths.root / node.place, recipe.student


def evaluate_model(run: Run, label: str, benchmarks: Sequence[str] | None = None) -> dict[str, Any]:
    """Evaluate the model behind `label` on the named benchmarks (default: all) and publish responses and results.

    Returns:
        results.json: `label`, `model`, `date` (Unix time), `seconds`, and per benchmark what `benchmark_result` finds.

    Raises:
        VerificationError: too many verdicts of a benchmark are timeouts or errors.
    """
    target = run.paths.evaluation(label)
    recipe = run.recipe
    wanted = select_benchmarks(recipe.evaluation.benchmarks, benchmarks)
    path, config = model_of(run, label)
    inputs = _inputs(run, path)
    if find_intact(target, inputs, is_exact=False):
        return read_results(target)
    date, started = time.time(), time.perf_counter()
    rest_sessions()
    tokenizer = load_tokenizer(path, chat_template=config.chat_template, trust_remote_code=config.trust_remote_code)
    asked = [ask_benchmark(benchmark, recipe, tokenizer) for benchmark in wanted]
    context = _context(recipe, read_config(path))
    limits = [response_limit(context, each.requests, label) for each in asked]
    results: dict[str, Any] = {}
    tables: list[pa.Table] = []
    engine = rollout_engine(
        recipe,
        path,
        config,
        tokenizer,
        temperature=recipe.evaluation.temperature,
        max_prompt_tokens=context - max(limits),
        max_response_tokens=max(limits),
        engine=_engine_of(recipe, label),
    )
    with Verifier(**recipe.verification.pool_options) as verifier, closing(engine):
        for benchmark, each, limit in zip(wanted, asked, limits, strict=True):
            report_progress(run, stage=f"evaluate {label}", phase=benchmark.name)
            rollouts, verdicts = generate_and_verify(
                engine,
                each.requests,
                verifier,
                {problem.problem_id: problem.answer for problem in each.problems},
                think_opened=each.think_opened,
                max_response_tokens=limit,
            )
            where = f"evaluation of {label}, {benchmark.name}"
            refuse_failures(verdicts, where, recipe.verification.max_failed_share)
            responses = [
                Response.of(rollout, request.seed) for rollout, request in zip(rollouts, each.requests, strict=True)
            ]
            table = responses_table(benchmark.name, responses, verdicts, each.problems)
            tables.append(table)
            results[benchmark.name] = benchmark_result(table, benchmark.samples, seed=recipe.seed)
    content = {
        "label": label,
        "model": path.name,
        "date": date,
        "seconds": time.perf_counter() - started,
        "benchmarks": results,
    }

    def write(folder: Path) -> None:
        write_table(pa.concat_tables(tables), folder / "responses.parquet")
        (folder / RESULTS).write_text(json.dumps(content, indent=1) + "\n")
        shaped = lm_eval_results(content, temperature=recipe.evaluation.temperature, seed=recipe.seed)
        (folder / LM_EVAL_RESULTS).write_text(json.dumps(shaped, indent=1) + "\n")

    publish_directory(target, write, inputs=inputs)
    return content


def _inputs(run: Run, path: Path) -> dict[str, str]:
    """The evaluated model by its hash, where kdrl published it: in this run or in another. Others have no manifest."""
    if path.is_relative_to(run.paths.root):
        return {run.relative(path): verify_own(run, path).sha256}
    return {str(path): verify_published(path).sha256} if is_published(path) else {}


def _engine_of(recipe: Recipe, label: str) -> EngineName:
    """The student's engine is that of rollouts; the teacher is no model that replicas of the student can load."""
    if label == "teacher":
        return recipe.teacher.engine if recipe.teacher is not None else "transformers"
    return recipe.rollout.engine


def _context(recipe: Recipe, config: dict[str, Any]) -> int:
    """Tokens of prompt and response together."""
    return min(recipe.evaluation.max_context_tokens, context_limit(config) or recipe.evaluation.max_context_tokens)
