"""problems ─▶ label ─▶ problems with `failures`: sample, verify, count, in shards that survive a kill.

    labels.parquet.work/label.json                  the settings
    labels.parquet.work/shards/shard-00000.parquet  responses and verdicts of some problems, published (docs/labels.md)

A response is a function of the settings. So a killed labelling goes on after its last response and ends with the same
labels. The seed of a response is `derive_seed(seed, "label", problem_id, sample)`: a label depends neither on shards
nor on the other problems.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from kdrl_core.config.paths import read_json, why
from kdrl_core.data import PROBLEM_SCHEMA, render_prompts, think_opened
from kdrl_core.engines.from_recipe import rollout_engine
from kdrl_core.engines.protocols import RolloutEngine
from kdrl_core.errors import RunError
from kdrl_core.labelling.label_plan import ORIGIN_KEY, LabelPlan
from kdrl_core.labelling.label_summary import LabelSummary, summarize_labels
from kdrl_core.ledger import RunPaths, model_identity, replace_file
from kdrl_core.ledger.identity import reward_settings
from kdrl_core.models.loading import load_tokenizer
from kdrl_core.models.prepare import prepared_model
from kdrl_core.sampling.job import Progress, Sampler, SamplingJob, hold_work, open_judge, settings_hash
from kdrl_core.sampling.responses import engine_source
from kdrl_core.tables.files import read_table, write_table
from kdrl_core.tables.schemas import LABELS
from kdrl_core.verify import Verifier

SETTINGS = "label.json"
_COUNTED = ["problem_id", "sample", "verdict", "accuracy_reward", "finish_reason", "length"]
MakeEngine = Callable[[LabelPlan, Path, Any], RolloutEngine]
Problem = dict[str, Any]
"""problem_id, question, answer, source, prompt and prompt_token_ids."""


def label_problems(
    plan: LabelPlan,
    output: Path,
    *,
    shard_problems: int = 64,
    keep_work: bool = False,
    on_progress: Progress | None = None,
    make_engine: MakeEngine | None = None,
) -> LabelSummary:
    """Measure the labels and write `plan.problems` with them; continue where an earlier call stopped.

    Args:
        shard_problems: problems sampled and published together.
        keep_work: leave the responses in `work_folder(output)`.
        on_progress: called with (responses done, responses in all), which include earlier calls.
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
    problems = _rendered(plan, tokenizer)
    settings = _settings(plan, path, problems.values(), shard_problems)
    with ExitStack() as stack:
        stack.enter_context(open_work(work, settings))
        job = SamplingJob(
            folder=work / "shards",
            inputs={SETTINGS: settings_hash(settings)},
            ground_truths={problem_id: problem["answer"] for problem_id, problem in problems.items()},
            samples=plan.num_samples,
            seed_names=(plan.recipe.seed, "label"),
            shard_prompts=shard_problems,
            name=lambda ids: f"problems {ids[0]} to {ids[-1]}",
            max_failed_share=plan.recipe.verification.max_failed_share,
            schema=LABELS,
            more_columns=lambda ids: {"problem_id": ids, "prompt": [problems[each]["prompt"] for each in ids]},
            load=partial(_load, plan, problems, partial(make_engine or recipe_engine, plan, path, tokenizer), stack),
        )
        shards = [read_table(shard, _COUNTED) for shard in job.run(on_progress)]
        samples = pa.concat_tables(shards) if shards else LABELS.empty_table()
        failures = _write(plan, output, samples, settings)
        if not keep_work:
            shutil.rmtree(work)
    return summarize_labels(
        plan.label, plan.num_samples, failures, samples, num_too_long=len(plan.todo) - len(problems)
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


def _load(
    plan: LabelPlan, problems: Mapping[str, Problem], make_engine: Callable[[], RolloutEngine], stack: ExitStack
) -> Sampler:
    verifier = stack.enter_context(Verifier(**plan.recipe.verification.pool_options))
    return Sampler(
        source=engine_source(stack.enter_context(closing(make_engine()))),
        verifier=verifier,
        judge=open_judge(plan.recipe, verifier, stack),
        asked={problem_id: (problem["question"], problem["source"]) for problem_id, problem in problems.items()},
        prompts={problem_id: problem["prompt_token_ids"] for problem_id, problem in problems.items()},
        think_opened=think_opened(next(iter(problems.values()))["prompt"], plan.recipe),
    )


def _rendered(plan: LabelPlan, tokenizer: Any) -> dict[str, Problem]:
    """The problems to sample by id, with their prompts; those whose prompt is too long are left out."""
    names = ["problem_id", "question", "answer", "source"]
    chosen = plan.problems.take(pa.array(plan.todo, pa.int64())).select(names).to_pylist()
    prompts = render_prompts([problem["question"] for problem in chosen], tokenizer, plan.recipe)
    return {
        problem["problem_id"]: {**problem, "prompt": prompt, "prompt_token_ids": token_ids}
        for problem, (prompt, token_ids) in zip(chosen, prompts, strict=True)
        if len(token_ids) <= plan.config.max_prompt_tokens
    }


def _settings(plan: LabelPlan, path: Path, problems: Collection[Problem], shard_problems: int) -> dict[str, Any]:
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
        "engine": recipe.rollout.engine,
        **reward_settings(recipe),
    }


