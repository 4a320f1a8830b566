"""{rollouts, teacher, reference, rewards}.parquet ─▶ update ─▶ update.parquet, metrics, checkpoint."""

from prefect import task

from kdrl_core.boxes.session import stage_session
from kdrl_core.boxes.step_end import StepSummary
from kdrl_core.boxes.update import update_step
from tasks.options import STEP_OPTIONS


@task(name="update", task_run_name="{stage}-{step:06d}-update", **{**STEP_OPTIONS, "retries": 0})
def update(run_dir: str, stage: str, step: int, scored: list[str], verdicts: str) -> StepSummary:
    """One optimiser step from published files; `scored` and `verdicts` are the files of the tasks before it."""
    return update_step(stage_session(run_dir, stage), step)
