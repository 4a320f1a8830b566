"""prompts ─▶ rollout ─▶ rollouts.parquet."""

from prefect import task

from kdrl_core.boxes.rollout import rollout_step
from kdrl_core.boxes.session import stage_session
from tasks.options import STEP_OPTIONS


@task(name="rollout", task_run_name="{stage}-{step:06d}-rollout", **STEP_OPTIONS)
def rollout(run_dir: str, stage: str, step: int) -> str:
    """Sample a step's responses. Returns the path of rollouts.parquet."""
    return str(rollout_step(stage_session(run_dir, stage), step).path)
