"""problems ─▶ label ─▶ problems with `failures`: sample, verify, count, in shards that survive a kill.

Responses come from any `RolloutEngine`. The seed of a response is `derive_seed(seed, "label", problem_id, sample)`, so
that a label depends neither on shards nor on the other problems.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from kdrl_core.data import PROBLEM_SCHEMA, render_prompts, think_opened
from kdrl_core.engines.from_recipe import rollout_engine
from kdrl_core.engines.protocols import RolloutEngine
from kdrl_core.labelling.plan import ORIGIN_KEY, LabelPlan
from kdrl_core.labelling.summary import LabelSummary, summarize_labels
from kdrl_core.labelling.work import SETTINGS, SHARD, open_work, settings_hash, shard_path, work_folder
from kdrl_core.ledger import (
    RunPaths,
    derive_seed,
    is_published,
    model_identity,
    publish_file,
    replace_file,
    verify_published,
)
from kdrl_core.models.loading import load_tokenizer
from kdrl_core.models.prepare import prepared_model
from kdrl_core.sampling.verified import generate_and_verify
from kdrl_core.tables.columns import verdict_columns
from kdrl_core.tables.schemas import read_table, write_table
from kdrl_core.types import Rollout, RolloutRequest, Verdict
from kdrl_core.verify import Verifier
from kdrl_core.verify.failures import refuse_failures

_ENGINE = "transformers"
Progress = Callable[[int, int], None]
MakeEngine = Callable[[LabelPlan, Path, Any], RolloutEngine]
Problem = dict[str, Any]
"""problem_id, answer, prompt and prompt_token_ids."""


def label_problems(
    plan: LabelPlan,
    output: Path,
    *,
    shard_problems: int = 64,
    keep_work: bool = False,
    on_progress: Progress | None = None,
    make_engine: MakeEngine | None = None,
) -> LabelSummary:
    """Measure the labels and write `plan.problems` with them, going on where an earlier call was stopped.

    Args:
        shard_problems: problems sampled and published together.
        keep_work: leave the responses in `work_folder(output)`.
        on_progress: hears (responses done, responses in all), those of an earlier call included.
        make_engine: from the plan, the model's directory and its tokenizer; default: the recipe's rollout engine.

    Raises:
        ModelError: model or tokenizer cannot be loaded.
        RunError: the work folder belongs to other settings, or to another process.
        DamagedArtifactError: a shard was altered.
        VerificationError: too many verdicts of a shard are timeouts or errors.
    """
    work = work_folder(output)
    student = plan.recipe.student
    path = prepared_model(student, RunPaths.of("label").root)
    tokenizer = load_tokenizer(path, chat_template=student.chat_template, trust_remote_code=student.trust_remote_code)
    problems, num_too_long = _rendered(plan, tokenizer)
    settings = _settings(plan, path, problems, shard_problems)
    inputs = {SETTINGS: settings_hash(settings)}
    parts = [problems[start : start + shard_problems] for start in range(0, len(problems), shard_problems)]
    with ExitStack() as stack:
        stack.enter_context(open_work(work, settings))
        engine: RolloutEngine | None = None
        verifier: Verifier | None = None
        shards: list[pa.Table] = []
        done, total = 0, len(problems) * plan.num_samples
        for index, part in enumerate(parts):
            target = shard_path(work, index)
            if is_published(target):
                verify_published(target)
            else:
                if engine is None or verifier is None:
                    verifier = stack.enter_context(Verifier(**plan.recipe.verification.pool_options))
                    engine = stack.enter_context(closing((make_engine or recipe_engine)(plan, path, tokenizer)))
                table = _sample(plan, part, engine, verifier, _shifted(on_progress, done, total))
                publish_file(target, partial(write_table, table), inputs=inputs)
            shards.append(
                read_table(target, ["problem_id", "sample", "verdict", "accuracy_reward", "finish_reason", "length"])
            )
            done += len(part) * plan.num_samples
            if on_progress is not None:
                on_progress(done, total)
        failures = _write(plan, output, shards, settings)
        if not keep_work:
            shutil.rmtree(work)
    return summarize_labels(
        label=plan.label,
        num_samples=plan.num_samples,
        failures=failures,
        samples=shards,
        num_too_long=num_too_long,
    )


def recipe_engine(plan: LabelPlan, path: Path, tokenizer: Any) -> RolloutEngine:
    """The recipe's rollout engine over the model in `path`."""
    import torch

    torch.set_num_threads(plan.recipe.runtime.num_threads)
    return rollout_engine(
        plan.recipe,
        path,
        plan.recipe.student,
        tokenizer,
        temperature=plan.config.temperature,
        max_prompt_tokens=plan.config.max_prompt_tokens,
        max_response_tokens=plan.config.max_response_tokens,
    )


