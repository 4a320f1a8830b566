"""Periodic evaluation while a stage trains."""

from flows import shown
from kdrl_core.ledger import Run, checkpoint_label
from tasks.boxes import evaluate


def evaluate_if_due(run: Run, stage: str, step: int, progress: shown.StageProgress) -> None:
    """Evaluate the policy after `step` updates; a resumed stage makes up for one that was interrupted."""
    if step and run.recipe.evaluation.periodic and run.recipe.stage(stage).is_evaluation_due(step):
        label = checkpoint_label(stage, step)
        progress.evaluated(label, evaluate(str(run.paths.root), label, run.recipe.evaluation.periodic))
