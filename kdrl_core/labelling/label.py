"""problems ─▶ label ─▶ problems with `failures`: sample, verify, count, in shards that survive a kill.

Responses come from any `RolloutEngine`. The seed of a response is `derive_seed(seed, "label", problem_id, sample)`, so
that a label depends neither on shards nor on the other problems.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from kdrl_core.data import PROBLEM_SCHEMA, render_prompts, think_opened
from kdrl_core.engines.from_recipe import rollout_engine
from kdrl_core.engines.protocols import RolloutEngine
from kdrl_core.labelling.label_plan import ORIGIN_KEY, LabelPlan
from kdrl_core.labelling.label_summary import LabelSummary, summarize_labels
from kdrl_core.labelling.work import SETTINGS, SHARDS, open_work, work_folder
from kdrl_core.ledger import RunPaths, model_identity, replace_file
from kdrl_core.models.loading import load_tokenizer
from kdrl_core.models.prepare import prepared_model
from kdrl_core.sampling.job import Progress, Sampler, SamplingJob
from kdrl_core.sampling.requests import requests_for
from kdrl_core.sampling.responses import EngineSource, Response, response_columns
from kdrl_core.sampling.work import settings_hash
from kdrl_core.tables.columns import verdict_columns
from kdrl_core.tables.schemas import LABELS, read_table, write_table
from kdrl_core.types import Verdict
from kdrl_core.verify import Verifier

_ENGINE = "transformers"
_COUNTED = ["problem_id", "sample", "verdict", "accuracy_reward", "finish_reason", "length"]
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
    with ExitStack() as stack:
        stack.enter_context(open_work(work, settings))

        def load() -> Sampler:
            verifier = stack.enter_context(Verifier(**plan.recipe.verification.pool_options))
            engine = stack.enter_context(closing((make_engine or recipe_engine)(plan, path, tokenizer)))
            return _sampler(plan, problems, engine, verifier)

        job = SamplingJob(
            folder=work / SHARDS,
            inputs={SETTINGS: settings_hash(settings)},
            prompt_ids=[problem["problem_id"] for problem in problems],
            samples=plan.num_samples,
            shard_prompts=shard_problems,
            name=lambda ids: f"problems {ids[0]} to {ids[-1]}",
            max_failed_share=plan.recipe.verification.max_failed_share,
            to_table=partial(_table, {problem["problem_id"]: problem for problem in problems}),
            load=load,
        )
        shards = [read_table(shard, _COUNTED) for shard in job.run(on_progress)]
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


def _sampler(plan: LabelPlan, problems: Sequence[Problem], engine: RolloutEngine, verifier: Verifier) -> Sampler:
    prompts = [(problem["problem_id"], problem["prompt_token_ids"]) for problem in problems]
    return Sampler(
        source=EngineSource(engine=engine),
        verifier=verifier,
        requests=requests_for(prompts, plan.num_samples, plan.recipe.seed, "label"),
        ground_truths={problem["problem_id"]: problem["answer"] for problem in problems},
        think_opened=think_opened(problems[0]["prompt"], plan.recipe),
    )


def _table(problems: Mapping[str, Problem], responses: Sequence[Response], verdicts: Sequence[Verdict]) -> pa.Table:
    """LABELS, a row per response, in order."""
    asked = [problems[response.prompt_id] for response in responses]
    truths = {problem["problem_id"]: problem["answer"] for problem in asked}
    columns = response_columns(responses, truths)
    return pa.Table.from_pydict(
        {
            **columns,
            **verdict_columns(verdicts),
            "problem_id": columns["prompt_id"],
            "prompt": [problem["prompt"] for problem in asked],
        },
        schema=LABELS,
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