def _rendered(plan: LabelPlan, tokenizer: Any) -> tuple[list[Problem], int]:
    """The problems to sample, with their prompts, and how many are left out since theirs is too long."""
    chosen = (
        plan.problems.take(pa.array(plan.todo, pa.int64())).select(["problem_id", "question", "answer"]).to_pylist()
    )
    prompts = render_prompts([problem["question"] for problem in chosen], tokenizer, plan.recipe)
    rendered = [
        {**problem, "prompt": prompt, "prompt_token_ids": token_ids}
        for problem, (prompt, token_ids) in zip(chosen, prompts, strict=True)
        if len(token_ids) <= plan.config.max_prompt_tokens
    ]
    return rendered, len(chosen) - len(rendered)


def _settings(plan: LabelPlan, path: Path, problems: Sequence[Problem], shard_problems: int) -> dict[str, Any]:
    """Everything that a response or a label depends on."""
    content = hashlib.sha256()
    for problem in problems:
        content.update(json.dumps([problem[name] for name in ("problem_id", "answer", "prompt_token_ids")]).encode())
    recipe, config = plan.recipe, plan.config
    return {
        "label": plan.label,
        "model": model_identity(path),
        "problems": f"{len(problems)} sha256 {content.hexdigest()[:16]}",
        "samples": plan.num_samples,
        "shard_problems": shard_problems,
        "seed": recipe.seed,
        "temperature": config.temperature,
        "max_response_tokens": config.max_response_tokens,
        "prompt.think_opened": recipe.prompt.think_opened,
        "runtime.dtype": recipe.runtime.dtype,
        "engine": _ENGINE,
    }


def _sample(
    plan: LabelPlan,
    problems: Sequence[Problem],
    engine: RolloutEngine,
    verifier: Verifier,
    on_progress: Callable[[int], None] | None,
) -> pa.Table:
    """Responses and verdicts of some problems, in SHARD."""
    requests = [
        RolloutRequest(
            prompt_id=problem["problem_id"],
            sample=sample,
            prompt_token_ids=problem["prompt_token_ids"],
            seed=derive_seed(plan.recipe.seed, "label", problem["problem_id"], sample),
        )
        for problem in problems
        for sample in range(plan.num_samples)
    ]
    asked = {problem["problem_id"]: problem for problem in problems}
    done = 0

    def finished(rollouts: Sequence[Rollout]) -> None:
        nonlocal done
        done += len(rollouts)
        if on_progress is not None:
            on_progress(done)

    rollouts, verdicts = generate_and_verify(
        engine,
        requests,
        verifier,
        {problem_id: problem["answer"] for problem_id, problem in asked.items()},
        think_opened=think_opened(problems[0]["prompt"], plan.recipe),
        on_finished=finished,
    )
    where = f"problems {problems[0]['problem_id']} to {problems[-1]['problem_id']}"
    refuse_failures(verdicts, where, plan.recipe.verification.max_failed_share)
    return _table(requests, rollouts, verdicts, asked)


def _table(
    requests: Sequence[RolloutRequest],
    rollouts: Sequence[Rollout],
    verdicts: Sequence[Verdict],
    problems: dict[str, Problem],
) -> pa.Table:
    return pa.Table.from_pydict(
        {
            "problem_id": [r.prompt_id for r in rollouts],
            "sample": [r.sample for r in rollouts],
            "prompt": [problems[r.prompt_id]["prompt"] for r in rollouts],
            "response": [r.text for r in rollouts],
            "ground_truth": [problems[r.prompt_id]["answer"] for r in rollouts],
            "length": [len(r.token_ids) for r in rollouts],
            "finish_reason": [r.finish_reason.value for r in rollouts],
            **verdict_columns(verdicts),
            "seed": [request.seed for request in requests],
        },
        schema=SHARD,
    )


def _write(plan: LabelPlan, output: Path, shards: Sequence[pa.Table], settings: dict[str, Any]) -> list[int | None]:
    """Write the output atomically; the failures of each of its rows."""
    measured: dict[str, int] = {}
    for shard in shards:
        for problem_id, reward in zip(
            shard["problem_id"].to_pylist(), shard["accuracy_reward"].to_pylist(), strict=True
        ):
            measured[problem_id] = measured.get(problem_id, 0) + (reward == 0.0)
    labels: list[dict[str, int]] = []
    for problem_id, known in zip(
        plan.problems["problem_id"].to_pylist(), plan.problems["failures"].to_pylist(), strict=True
    ):
        counts = dict(known or [])
        if problem_id in measured:
            counts[plan.label] = measured[problem_id]
        labels.append(counts)
    column = pa.array(
        [sorted(counts.items()) if counts else None for counts in labels], PROBLEM_SCHEMA.field("failures").type
    )
    table = plan.problems.set_column(
        PROBLEM_SCHEMA.get_field_index("failures"), PROBLEM_SCHEMA.field("failures"), column
    )
    metadata = dict(plan.origins)
    if shards:
        metadata[f"{ORIGIN_KEY}{plan.label}".encode()] = json.dumps(settings, sort_keys=True).encode()
    replace_file(output, partial(write_table, table.replace_schema_metadata(metadata)))
    return [counts.get(plan.label) for counts in labels]


def _shifted(on_progress: Progress | None, done: int, total: int) -> Callable[[int], None] | None:
    return None if on_progress is None else lambda more: on_progress(done + more, total)
