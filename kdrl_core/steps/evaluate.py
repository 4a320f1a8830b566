"""A model ─▶ evaluate ─▶ evaluation/<label>/{responses.parquet, results.json} (Sec. 4.1)."""

import json
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow as pa

from kdrl_core.config import BenchmarkConfig, ModelConfig, Recipe
from kdrl_core.data import render_prompts, think_opened
from kdrl_core.engines.from_recipe import EngineName, rollout_engine
from kdrl_core.engines.models import context_limit, load_tokenizer, read_config
from kdrl_core.engines.prepare import prepared_model
from kdrl_core.engines.verified import generate_and_verify
from kdrl_core.errors import ModelError
from kdrl_core.evaluation.benchmarks import BenchmarkProblem, load_benchmark, select_benchmarks
from kdrl_core.evaluation.lm_eval import LM_EVAL_RESULTS, lm_eval_results
from kdrl_core.evaluation.results import RESULTS, read_results
from kdrl_core.evaluation.statistics import accuracy, majority, pass_at_k, powers_of_two, standard_error
from kdrl_core.ledger import (
    Run,
    derive_seed,
    find_intact,
    is_published,
    publish_directory,
    verify_own,
    verify_published,
)
from kdrl_core.progress import report_progress
from kdrl_core.rollouts.columns import verdict_columns
from kdrl_core.rollouts.schema import EVALUATION, write_table
from kdrl_core.steps.session import initial_policy, rest_sessions
from kdrl_core.types import Rollout, RolloutRequest, Verdict, VerdictKind
from kdrl_core.verify import Verifier


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
    stage, _, step = label.partition("-step-")
    return run.paths.checkpoint(stage, int(step) if step else recipe.stage(stage).steps), recipe.student


def evaluate_model(run: Run, label: str, benchmarks: Sequence[str] | None = None) -> dict[str, Any]:
    """Evaluate the model behind `label` on the named benchmarks (default: all) and publish responses and results.

    Returns:
        results.json: per benchmark `accuracy`, `low`, `high` (in [0, 1]), `pass_at_k` by k, `maj_at_k`,
        `length_mean`, `clip_ratio`, counts, `verdicts` by kind.
    """
    target = run.paths.evaluation(label)
    recipe = run.recipe
    wanted = select_benchmarks(recipe.evaluation.benchmarks, benchmarks)
    path, config = model_of(run, label)
    inputs = _inputs(run, path)
    if find_intact(target, inputs, is_exact=False):
        return read_results(target)
    started = time.perf_counter()
    rest_sessions()
    tokenizer = load_tokenizer(path, chat_template=config.chat_template, trust_remote_code=config.trust_remote_code)
    samples = [_sample_of(benchmark, recipe, tokenizer) for benchmark in wanted]
    context = _context(recipe, read_config(path))
    limits = [_response_limit(context, sample.requests, label) for sample in samples]
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
        for benchmark, sample, limit in zip(wanted, samples, limits, strict=True):
            report_progress(run, stage=f"evaluate {label}", phase=benchmark.name)
            rollouts, verdicts = generate_and_verify(
                engine,
                sample.requests,
                verifier,
                {p.problem_id: p.answer for p in sample.problems},
                think_opened=sample.think_opened,
                max_response_tokens=limit,
            )
            problems = {p.problem_id: p for p in sample.problems}
            tables.append(_table(benchmark.name, sample.requests, rollouts, verdicts, problems))
            results[benchmark.name] = _result(rollouts, verdicts, benchmark.samples, seed=recipe.seed)
    content = {"label": label, "model": path.name, "seconds": time.perf_counter() - started, "benchmarks": results}

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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """What is asked of a benchmark."""

    problems: list[BenchmarkProblem]
    requests: list[RolloutRequest]
    think_opened: bool


def _sample_of(benchmark: BenchmarkConfig, recipe: Recipe, tokenizer: Any) -> _Sample:
    problems = load_benchmark(benchmark)
    prompts = render_prompts([p.question for p in problems], tokenizer, recipe)
    requests = [
        RolloutRequest(
            prompt_id=problem.problem_id,
            sample=sample,
            prompt_token_ids=token_ids,
            seed=derive_seed(recipe.seed, "evaluation", benchmark.name, problem.problem_id, sample),
        )
        for problem, (_, token_ids) in zip(problems, prompts, strict=True)
        for sample in range(benchmark.samples)
    ]
    return _Sample(problems=problems, requests=requests, think_opened=think_opened(prompts[0][0], recipe))


def _engine_of(recipe: Recipe, label: str) -> EngineName:
    """The student's engine is that of rollouts; the teacher is no model that replicas of the student can load."""
    if label == "teacher":
        return recipe.teacher.engine if recipe.teacher is not None else "transformers"
    return recipe.rollout.engine


def _context(recipe: Recipe, config: dict[str, Any]) -> int:
    """Tokens of prompt and response together."""
    return min(recipe.evaluation.max_context_tokens, context_limit(config) or recipe.evaluation.max_context_tokens)


def _response_limit(context: int, requests: Sequence[RolloutRequest], label: str) -> int:
    longest = max(len(request.prompt_token_ids) for request in requests)
    if longest >= context:
        raise ModelError(
            f"evaluation of {label}: a prompt has {longest} tokens, the context {context}; "
            "raise evaluation.max_context_tokens or use a model with a longer context"
        )
    return context - longest


def _table(
    benchmark: str,
    requests: Sequence[RolloutRequest],
    rollouts: Sequence[Rollout],
    verdicts: Sequence[Verdict],
    problems: dict[str, BenchmarkProblem],
) -> pa.Table:
    return pa.Table.from_pydict(
        {
            "benchmark": [benchmark] * len(rollouts),
            "prompt_id": [r.prompt_id for r in rollouts],
            "sample": [r.sample for r in rollouts],
            "question": [problems[r.prompt_id].question for r in rollouts],
            "ground_truth": [problems[r.prompt_id].answer for r in rollouts],
            "response": [r.text for r in rollouts],
            "length": [len(r.token_ids) for r in rollouts],
            "finish_reason": [r.finish_reason.value for r in rollouts],
            **verdict_columns(verdicts),
            "seed": [request.seed for request in requests],
        },
        schema=EVALUATION,
    )


def _result(rollouts: Sequence[Rollout], verdicts: Sequence[Verdict], samples: int, *, seed: int) -> dict[str, Any]:
    correct = [v.accuracy_reward for v in verdicts]
    groups = [correct[start : start + samples] for start in range(0, len(correct), samples)]
    answers = [v.extracted for v in verdicts]
    votes = [answers[start : start + samples] for start in range(0, len(answers), samples)]
    found = accuracy(groups, seed=seed)
    return {
        "accuracy": found.mean,
        "low": found.low,
        "high": found.high,
        "stderr": standard_error(groups),
        "num_problems": len(groups),
        "num_samples": samples,
        "pass_at_k": {
            str(k): fmean(pass_at_k(samples, round(sum(group)), k) for group in groups) for k in powers_of_two(samples)
        },
        "maj_at_k": fmean(majority(vote, group) for vote, group in zip(votes, groups, strict=True)),
        "length_mean": sum(len(r.token_ids) for r in rollouts) / len(rollouts),
        "clip_ratio": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
        "verdicts": {kind.value: sum(v.kind is kind for v in verdicts) for kind in VerdictKind},
    }
