"""What the stage flows share: opening a run by its folder, the frame of a stage's loop, and what follows each step.

Anyone who can start a deployment can choose `run_dir`, so it is checked.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows import alarms, shown
from flows.stopping import stop_if_cancelled
from kdrl_core.boxes.completion import require_trained
from kdrl_core.boxes.session import close_sessions
from kdrl_core.boxes.stage import StepSummary, open_stage
from kdrl_core.errors import RunError
from kdrl_core.ledger import Run, artifacts_root, checkpoint_label, open_run, run_lock
from kdrl_core.look.tracking import track
from tasks.boxes import evaluate
from tasks.secrets import register_blocks


def open_own_run(run_dir: str | Path) -> Run:
    """Open a run by its folder, which must lie in this worker's artifacts. Its recipe may name Prefect blocks. Raises
    RunError, before anything is written, if the folder lies elsewhere or `open_run` refuses it."""
    register_blocks()
    runs = artifacts_root() / "runs"
    folder = Path(run_dir).absolute()
    if folder.parent != runs:
        raise RunError(
            f"run_dir {str(run_dir)!r} is no run of {runs}; give the folder of one, "
            "or set KDRL_ARTIFACTS for the worker to the folder that has its runs/"
        )
    return open_run(folder.name)


@contextmanager
def stage_loop(run: Run, stage: str) -> Iterator[tuple[range, shown.StageProgress]]:
    """The stage's remaining steps, and its progress. The run is locked; at the end the stage must be trained."""
    with run_lock(run.paths.lock):
        steps = open_stage(run, stage)
        progress = shown.StageProgress(run, stage)
        alarms.stage_opened(run, stage, steps)
        try:
            yield steps, progress
        except Exception:  # under the lock still, so that a policy in memory is saved; an interrupt leaves that out
            close_sessions()
            raise
        close_sessions()
        require_trained(run, stage)
        progress.finish()


def step_ended(run: Run, stage: str, summary: StepSummary, progress: shown.StageProgress) -> None:
    """Show and track a published step, send its alarms, and evaluate its policy if that is due. Raises Stopped if the
    work is to stop here."""
    progress.step(summary)
    track(run)
    alarms.step_ended(run, stage, summary.alarms)
    stop_if_cancelled()
    if summary.checkpoint is not None:
        evaluate_if_due(run, stage, summary.step + 1, progress)


def evaluate_if_due(run: Run, stage: str, step: int, progress: shown.StageProgress) -> None:
    """Evaluate the policy after `step` updates; a resumed stage repeats an evaluation that was interrupted."""
    if step and run.recipe.evaluation.periodic and run.recipe.stage(stage).is_evaluation_due(step):
        label = checkpoint_label(stage, step)
        progress.evaluated(label, evaluate(str(run.paths.root), label, run.recipe.evaluation.periodic))
