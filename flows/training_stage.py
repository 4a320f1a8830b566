"""The loop of every on-policy objective: rollout → {teacher-score, verify} → update → periodic evaluation.

Deployed as `kdrl-training-stage/training-stage`.
"""

from typing import Any

from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from flows import alarms, hooks, shown
from flows.periodic import evaluate_if_due
from flows.run_dir import open_own_run
from kdrl_core.boxes.checkpoints import open_stage
from kdrl_core.boxes.completion import require_trained
from kdrl_core.boxes.session import close_sessions
from kdrl_core.errors import RunError
from kdrl_core.ledger import run_lock
from kdrl_core.look.tracking import track
from tasks.boxes import rollout, teacher_score, update, verify

# Scoring and verification of a step run side by side. (Any: the decorator's stub wants an invariant type.)
_SCORE_AND_VERIFY: Any = ThreadPoolTaskRunner(max_workers=2)


@flow(
    name="kdrl-training-stage",
    flow_run_name=hooks.flow_run_name,
    task_runner=_SCORE_AND_VERIFY,
    on_failure=[hooks.on_failure],
)
def training_stage(run_dir: str, stage: str) -> None:
    """Train one stage of an existing run from its latest checkpoint to its last step."""
    run = open_own_run(run_dir)
    if run.recipe.stage(stage).objective == "sft":
        raise RunError(f"{stage}.objective=sft has a flow of its own; run it with kdrl-sft-stage/sft-stage")
    with run_lock(run.paths.lock):
        steps = open_stage(run, stage)
        progress = shown.StageProgress(run, stage)
        alarms.stage_opened(run, stage, steps)
        evaluate_if_due(run, stage, steps.start, progress)
        for step in steps:
            rollout(run_dir, stage, step)
            scored = teacher_score.submit(run_dir, stage, step)
            verdicts = verify.submit(run_dir, stage, step)
            summary = update(run_dir, stage, step, wait_for=[scored.result(), verdicts.result()])
            progress.step(summary)
            track(run)
            alarms.step_ended(run, stage, summary.alarms)
            evaluate_if_due(run, stage, step + 1, progress)
        close_sessions()
        require_trained(run, stage)
        progress.finish()
