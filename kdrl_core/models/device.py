"""Where models run."""

from kdrl_core.config import Recipe
from kdrl_core.errors import RecipeError


def check_device(recipe: Recipe) -> None:
    """Raise RecipeError if the recipe asks for a GPU that is not there."""
    if recipe.runtime.device == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        raise RecipeError(
            f"recipe {recipe.name}, field 'runtime.device': cuda is asked for, but torch sees no GPU; "
            "set runtime.device=cpu or install a CUDA build of torch"
        )
