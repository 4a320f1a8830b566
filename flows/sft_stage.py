"""SFT by rejection sampling (B.2): teacher samples → verify → select → SFT → periodic evaluation.

Deployed as `kdrl-sft-stage/sft-stage`.
"""

from prefect import flow

from flows import hooks
from flows.stage_flows import evaluate_if_due, open_own_run, stage_loop, step_ended
from flows.stopping import stop_if_cancelled, stoppable
from kdrl_core.boxes.shards import num_shards, open_shards
from kdrl_core.errors import RunError
from tasks.boxes import select, sft_update, teacher_sample, verify_samples


@flow(name="kdrl-sft-stage", flow_run_name=hooks.flow_run_name, on_failure=[hooks.on_failure])
@stoppable
def sft_stage(run_dir: str, stage: str) -> None:
    """Sample what is missing, then train an SFT stage from its latest checkpoint to its last step."""
    run = open_own_run(run_dir)
    if (objective := run.recipe.stage(stage).objective) != "sft":
        raise RunError(f"{stage}.objective={objective} is no SFT; run it with kdrl-training-stage/training-stage")
    with stage_loop(run, stage) as (steps, progress):
        for shard in open_shards(run, stage):
            teacher_sample(run_dir, stage, shard)
            verify_samples(run_dir, stage, shard)
            progress.sampled(shard + 1, num_shards(run, stage))
            stop_if_cancelled()
        select(run_dir, stage)
        progress.selected()
        evaluate_if_due(run, stage, steps.start, progress)
        for step in steps:
            step_ended(run, stage, sft_update(run_dir, stage, step), progress)
