"""pool ─▶ teacher-sample ─▶ verify ─▶ select ─▶ dataset.parquet ─▶ sft-update ─▶ update.parquet, checkpoint."""

from prefect import task

from kdrl_core.boxes.sample import sample_shard, select_samples, verify_shard
from kdrl_core.boxes.session import stage_session
from kdrl_core.boxes.sft import sft_step
from kdrl_core.boxes.step_end import StepSummary
from tasks.options import STEP_OPTIONS


@task(name="teacher-sample", task_run_name="{stage}-shard-{shard:06d}-teacher-sample", **STEP_OPTIONS)
def teacher_sample(run_dir: str, stage: str, shard: int) -> str:
    """Sample the teacher on a shard of the pool. Returns the path of rollouts.parquet."""
    return str(sample_shard(stage_session(run_dir, stage), shard).path)


@task(name="verify-samples", task_run_name="{stage}-shard-{shard:06d}-verify", **STEP_OPTIONS)
def verify_samples(run_dir: str, stage: str, shard: int) -> str:
    """Verify a shard's responses. Returns the path of rewards.parquet."""
    return str(verify_shard(stage_session(run_dir, stage), shard).path)


@task(name="select", task_run_name="{stage}-select", **STEP_OPTIONS)
def select(run_dir: str, stage: str) -> str:
    """Keep the right responses. Returns the path of dataset.parquet."""
    return str(select_samples(stage_session(run_dir, stage)).path)


@task(name="sft-update", task_run_name="{stage}-{step:06d}-sft-update", **{**STEP_OPTIONS, "retries": 0})
def sft_update(run_dir: str, stage: str, step: int) -> StepSummary:
    """One optimiser step on kept responses."""
    return sft_step(stage_session(run_dir, stage), step)
