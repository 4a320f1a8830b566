"""What a sweep varies: fields of every cell, variants, and values of which every combination is run."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

_OWN_FIELDS = ("seed", "name", "description")
"""Recipe fields that a sweep sets itself."""
_MAX_SEEDS = 1_000

FieldPath = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*$")]
Label = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f|]*[A-Za-z0-9][^\x00-\x1f\x7f|]*$", max_length=60)]
Values = dict[FieldPath, Any]
Several = dict[FieldPath, Annotated[list[Any], Field(min_length=1)]]
Seeds = int | list[int]
STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)


class Grid(BaseModel):
    """What is varied, and what is set in every cell."""

    model_config = STRICT

    set: Values = Field({}, description="fields of every cell")
    variants: dict[Label, Values] = Field({}, description="label → fields that make the variant")
    vary: Several = Field({}, description="field → its values; every combination is run, of every variant")
    vary_each: dict[Label, Several] = Field({}, description="variant → the same, of this variant alone")

    @field_validator("set", "variants", "vary", "vary_each")
    @classmethod
    def _leave_own_fields(cls, fields: Mapping[str, Any], info: ValidationInfo) -> Mapping[str, Any]:
        sections = fields.values() if info.field_name in ("variants", "vary_each") else [fields]
        if taken := [name for section in sections for name in section if name in _OWN_FIELDS]:
            raise ValueError(f"{taken[0]} is set by the sweep itself; give seeds by `seeds`, labels by `variants`")
        return fields


class RecipeGrid(Grid):
    """The same for one recipe; its values override the general ones."""

    seeds: Seeds | None = Field(None, description="number or list of seeds; default: the sweep's")

    @field_validator("seeds")
    @classmethod
    def _some_seeds(cls, seeds: Seeds | None) -> Seeds | None:
        return None if seeds is None else checked_seeds(seeds)


def checked_seeds(seeds: Seeds) -> Seeds:
    """The seeds. Raises ValueError if there are none, or too many, or one stands twice."""
    if isinstance(seeds, int) and not 1 <= seeds <= _MAX_SEEDS:
        raise ValueError(f"{seeds} seeds; give 1 to {_MAX_SEEDS}, or the list of them")
    if isinstance(seeds, list) and (not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0):
        raise ValueError("seeds are different numbers from 0 on; correct the list")
    return seeds


def listed_seeds(seeds: Seeds) -> list[int]:
    """The seeds as a list: a number of seeds counts from 0."""
    return seeds if isinstance(seeds, list) else list(range(seeds))


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge layers in order. A field moves to the end when it is set again, so that the last value wins, also where
    one field lies within another."""
    found: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            found.pop(name, None)
            found[name] = value
    return found
