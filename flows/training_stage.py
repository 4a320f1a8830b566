"""The loop of every on-policy objective: rollout → {teacher-score, verify} → update → periodic evaluation.

Deployed as `kdrl-training-stage/training-stage`.
"""

from typing import Any

from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from flows import hooks
from flows.stage_flows import evaluate_if_due, open_own_run, stage_loop, step_ended
from flows.stopping import stoppable
from kdrl_core.errors import RunError
from tasks.boxes import rollout, teacher_score, update, verify

# Scoring and verification of a step run side by side. (Any: the decorator's stub wants an invariant type.)
_SCORE_AND_VERIFY: Any = ThreadPoolTaskRunner(max_workers=2)


@flow(
    name="kdrl-training-stage",
    flow_run_name=hooks.flow_run_name,
    task_runner=_SCORE_AND_VERIFY,
    on_failure=[hooks.on_failure],
)
@stoppable
def training_stage(run_dir: str, stage: str) -> None:
    """Train one stage of an existing run from its latest checkpoint to its last step."""
    run = open_own_run(run_dir)
    if run.recipe.stage(stage).objective == "sft":
        raise RunError(f"{stage}.objective=sft has a flow of its own; run it with kdrl-sft-stage/sft-stage")
    with stage_loop(run, stage) as (steps, progress):
        evaluate_if_due(run, stage, steps.start, progress)
        for step in steps:
            rollout(run_dir, stage, step)
            scored = teacher_score.submit(run_dir, stage, step)
            verdicts = verify.submit(run_dir, stage, step)
            summary = update(run_dir, stage, step, wait_for=[scored.result(), verdicts.result()])
            step_ended(run, stage, summary, progress)
