"""Which checkpoints a stage has, where it goes on, and which are kept."""

import re
import shutil

from kdrl_core.ledger import Run, is_published

_NAME = re.compile(r"step-(\d{6,})")


def checkpoint_steps(run: Run, stage: str) -> list[int]:
    """Steps of the published checkpoints of a stage, ascending."""
    folder = run.paths.checkpoint(stage, 0).parent
    found = [(_NAME.fullmatch(path.name), path) for path in folder.glob("step-*")]
    return sorted(int(match[1]) for match, path in found if match and is_published(path))


def latest_checkpoint(run: Run, stage: str) -> int:
    """Updates behind the latest checkpoint; 0 is the stage's initial policy, which is not copied."""
    return max(checkpoint_steps(run, stage), default=0)


def remaining_steps(run: Run, stage: str) -> range:
    """The steps that a stage still has to go through, from its latest checkpoint on.

    Steps whose files are already published are gone through as well, to replay their updates from them.
    """
    return range(latest_checkpoint(run, stage), run.recipe.stage(stage).steps)


def is_checkpoint_due(run: Run, stage: str, step: int) -> bool:
    """Whether the policy after `step` updates is to be published."""
    config = run.recipe.stage(stage)
    due = step % config.checkpoint.every == 0 or step == config.steps
    return due or config.is_evaluation_due(step)


def prune_checkpoints(run: Run, stage: str) -> list[int]:
    """Delete checkpoints beyond the recipe's retention, which counts those before the stage's last step; that one is
    always kept. Returns the deleted."""
    config = run.recipe.stage(stage)
    steps = checkpoint_steps(run, stage)
    keep = {*[step for step in steps if step != config.steps][-config.checkpoint.keep_last :], config.steps}
    if every := config.checkpoint.keep_every:
        keep |= {step for step in steps if step % every == 0}
    for path in run.paths.checkpoint(stage, 0).parent.glob("step-*"):
        if not is_published(path):  # what a deletion that was interrupted left
            shutil.rmtree(path)
    doomed = [step for step in steps if step not in keep]
    for step in doomed:
        path = run.paths.checkpoint(stage, step)
        (path / "manifest.json").unlink()  # first: without it the rest does not count
        shutil.rmtree(path)
    return doomed
