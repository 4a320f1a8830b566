"""rollouts.parquet ─▶ verify ─▶ rewards.parquet."""

from prefect import task

from kdrl_core.boxes.session import stage_session
from kdrl_core.boxes.verify import verify_step
from tasks.options import STEP_OPTIONS


@task(name="verify", task_run_name="{stage}-{step:06d}-verify", **STEP_OPTIONS)
def verify(run_dir: str, stage: str, step: int) -> str:
    """Verify a step's responses. Returns the path of rewards.parquet."""
    return str(verify_step(stage_session(run_dir, stage), step).path)