def _write(plan: LabelPlan, output: Path, samples: pa.Table, settings: dict[str, Any]) -> list[int | None]:
    """Write the output atomically and return the failures of each row."""
    measured: Counter[str] = Counter()
    for problem_id, reward in zip(
        samples["problem_id"].to_pylist(), samples["accuracy_reward"].to_pylist(), strict=True
    ):
        measured[problem_id] += reward == 0.0
    labels: list[dict[str, int]] = []
    for problem_id, known in zip(
        plan.problems["problem_id"].to_pylist(), plan.problems["failures"].to_pylist(), strict=True
    ):
        labels.append(dict(known or []) | ({plan.label: measured[problem_id]} if problem_id in measured else {}))
    field = PROBLEM_SCHEMA.field("failures")
    column = pa.array([sorted(counts.items()) if counts else None for counts in labels], field.type)
    table = plan.problems.set_column(PROBLEM_SCHEMA.get_field_index("failures"), field, column)
    metadata = dict(plan.origins)
    if len(samples):
        metadata[f"{ORIGIN_KEY}{plan.label}".encode()] = json.dumps(settings, sort_keys=True).encode()
    replace_file(output, partial(write_table, table.replace_schema_metadata(metadata)))
    return [counts.get(plan.label) for counts in labels]


def work_folder(output: Path) -> Path:
    """Where the labelling that writes `output` works."""
    return output.with_name(f"{output.name}.work")


@contextmanager
def open_work(work: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Lock the work folder; it must be new, or begun with the same settings.

    Raises:
        RunLockedError: another process works in it.
        RunError: it was begun with other settings; each difference is named.
    """
    with hold_work(work, "label.lock", remedy="; wait for it, stop it, or give another output"):
        _bind(work, settings)
        yield


def _bind(work: Path, settings: dict[str, Any]) -> None:
    file = work / SETTINGS
    remedy = "give another --output, or delete the folder to begin again"
    if not file.exists():
        replace_file(file, (json.dumps(settings, indent=1, sort_keys=True) + "\n").encode())
        return
    try:
        found = read_json(file)
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read ({why(error)}); {remedy}") from error
    if not isinstance(found, dict):
        raise RunError(f"{file} holds no settings; {remedy}")
    names = sorted(name for name in {*found, *settings} if found.get(name) != settings.get(name))
    if names:
        shown = ", ".join(f"{name}: {found.get(name)} → {settings.get(name)}" for name in names)
        raise RunError(f"{work} was begun with other settings ({shown}); set them back, {remedy}")
