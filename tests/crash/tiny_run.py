"""A run of seconds through `kdrl_core.boxes` alone, without Prefect."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
from support import benchmarks

from kdrl_core.boxes.completion import student
from kdrl_core.boxes.evaluate import evaluate_model
from kdrl_core.boxes.filter import filter_run
from kdrl_core.boxes.make import make
from kdrl_core.boxes.session import close_sessions, stage_session
from kdrl_core.boxes.stage import open_stage
from kdrl_core.boxes.step import rollout, score_step, update_step, verify
from kdrl_core.config import load_recipe, resolve_path
from kdrl_core.errors import Stopped
from kdrl_core.labelling import LabelOptions, label_problems, plan_labels
from kdrl_core.ledger import Run, create_run, run_lock, sweep_temporaries
from kdrl_core.ledger.graph import evaluated_labels
from kdrl_core.ledger.lock import stop_if_requested
from kdrl_core.look.reporting.run_report import report
from kdrl_core.look.rollouts.query import RolloutStore

TINY = [
    "stage1.steps=2",
    "stage2.steps=4",
    *(
        f"{stage}.{setting}"
        for stage in ("stage1", "stage2")
        for setting in (
            "prompts_per_step=4",
            "mini_batch_prompts=4",
            "group_size=4",
            "max_response_tokens=24",
            "evaluate_every=null",
            "data.max_problems=48",
        )
    ),
    benchmarks("test", "hard", "validation", samples=2, max_problems=6),
    "evaluation.max_context_tokens=40",
    "alarms.clip_ratio.above=0.1",  # so that there are some alarms, which count among the results
    "alarms.clip_ratio.patience=1",
]
"""Overrides that make the miniature a matter of seconds."""


WORKERS_TIMEOUT_S = 2.0


def for_workers(folder: Path) -> list[str]:
    """Overrides with which every answer needs a worker to be judged: 7 is written as 14/2 in the problems' answers."""
    problems = json.loads(resolve_path("builtin:miniature/stage1.json").read_text())
    for problem in problems:
        problem["answer"] = rf"\frac{{{2 * int(problem['answer'])}}}{{2}}"
    (file := folder / "problems.json").write_text(json.dumps(problems))
    fields = (f"files=['{file}']", "format=auto", "missing_labels=keep")
    stages = [f"{stage}.data.{field}" for stage in ("stage1", "stage2") for field in fields]
    return [*stages, f"verification.timeout_s={WORKERS_TIMEOUT_S}"]


def label(run: Run) -> Path:
    """Measure a label beside the run, in shards, with journals."""
    output = run.paths.root.parent.parent / "labels.parquet"
    plan = plan_labels(run.recipe, ["builtin:miniature/stage1.json"], LabelOptions(stage="stage1", max_problems=12))
    if not output.exists():
        label_problems(plan, output, shard_problems=4)
    return output


def figures(run: Run) -> list[dict[str, object]]:
    """What the index of the rollouts says of every step, times left out."""
    with RolloutStore.open([run.paths.root]) as store:
        assert not store.damaged
        steps = store.steps()
    for step in steps:
        metrics = step["metrics"]
        step["metrics"] = {n: v for n, v in metrics.items() if not n.startswith(("time/", "throughput/", "sync/"))}
    return steps


def open_tiny(artifacts: Path, name: str, overrides: Sequence[str] = ()) -> Run:
    """Create or open a tiny run; sessions of an earlier opening are closed."""
    close_sessions()
    return create_run(name, load_recipe("miniature", [*TINY, *overrides]), artifacts=artifacts)


def train_step(run: Run, stage: str, step: int) -> None:
    """One step of the loop, as `flows.training_stage` has it."""
    session = stage_session(run.paths.root, stage)
    make(session, rollout, step)
    score_step(session, step)
    make(session, verify, step)
    update_step(session, step)


def train(run: Run, *, until: tuple[str, int] | None = None) -> None:
    """Filter and train every stage; at step `until` = (stage, step) drop the sessions instead, as a crash does."""
    with run_lock(run.paths.lock):
        sweep_temporaries(run.paths.root)
        filter_run(run)
        for stage in run.recipe.stages:
            for step in open_stage(run, stage):
                if (stage, step) == until:
                    close_sessions()
                    return
                train_step(run, stage, step)
                try:
                    stop_if_requested()
                except Stopped:
                    close_sessions()
                    raise
        close_sessions()


def finish(run: Run) -> None:
    """Evaluate the final models, export the student, write the report."""
    for label in evaluated_labels(run.recipe):
        evaluate_model(run, label)
    make(run, student)
    make(run, report)


def results(run: Run) -> dict[str, str]:
    """Path → sha256 of everything that a rerun reproduces bit by bit: data, weights and trainer state."""
    patterns = ("*.parquet", "*.safetensors", "checkpoints/*/*/trainer/*", "data/filter.json")
    files = {file for pattern in patterns for file in run.paths.root.rglob(pattern)}
    return {
        file.relative_to(run.paths.root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(files)
        if file.name != "timings.parquet" and not any(p[0] == "." for p in file.relative_to(run.paths.root).parts)
    }


def differing(left: Run, right: Run) -> list[str]:
    """Result files that are not the same bytes in both runs, or are in one alone."""
    ours, theirs = results(left), results(right)
    return sorted(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))


def rows(path: Path) -> list[dict[str, object]]:
    """A Parquet file as dicts, without partition columns."""
    return pq.ParquetFile(path).read().to_pylist()
