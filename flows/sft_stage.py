"""SFT by rejection sampling (B.2): teacher samples → verify → select → SFT → periodic evaluation.

Deployed as `kdrl-sft-stage/sft-stage`.
"""

from prefect import flow

from flows import alarms, hooks, shown
from flows.periodic import evaluate_if_due
from flows.run_dir import open_own_run
from kdrl_core.boxes.checkpoints import open_stage
from kdrl_core.boxes.completion import require_trained
from kdrl_core.boxes.session import close_sessions
from kdrl_core.boxes.shards import num_shards, open_shards
from kdrl_core.errors import RunError
from kdrl_core.ledger import run_lock
from kdrl_core.look.tracking import track
from tasks.boxes import select, sft_update, teacher_sample, verify_samples


@flow(name="kdrl-sft-stage", flow_run_name=hooks.flow_run_name, on_failure=[hooks.on_failure])
def sft_stage(run_dir: str, stage: str) -> None:
    """Sample what is missing, then train an SFT stage from its latest checkpoint to its last step."""
    run = open_own_run(run_dir)
    if (objective := run.recipe.stage(stage).objective) != "sft":
        raise RunError(f"{stage}.objective={objective} is no SFT; run it with kdrl-training-stage/training-stage")
    with run_lock(run.paths.lock):
        steps = open_stage(run, stage)
        progress = shown.StageProgress(run, stage)
        alarms.stage_opened(run, stage, steps)
        for shard in open_shards(run, stage):
            teacher_sample(run_dir, stage, shard)
            verify_samples(run_dir, stage, shard)
            progress.sampled(shard + 1, num_shards(run, stage))
        select(run_dir, stage)
        progress.selected()
        evaluate_if_due(run, stage, steps.start, progress)
        for step in steps:
            summary = sft_update(run_dir, stage, step)
            progress.step(summary)
            track(run)
            alarms.step_ended(run, stage, summary.alarms)
            evaluate_if_due(run, stage, step + 1, progress)
        close_sessions()
        require_trained(run, stage)
        progress.finish()
