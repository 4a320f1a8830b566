"""Sweeps as YAML: variants and a grid over recipe fields, times seeds; shipped by name or read from a file.

name: figure4
recipe: miniature            # --recipe takes another
seeds: 3                     # 0, 1, 2; or a list
set: {stage2.steps: 80}      # of every cell
variants:                    # label → fields that make it
  KDRL: {stage2.beta: {init: 0.2}}
vary:                        # every combination, of every variant
  stage2.learning_rate: [1.0e-4, 3.0e-4]
recipes:                     # values that depend on the recipe, by its name: the same three sections, on top
  paper-1.5b: {variants: {KDRL: {stage2.beta: {init: 2.0e-3}}}}
claims:                      # what the table judges: holds, does not hold, unclear
  - {text: the joint loss beats GRPO, source: Sec. 3.1, more: KDRL, less: GRPO, measure: "accuracy:test"}
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from kdrl_core.config import Recipe, did_you_mean, read_fields
from kdrl_core.config.alarms import AlarmMetric
from kdrl_core.config.load import RECIPES_DIR
from kdrl_core.errors import RecipeError

SWEEPS_DIR = RECIPES_DIR.parent / "sweeps"
_OWN_FIELDS = ("seed", "name", "description")
"""Recipe fields that a sweep sets itself."""
_MAX_SEEDS = 1_000
ACCURACY, LENGTH = "accuracy", "length"
"""Measures of a claim that are not metrics."""
CLAIM_METRICS = (
    *get_args(AlarmMetric),
    *("beta", "optim/learning_rate", "ratio/mean", "ratio/clipped_frac", "sft/epoch"),
)
"""Metrics of a step that a claim may be about; `time/…` and `throughput/…` as well."""

FieldPath = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*$")]
Label = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f|]*[A-Za-z0-9][^\x00-\x1f\x7f|]*$", max_length=60)]
Values = dict[FieldPath, Any]


class Grid(BaseModel):
    """What is varied, and what is set in every cell."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    set: Values = Field({}, description="fields of every cell")
    variants: dict[Label, Values] = Field({}, description="label → fields that make the variant")
    vary: dict[FieldPath, Annotated[list[Any], Field(min_length=1)]] = Field(
        {}, description="field → its values; every combination is run, of every variant"
    )

    @field_validator("set", "variants", "vary")
    @classmethod
    def _leave_own_fields(cls, fields: Mapping[str, Any], info: ValidationInfo) -> Mapping[str, Any]:
        sections = fields.values() if info.field_name == "variants" else [fields]
        if taken := [name for section in sections for name in section if name in _OWN_FIELDS]:
            raise ValueError(f"{taken[0]} is set by the sweep itself; give seeds by `seeds`, labels by `variants`")
        return fields


