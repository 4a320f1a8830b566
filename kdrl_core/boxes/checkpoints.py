"""Which checkpoints a stage has, where it goes on, and which are kept."""

from pathlib import Path

from kdrl_core.errors import RunError
from kdrl_core.ledger import Run, find_intact, find_own, is_published, retract
from kdrl_core.ledger.graph import CHECKPOINT
from kdrl_core.ledger.heal import ASIDE_PREFIX, forget
from kdrl_core.tables.metrics import rebuild_metrics

_NAMES = CHECKPOINT.glob.rpartition("/")[2]


def open_stage(run: Run, stage: str) -> range:
    """Make a stage ready to go on, and the steps that it still has to go through, as `remaining_steps`.

    A damaged checkpoint is set aside: the stage then goes on from the one before, or from its initial policy, and
    replays the updates since from their published rollouts. Checkpoints beyond the retention are deleted, which an
    interrupted run may not have come to; metrics that do not hold what the steps' manifests say are rebuilt.

    Raises:
        ForeignFileError: the latest checkpoint is whole, but not the one that the stage made.
        RunError: checkpoints are links out of the run.
    """
    _refuse_links(run, run.paths.checkpoint(stage, 0).parent)
    for path in _folders(run, stage).values():
        if not is_published(path):
            find_intact(path)
    while (step := latest_checkpoint(run, stage)) and find_own(run, run.paths.checkpoint(stage, step)) is None:
        pass  # it no longer counts
    prune_checkpoints(run, stage)
    rebuild_metrics(run, stage, num_steps=step)
    return remaining_steps(run, stage)


def checkpoint_steps(run: Run, stage: str) -> list[int]:
    """Steps of the published checkpoints of a stage, ascending."""
    return [step for step, path in _folders(run, stage).items() if is_published(path)]


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
    always kept. Returns the deleted. Raises RunError for checkpoints that are links out of the run."""
    config = run.recipe.stage(stage)
    _refuse_links(run, run.paths.checkpoint(stage, 0).parent)
    steps = checkpoint_steps(run, stage)
    keep = {*[step for step in steps if step != config.steps][-config.checkpoint.keep_last :], config.steps}
    if every := config.checkpoint.keep_every:
        keep |= {step for step in steps if step % every == 0}
    doomed = [step for step in steps if step not in keep]
    for step in doomed:
        retract(run.paths.checkpoint(stage, step))
    for step in _folders(run, stage, prefix=ASIDE_PREFIX):  # damaged ones that the stage has gone past
        if step not in keep and any(later > step for later in steps):
            forget(run.paths.checkpoint(stage, step))
    return doomed


def _folders(run: Run, stage: str, *, prefix: str = "") -> dict[int, Path]:
    """Step → what lies in the place of its checkpoint, published or not; with `prefix`, what was set aside."""
    found = {}
    for path in run.paths.checkpoint(stage, 0).parent.glob(f"{prefix}{_NAMES}"):
        node = CHECKPOINT.find(run.relative(path.with_name(path.name.removeprefix(prefix))))
        if node is not None and isinstance(node.at, int):
            found[node.at] = path
    return dict(sorted(found.items()))


def _refuse_links(run: Run, folder: Path) -> None:
    """Raise RunError if checkpoints lead out of the run: deleting them would delete what is not ours."""
    root = run.paths.root.resolve()
    for path in (folder, *folder.glob(_NAMES)):
        if not path.resolve().is_relative_to(root):
            raise RunError(
                f"{path} leads out of the run, to {path.resolve()}; checkpoints are deleted there by the retention, so "
                "move them into the run, or link the whole artifacts folder (KDRL_ARTIFACTS)"
            )
