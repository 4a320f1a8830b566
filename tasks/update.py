"""{rollouts, teacher, reference, rewards}.parquet ─▶ update ─▶ update.parquet, metrics, checkpoint."""

from typing import TypeAlias, TypeVar

from prefect import task
from prefect.futures import PrefectFuture

from kdrl_core.steps.session import stage_session
from kdrl_core.steps.update import StepSummary, update_step
from tasks.options import STEP_OPTIONS

T = TypeVar("T")
Pending: TypeAlias = T | PrefectFuture[T]
"""A value, or the future of the task that makes it: Prefect waits for it and draws the arrow."""


@task(name="update", task_run_name="{stage}-{step:06d}-update", **{**STEP_OPTIONS, "retries": 0})
def update(run_dir: str, stage: str, step: int, scored: Pending[list[str]], verdicts: Pending[str]) -> StepSummary:
    """One optimiser step from published files; `scored` and `verdicts` are the files it waits for."""
    return update_step(stage_session(run_dir, stage), step)
