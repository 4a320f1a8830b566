"""Which variants were trained alike: refused before a sweep that says `equal`, marked under the tables of every other.

A field counts where the variant's objective reads it: GRPO's β, which plain GRPO ignores, is never another one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kdrl_core.config import Recipe, StageConfig, did_you_mean, diff_recipes
from kdrl_core.config.changes import leaf_fields, leaves
from kdrl_core.errors import RecipeError

if TYPE_CHECKING:
    from kdrl_core.look.sweeps.grid import Grid
    from kdrl_core.look.sweeps.spec import Cell, SweepSpec

_READ: dict[str, Callable[[StageConfig], bool]] = {
    "beta": lambda stage: stage.scores_teacher,
    "kl_estimator": lambda stage: stage.scores_teacher,
    "kd_masking": lambda stage: stage.variant.is_masked,
    "topk": lambda stage: stage.scores_teacher and stage.needs_topk,
    "sft": lambda stage: stage.objective == "sft",
    "group_size": lambda stage: stage.objective != "sft",
    "prompts_per_step": lambda stage: stage.objective != "sft",
    "mini_batch_prompts": lambda stage: stage.objective != "sft",
}
"""Field → whether a stage reads it; the others are read by every stage."""
_TOLD = ("objective", "steps", "learning_rate", "kl_estimator", "kd_masking")
_NO_DIFFERENCE = ("name", "description", "seed")
_MARKED = {"steps": "{} steps", "learning_rate": "a learning rate of {:g}"}
"""Fields of the last stage that a table tells of if its rows differ in them."""


def require_equal(spec: "SweepSpec", grid: "Grid", cells: Sequence["Cell"], *, origin: str) -> None:
    """Raise RecipeError if two variants differ in a field that the sweep calls equal. What is varied may differ, since
    labels name it, and so may the fields that `unequal` names."""
    labels = list(dict.fromkeys(cell.label for cell in cells))
    for label, fields in spec.unequal.items():
        if label not in labels:
            raise RecipeError(f"sweep {origin}, field 'unequal': no variant '{label}'{did_you_mean(label, labels)}")
        if unknown := [field for field in fields if field not in spec.equal]:
            raise RecipeError(
                f"sweep {origin}, field 'unequal.{label}': '{unknown[0]}' is not in 'equal'; add it there"
            )
    for field in spec.equal:
        if field not in StageConfig.model_fields:
            near = did_you_mean(field, StageConfig.model_fields)
            raise RecipeError(f"sweep {origin}, field 'equal': a stage has no field '{field}'{near}")
        compared = [cell for cell in cells if field not in spec.unequal.get(cell.label, []) and _is_read(cell, field)]
        parts = {id(cell): _parts(cell, field) for cell in compared}
        for part in dict.fromkeys(path for one in parts.values() for path in one):
            alike = [cell for cell in compared if not _is_varied(grid, cell, part)]
            for cell in alike[1:]:
                there, here = (parts[id(one)].get(part) for one in (alike[0], cell))
                if there != here:
                    raise RecipeError(
                        f"sweep {origin}, variant '{cell.variant}', field '{cell.recipe.stages[-1]}.{part}': {here!r}, "
                        f"but {there!r} in variant '{alike[0].variant}', and the sweep says equal: [{field}]; correct "
                        f"one of them, or say so with unequal: {{{cell.label}: [{field}]}}"
                    )


def _parts(cell: "Cell", field: str) -> dict[str, Any]:
    """The parts of a field of the last stage, without the stage's name: `beta.init`."""
    return leaves(_last(cell.recipe).model_dump(mode="json")[field], f"{field}.")


def _is_read(cell: "Cell", field: str) -> bool:
    return not _is_ignored(f"{cell.recipe.stages[-1]}.{field}", cell.recipe)


def _is_varied(grid: "Grid", cell: "Cell", part: str) -> bool:
    varied = (*grid.vary, *grid.vary_each.get(cell.label, {}))
    return any(f"{cell.recipe.stages[-1]}.{part}.".startswith(f"{one}.") for one in varied)


def unequal_notes(recipes: Mapping[str, Recipe]) -> list[str]:
    """In what the rows of a table were not trained alike, a sentence for each field: `Not trained alike: GRPO with 460
    steps; the others with 280 steps.` Empty if they were. `recipes`: label → recipe."""
    notes = []
    for field, words in _MARKED.items():
        groups: dict[str, list[str]] = {}
        for label, recipe in recipes.items():
            groups.setdefault(words.format(getattr(_last(recipe), field)), []).append(label)
        if len(groups) < 2:
            continue
        most = max(groups, key=lambda value: len(groups[value]))
        rare = [f"{', '.join(labels)} with {value}" for value, labels in groups.items() if value != most]
        others = "the others" if len(groups[most]) > 1 else groups[most][0]
        notes.append(f"Not trained alike: {'; '.join(rare)}; {others} with {most}.")
    return notes


def differences(first: Recipe, recipe: Recipe) -> list[str]:
    """Fields in which a variant's recipe differs from the first variant's, except those that its objective ignores."""
    changes = diff_recipes(first, recipe)
    return [str(one) for one in changes if one.field not in _NO_DIFFERENCE and not _is_ignored(one.field, recipe)]


def last_stage_told(recipe: Recipe) -> list[str]:
    """What a variant is, in the fields of its last stage that variants mostly differ in."""
    stage, fields = recipe.stages[-1], leaf_fields(recipe)
    wanted = ("teacher.path", *(f"{stage}.{name}" for name in _TOLD))
    return [
        f"{name}: {value!r}"
        for name, value in fields.items()
        if (name in wanted or name.startswith(f"{stage}.beta.")) and not _is_ignored(name, recipe)
    ]


def _last(recipe: Recipe) -> StageConfig:
    return recipe.stage(recipe.stages[-1])


def _is_ignored(path: str, recipe: Recipe) -> bool:
    """Whether a field of a stage, or a part of one, is not read by the stage's objective."""
    stage, _, rest = path.partition(".")
    field = rest.split(".")[0]
    return stage in recipe.stages and field in _READ and not _READ[field](recipe.stage(stage))
