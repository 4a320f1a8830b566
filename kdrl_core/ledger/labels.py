"""Which models a run evaluates at its end, by their labels."""

from kdrl_core.config import Recipe
from kdrl_core.ledger.run import Run


def final_labels(run: Run) -> list[str]:
    """Labels of the final evaluation: the student before, after each stage, and the teacher."""
    return evaluated_labels(run.recipe)


def evaluated_labels(recipe: Recipe) -> list[str]:
    """`final_labels` of a run of `recipe`."""
    return ["base", *recipe.stages, *(["teacher"] if recipe.teacher is not None else [])]


def reference_labels(recipe: Recipe) -> list[str]:
    """What a run of `recipe` evaluates beside the model that it makes."""
    return [label for label in evaluated_labels(recipe) if label != recipe.stages[-1]]
