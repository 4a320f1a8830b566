"""The boxes of the DAG as Prefect tasks, from one factory: plain values in, plain values out.

The name of a task run is a template over the task's parameters: `stage`, and `at`, its step or shard.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from prefect import Task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import TaskRun
from prefect.states import Cancelled, State

from kdrl_core.boxes import completion, sft, step
from kdrl_core.boxes.evaluate import evaluate_model
from kdrl_core.boxes.filter import filter_run
from kdrl_core.boxes.make import Box, make
from kdrl_core.boxes.session import StageSession, stage_session
from kdrl_core.boxes.sharing import adopt_parts
from kdrl_core.boxes.step import update_step
from kdrl_core.errors import Stopped
from kdrl_core.ledger import Run, open_run_dir
from kdrl_core.ledger.lock import stop_if_requested
from kdrl_core.look.reporting.run_report import report as report_box

R = TypeVar("R")


def is_transient(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Whether another try may help: a dropped connection may come back, a bad recipe does not get better."""
    try:
        state.result()
    except (ConnectionError, TimeoutError):
        return True
    except BaseException:
        return False
    return False


STEP_OPTIONS: dict[str, Any] = {
    # The ledger on disk decides what is done: Prefect's cache remembers return values, not files.
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "retries": 2,
    "retry_delay_seconds": [1, 10],
    "retry_condition_fn": is_transient,
}


def stage_task(
    name: str, work: Callable[[StageSession, Any], R], *, run_name: str | None = None, **options: Any
) -> Task[..., R]:
    """A task `(run_dir, stage, at)` that does `work` with the stage's session.

    Args:
        run_name: default: `<stage>-<step>-<name>`.
        options: options of the task; they override `STEP_OPTIONS`.
    """

    def body(run_dir: str, stage: str, at: int | None = None) -> R:
        return work(stage_session(run_dir, stage), at)

    return _task(body, name, run_name or f"{{stage}}-{{at:06d}}-{name}", **options)


def run_task(name: str, work: Callable[[Run], R]) -> Task[..., R]:
    """A task `(run_dir)` that does `work` with the run."""

    def body(run_dir: str) -> R:
        return work(open_run_dir(run_dir))

    return _task(body, name, name)


def making(box: Box) -> Callable[..., str]:
    """Work that makes a box's artifact. Returns its path."""

    def work(session: StageSession | Run, at: int | None = None) -> str:
        return str(make(session, box, at).path)

    return work


class _StoppableTask(Task[..., R]):
    """A task that was stopped raises Stopped where it is called; Prefect would return its state as the result."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(result := super().__call__(*args, **kwargs), State):
            raise Stopped(result.message)
        return result


def _task(body: Callable[..., R], name: str, run_name: str, **options: Any) -> Task[..., R]:
    @functools.wraps(body)
    def stoppable(*args: Any, **kwargs: Any) -> Any:
        """The work, or the state Cancelled if this process is to stop: then nothing new is begun."""
        try:
            stop_if_requested()
            return body(*args, **kwargs)
        except Stopped as stop:
            return Cancelled(message=str(stop), data=stop)

    stoppable.__qualname__ = stoppable.__name__ = name  # Prefect tells tasks of one file apart by this
    return _StoppableTask(stoppable, name=name, task_run_name=run_name, **{**STEP_OPTIONS, **options})


def _scored(session: StageSession, at: int) -> list[str]:
    return [str(made.path) for made in step.score_step(session, at)]


def _filtered(run: Run) -> dict[str, str]:
    return {stage: report.to_text() for stage, report in filter_run(run).items()}


filter_problems = run_task("filter", _filtered)
"""Filter the problems of every stage. Returns the filter's table per stage; empty if the pool exists already."""

rollout = stage_task("rollout", making(step.rollout))
teacher_score = stage_task("teacher-score", _scored)
verify = stage_task("verify", making(step.verify))
update = stage_task("update", update_step, retries=0)
"""One optimiser step from the files of a step. It is never tried again: the trainer in memory may have made it."""

teacher_sample = stage_task(
    "teacher-sample", making(sft.teacher_sample), run_name="{stage}-shard-{at:06d}-teacher-sample"
)
verify_samples = stage_task("verify-samples", making(sft.verify_samples), run_name="{stage}-shard-{at:06d}-verify")
select = stage_task("select", making(sft.select), run_name="{stage}-select")
sft_update = stage_task("sft-update", sft.sft_step, retries=0)

export = run_task("export-student", making(completion.student))
report = run_task("report", making(report_box))


def _evaluated(run_dir: str, label: str, benchmarks: list[str] | None = None) -> dict[str, Any]:
    return evaluate_model(open_run_dir(run_dir), label, benchmarks)


def _adopted(run_dir: str, donors: list[str]) -> dict[str, str]:
    return adopt_parts(open_run_dir(run_dir), donors)


evaluate = _task(_evaluated, "evaluate", "evaluate-{label}")
"""Evaluate `base`, `teacher`, a stage's result or a checkpoint: `(run_dir, label, benchmarks)`. Returns its results."""

adopt_from = _task(_adopted, "adopt", "adopt")
"""Take over the parts that other runs have finished: `(run_dir, donors)`. Returns part → the run that it came from."""


def adopt(run_dir: str, donors: Sequence[str] | None) -> None:
    """Take over the parts that `donors` have finished and the run has not. Without donors no task runs."""
    if donors:
        adopt_from(run_dir, list(donors))
