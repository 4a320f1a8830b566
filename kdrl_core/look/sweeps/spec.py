"""Sweeps as YAML: variants and a grid over recipe fields, times seeds; shipped by name or read from a file. Each
variant, combination of values, and seed is a cell: a recipe and a run.

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
judged_on: test              # the benchmark of claims about accuracy; avg: the mean of all
claims:                      # what the table judges; or the name of a shipped list: claims: paper
  - {text: the joint loss beats GRPO, source: Sec. 3.1, more: KDRL, less: GRPO, measure: "accuracy:test"}
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from kdrl_core.config import Recipe, config_hash, did_you_mean, load_recipe, read_fields
from kdrl_core.config.load import RECIPES_DIR
from kdrl_core.config.paths import validate_run_name
from kdrl_core.errors import RecipeError, RunError
from kdrl_core.look.sweeps.claims import AVERAGE, CLAIM_TAGS, Claim, Claims, claims_of

SWEEPS_DIR = RECIPES_DIR.parent / "sweeps"
_OWN_FIELDS = ("seed", "name", "description")
"""Recipe fields that a sweep sets itself."""
_MAX_SEEDS = 1_000

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


class SweepSpec(Grid):
    """A sweep, as its file describes it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=60, description="also the name of its folder")
    description: str = ""
    recipe: str = Field("miniature", min_length=1, description="name of a shipped recipe, or path of a YAML file")
    seeds: int | list[int] = Field(1, description="number of seeds, counted from 0, or the list of seeds")
    recipes: dict[str, Grid] = Field({}, description="recipe's name → values for this recipe; they override the others")
    judged_on: str | Annotated[list[str], Field(min_length=1)] = Field(
        AVERAGE, description="benchmark of claims about `accuracy`; avg: all; of several, the first that the recipe has"
    )
    claims: Claims = Field([], description="claims that the report judges: a list, or the name of a shipped list")

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
        return self.seeds if isinstance(self.seeds, list) else list(range(self.seeds))

    def grid_for(self, recipe: Recipe, *, origin: str) -> Grid:
        """What this sweep varies in a recipe: the general values, overridden by the values for this recipe. Raises
        RecipeError if the sweep has values by recipe, but none for this one."""
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
    """Read and validate a sweep: the name of a shipped one, or the path of a YAML file. Raises RecipeError if there is
    none, or a field is unknown, missing or of the wrong kind; file and field are named. `expand` validates the
    values that the sweep sets in recipes."""
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
    location = [
        str(part) for part in fault["loc"] if part not in ("[key]", "int", "list[int]", "str", "list[str]", *CLAIM_TAGS)
    ]
    field = ".".join(location) or "sweep"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        parts = SweepSpec if len(location) == 1 else Claim if location[0] == "claims" else Grid
        known = parts.model_fields
        message = f"unknown field{did_you_mean(location[-1], known)}; known here: {', '.join(known)}"
    elif fault["type"] == "missing":
        message = "required but not given"
    elif "[key]" in fault["loc"]:
        message = f"{location[-1]!r} is not a valid field name or label (labels have at most 60 characters)"
    return f"field '{field}': {message}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CellName:
    """Identifies a cell of a sweep."""

    run: str
    """Name of the run: `<sweep>--<variant>--seed<n>`."""
    variant: str
    """Label of its row: equal for all seeds."""
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell(CellName):
    """One run of a sweep."""

    overrides: tuple[str, ...]
    """Of the sweep's recipe, as `kdrl run --set` takes them."""
    recipe: Recipe


def expand(spec: SweepSpec, overrides: Sequence[str] = (), *, origin: str | None = None) -> list[Cell]:
    """Every cell of a sweep, seed by seed, in the order of the variants; each recipe is validated. `overrides` (`--set`
    of the command line) win in every cell; `origin` names the sweep in errors.

    Raises RecipeError if a cell's recipe is not valid (cell, file and field are named), two variants are the same, a
    label gives no valid run name, or a claim names something that the sweep does not have.
    """
    origin = origin or spec.name
    grid = spec.grid_for(_load(spec, f"sweep {origin}, recipe", [*overrides]), origin=origin)
    variants = grid.variants or {"": {}}
    names = _short_names(list(grid.vary))
    cells: list[Cell] = []
    for seed in spec.seed_list:
        for label, values in variants.items():
            for combination in itertools.product(*grid.vary.values()):
                varied = dict(zip(grid.vary, combination, strict=True))
                told = [f"{names[field]}={_shown(value)}" for field, value in varied.items()]
                variant = ", ".join([label, *told] if label else told)
                own = (*as_overrides(_layered(grid.set, values, varied)), *overrides, f"seed={seed}")
                recipe = _load(spec, f"sweep {origin}, variant '{variant}'", own)
                run = _run_name(spec.name, variant, seed, origin=origin)
                cells.append(Cell(run=run, variant=variant, seed=seed, overrides=own, recipe=recipe))
    _require_different(cells, origin=origin)
    claims_of(spec.claims, spec.judged_on, {cell.variant: cell.recipe for cell in cells}, origin=origin)
    return cells


def _layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge layers in order. A field moves to the end when it is set again, so that the last value wins, also where
    one field lies within another."""
    found: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            found.pop(name, None)
            found[name] = value
    return found


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """Fields and values as `load_recipe` takes them: as JSON, with the characters escaped that YAML does not allow."""
    return [f"{field}={_escaped(json.dumps(value, ensure_ascii=False))}" for field, value in values.items()]


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _load(spec: SweepSpec, what: str, overrides: Sequence[str]) -> Recipe:
    try:
        return load_recipe(spec.recipe, overrides)
    except RecipeError as error:
        raise RecipeError(f"{what}: {error}") from None


def _short_names(fields: list[str]) -> dict[str, str]:
    """The shortest end of each field's path that no other field has: `init` for stage2.beta.init."""
    short = {}
    for field in fields:
        parts = field.split(".")
        tails = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        others = [other for other in fields if other != field]
        short[field] = next((t for t in tails if not any(f".{o}".endswith(f".{t}") for o in others)), field)
    return short


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _run_name(sweep: str, variant: str, seed: int, *, origin: str) -> str:
    slug = re.sub(r"\.{2,}", ".", re.sub(r"[^A-Za-z0-9.]+", "-", variant)).strip("-.").lower()
    try:
        return validate_run_name(f"{sweep}--{slug}--seed{seed}")
    except RunError as error:
        raise RecipeError(f"sweep {origin}, variant '{variant}': {error}; give it a shorter label") from None


def _require_different(cells: list[Cell], *, origin: str) -> None:
    """Raise RecipeError if two cells have the same name or the same recipe."""
    names: dict[str, Cell] = {}
    hashes: dict[str, Cell] = {}
    for cell in cells:
        if (other := names.setdefault(cell.run, cell)) is not cell:
            raise RecipeError(
                f"sweep {origin}: variants '{other.variant}' and '{cell.variant}' would both be run {cell.run}; "
                "give one of them another label"
            )
        if (other := hashes.setdefault(config_hash(cell.recipe), cell)) is not cell:
            raise RecipeError(
                f"sweep {origin}: variants '{other.variant}' and '{cell.variant}' are the same recipe; "
                "correct what they set, or drop one"
            )