class Claim(BaseModel):
    """The claim that one variant or reference model has more of a quantity than another."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    text: str = Field(min_length=1, max_length=200, description="the claim in words")
    source: str = Field("", description="where it is made: Sec. 3.1")
    more: str = Field(min_length=1, description="variant, or a model for reference as the table calls it")
    less: str = Field(min_length=1, description="likewise")
    expected: Literal["holds", "does not hold", "unclear"] = Field(
        "holds", description="what the source says; unclear: no difference to speak of"
    )
    measure: str = Field(
        min_length=1,
        description="accuracy:BENCHMARK, length (tokens of the final answers), or a metric of the last stage, which is "
        "its mean over the last fifth of the steps",
    )


class SweepSpec(Grid):
    """A sweep, as its file describes it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=60, description="also that of its folder")
    description: str = ""
    recipe: str = Field("miniature", min_length=1, description="name of a shipped recipe, or path of a YAML file")
    seeds: int | list[int] = Field(1, description="how many, counted from 0, or which")
    recipes: dict[str, Grid] = Field({}, description="recipe's name → values that are its own, on top of the others")
    claims: list[Claim] = Field([], description="what the report judges by the runs")

    @field_validator("seeds")
    @classmethod
    def _some_seeds(cls, seeds: int | list[int]) -> int | list[int]:
        if isinstance(seeds, int) and not 1 <= seeds <= _MAX_SEEDS:
            raise ValueError(f"{seeds} seeds; give 1 to {_MAX_SEEDS}, or the list of them")
        if isinstance(seeds, list) and (not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0):
            raise ValueError("seeds are different numbers from 0 on; correct the list")
        return seeds

    @model_validator(mode="after")
    def _varies(self) -> Self:
        grids: list[Grid] = [self, *self.recipes.values()]
        if not any(grid.variants or grid.vary for grid in grids):
            raise ValueError("nothing is varied; give `variants`, `vary` or both")
        return self

    @property
    def seed_list(self) -> list[int]:
        """The seeds themselves."""
        return self.seeds if isinstance(self.seeds, list) else list(range(self.seeds))

    def grid_for(self, recipe: Recipe, *, origin: str) -> Grid:
        """What this sweep varies in a recipe: the general values, overridden by those for the recipe's name.

        Raises:
            RecipeError: the sweep has values by recipe, but none for this one.
        """
        if not self.recipes:
            return Grid(set=self.set, variants=self.variants, vary=self.vary)
        if recipe.name not in self.recipes:
            raise RecipeError(
                f"sweep {origin}, field 'recipes': it has values for {', '.join(self.recipes)}, and none for recipe "
                f"{recipe.name}; add recipes.{recipe.name} to a copy of the file (kdrl sweep show {self.name} --yaml)"
            )
        own = self.recipes[recipe.name]
        labels = dict.fromkeys([*self.variants, *own.variants])
        return Grid(
            set={**self.set, **own.set},
            variants={label: {**self.variants.get(label, {}), **own.variants.get(label, {})} for label in labels},
            vary={**self.vary, **own.vary},
        )


def list_sweeps() -> list[str]:
    """Names of the sweeps that are shipped."""
    return sorted(path.stem for path in SWEEPS_DIR.glob("*.yaml"))


def load_sweep(source: str | Path) -> SweepSpec:
    """Read and validate a sweep: the name of a shipped one, or the path of a YAML file.

    Raises:
        RecipeError: there is none, or a field is unknown, missing or of the wrong kind; file and field are named. What
            it sets in recipes is validated by `expand`.
    """
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        if str(source) not in list_sweeps():
            raise RecipeError(
                f"no sweep '{source}'{did_you_mean(str(source), list_sweeps())}; shipped: {', '.join(list_sweeps())}, "
                "or give the path of a .yaml file"
            )
        path = SWEEPS_DIR / f"{source}.yaml"
    elif not path.is_file():
        raise RecipeError(f"sweep file {path} does not exist; give a YAML file or one of {', '.join(list_sweeps())}")
    return validate_sweep(read_fields(path, what="sweep"), origin=str(path))


def validate_sweep(values: Mapping[str, Any], *, origin: str) -> SweepSpec:
    """Validate plain values as a sweep; `origin` names their source in errors. Raises RecipeError."""
    try:
        return SweepSpec.model_validate_json(json.dumps(values))
    except ValidationError as error:
        faults = "; ".join(_explain(fault) for fault in error.errors()[:10])
        raise RecipeError(f"sweep {origin}: {faults}") from None
    except (TypeError, ValueError) as error:
        raise RecipeError(f"sweep {origin}: {' '.join(str(error).split())}") from error


def dump_sweep(spec: SweepSpec) -> str:
    """The sweep as YAML; `validate_sweep` of its values gives an equal one."""
    text: str = yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
    return text


def _explain(fault: Any) -> str:
    location = [str(part) for part in fault["loc"] if part not in ("[key]", "int", "list[int]")]
    field = ".".join(location) or "sweep"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        known = SweepSpec.model_fields if len(location) == 1 else Grid.model_fields
        message = f"unknown field{did_you_mean(location[-1], known)}; known here: {', '.join(known)}"
    elif fault["type"] == "missing":
        message = "required but not given"
    elif "[key]" in fault["loc"]:
        message = f"{location[-1]!r} is no name of a field, or no label, of at most 60 characters"
    return f"field '{field}': {message}"
