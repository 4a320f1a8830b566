"""rollouts.parquet ─▶ teacher-score ─▶ teacher.parquet, reference.parquet."""

from prefect import task

from kdrl_core.boxes.score import score_step
from kdrl_core.boxes.session import stage_session
from tasks.options import STEP_OPTIONS


@task(name="teacher-score", task_run_name="{stage}-{step:06d}-teacher-score", **STEP_OPTIONS)
def teacher_score(run_dir: str, stage: str, step: int) -> list[str]:
    """Score a step's responses with the frozen models that the objective needs. Returns the files."""
    return [str(artifact.path) for artifact in score_step(stage_session(run_dir, stage), step)]
