"""Which models a run evaluates, by their labels: `base`, `stage1`, `stage2`, `teacher`, `stage2-step-000012`."""

from typing import TYPE_CHECKING

from kdrl_core.config import Recipe
from kdrl_core.ledger.artifact import Artifact, Node

if TYPE_CHECKING:
    from kdrl_core.ledger.run import Run

_OF_CHECKPOINT = Artifact(name="label", pattern="{stage}-step-{step:06d}")


def final_labels(run: "Run") -> list[str]:
    """Labels of the final evaluation: the student before, after each stage, and the teacher."""
    return evaluated_labels(run.recipe)


def evaluated_labels(recipe: Recipe) -> list[str]:
    """`final_labels` of a run of `recipe`."""
    return ["base", *recipe.stages, *(["teacher"] if recipe.teacher is not None else [])]


def reference_labels(recipe: Recipe) -> list[str]:
    """What a run of `recipe` evaluates beside the model that it makes."""
    return [label for label in evaluated_labels(recipe) if label != recipe.stages[-1]]


def checkpoint_label(stage: str, step: int) -> str:
    """Label of a checkpoint's evaluation."""
    return _OF_CHECKPOINT.place(stage, step)


def checkpoint_step(label: str, stage: str) -> int | None:
    """The step of `checkpoint_label`; None for any other label."""
    found = labelled_checkpoint(label)
    return found[1] if found is not None and found[0] == stage else None


def labelled_checkpoint(label: str) -> tuple[str, int] | None:
    """Stage and step of `checkpoint_label`; None for any other label."""
    match _OF_CHECKPOINT.find(label):
        case Node(stage=str(stage), at=int(step)):
            return stage, step
    return None
