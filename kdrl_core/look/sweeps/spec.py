"""Sweeps as YAML: variants and a grid over recipe fields, times seeds; shipped by name or read from a file. Each
variant, combination of values, and seed is a cell: a recipe and a run.

name: figure4
recipe: miniature            # --recipe takes another
seeds: 3                     # 0, 1, 2; or a list
set: {stage2.steps: 80}      # of every cell
variants:                    # label → fields that make it
  KDRL: {stage2.beta: {init: 0.2}}
vary:                        # every combination, of every variant; vary_each: {KDRL: …}: of this variant
  stage2.learning_rate: [1.0e-4, 3.0e-4]
variants_of: paper           # with `pick`: variants of a catalogue (catalogue.py); their own values come on top
equal: [steps]               # fields of the last stage that no variant may have another value of
recipes:                     # values that depend on the recipe, by its name: on top of those above
  paper-1.5b: {variants: {KDRL: {stage2.beta: {init: 2.0e-3}}}, seeds: 1}
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
from pydantic import Field, ValidationError, field_validator, model_validator

from kdrl_core.config import Recipe, config_hash, did_you_mean, load_recipe, read_fields
from kdrl_core.config.load import RECIPES_DIR
from kdrl_core.config.paths import validate_run_name
from kdrl_core.errors import RecipeError, RunError
from kdrl_core.look.sweeps.catalogue import written_out
from kdrl_core.look.sweeps.claims import AVERAGE, CLAIM_TAGS, Claim, Claims, claims_of
from kdrl_core.look.sweeps.equality import require_equal
from kdrl_core.look.sweeps.grid import Grid, Label, RecipeGrid, Seeds, checked_seeds, layered, listed_seeds

SWEEPS_DIR = RECIPES_DIR.parent / "sweeps"


class SweepSpec(Grid):
    """A sweep, as its file describes it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=60, description="also the name of its folder")
    description: str = ""
    recipe: str = Field("miniature", min_length=1, description="name of a shipped recipe, or path of a YAML file")
    seeds: Seeds = Field(1, description="number of seeds, counted from 0, or the list of seeds")
    variants_of: str | None = Field(None, min_length=1, description="a catalogue: a shipped one, or a YAML file")
    pick: list[Label] = Field([], description="variants of the catalogue, in the order of the table; default: all")
    sources: dict[Label, str] = Field({}, description="variant → where it is described; a catalogue gives these")
    equal: list[str] = Field([], description="fields of the last stage that are the same in all variants")
    unequal: dict[Label, list[str]] = Field({}, description="variant → fields of `equal` in which it differs")
    recipes: dict[str, RecipeGrid] = Field({}, description="recipe's name → values for it; they override the others")
    judged_on: str | Annotated[list[str], Field(min_length=1)] = Field(
        AVERAGE, description="benchmark of claims about `accuracy`; avg: all; of several, the first that the recipe has"
    )
    claims: Claims = Field([], description="claims that the report judges: a list, or the name of a shipped list")

    @field_validator("seeds")
    @classmethod
    def _some_seeds(cls, seeds: Seeds) -> Seeds:
        return checked_seeds(seeds)

    @model_validator(mode="after")
    def _varies(self) -> Self:
        grids: list[Grid] = [self, *self.recipes.values()]
        if self.variants_of is None and not any(grid.variants or grid.vary for grid in grids):
            raise ValueError("nothing is varied; give `variants`, `vary` or both")
        if self.pick and self.variants_of is None:
            raise ValueError("`pick` is of a catalogue; name it in `variants_of`")
        return self

    def grid_for(self, recipe: Recipe, *, origin: str) -> RecipeGrid:
        """What this sweep varies in a recipe: the general values, overridden by the values for this recipe. Raises
        RecipeError if the sweep has values by recipe, but none for this one."""
        if not self.recipes:
            return RecipeGrid(
                set=self.set, variants=self.variants, vary=self.vary, vary_each=self.vary_each, seeds=self.seeds
            )
        if recipe.name not in self.recipes:
            raise RecipeError(
                f"sweep {origin}, field 'recipes': it has values for {', '.join(self.recipes)}, and none for recipe "
                f"{recipe.name}; add recipes.{recipe.name} to a copy of the file (kdrl sweep show {self.name} --yaml)"
            )
        own = self.recipes[recipe.name]
        labels = dict.fromkeys([*self.variants, *own.variants])
        return RecipeGrid(
            set=layered(self.set, own.set),
            variants={label: layered(self.variants.get(label, {}), own.variants.get(label, {})) for label in labels},
            vary={**self.vary, **own.vary},
            vary_each={**self.vary_each, **own.vary_each},
            seeds=self.seeds if own.seeds is None else own.seeds,
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
    """Validate plain values as a sweep; variants of a catalogue are written out. `origin` names the source of the
    values in errors. Raises RecipeError."""
    try:
        return written_out(SweepSpec.model_validate_json(json.dumps(values)), origin=origin)
    except ValidationError as error:
        faults = "; ".join(_explain(fault) for fault in error.errors()[:10])
        raise RecipeError(f"sweep {origin}: {faults}") from None
    except RecipeError:
        raise
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
        parts = SweepSpec if len(location) == 1 else Claim if location[0] == "claims" else RecipeGrid
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

    label: str
    """Its variant in the sweep's file: the row's label without varied values."""
    overrides: tuple[str, ...]
    """Of the sweep's recipe, as `kdrl run --set` takes them."""
    recipe: Recipe


def expand(spec: SweepSpec, overrides: Sequence[str] = (), *, origin: str | None = None) -> list[Cell]:
    """Every cell of a sweep, seed by seed, in the order of the variants; each recipe is validated. `overrides` (`--set`
    of the command line) win in every cell; `origin` names the sweep in errors.

    Raises RecipeError if a cell's recipe is not valid (cell, file and field are named), two variants are the same, a
    label gives no valid run name, variants differ in a field of `equal`, or a claim names something that the sweep
    does not have.
    """
    origin = origin or spec.name
    grid = spec.grid_for(_load(spec, f"sweep {origin}, recipe", [*overrides]), origin=origin)
    variants = grid.variants or {"": {}}
    if unknown := [label for label in grid.vary_each if label not in variants]:
        near = did_you_mean(unknown[0], variants)
        raise RecipeError(f"sweep {origin}, field 'vary_each': no variant '{unknown[0]}'{near}")
    cells: list[Cell] = []
    for seed in listed_seeds(grid.seeds or 1):
        for label, values in variants.items():
            vary = {**grid.vary, **grid.vary_each.get(label, {})}
            names = _short_names(list(vary))
            for combination in itertools.product(*vary.values()):
                varied = dict(zip(vary, combination, strict=True))
                told = [f"{names[field]}={_shown(value)}" for field, value in varied.items()]
                variant = ", ".join([label, *told] if label else told)
                own = (*as_overrides(layered(grid.set, values, varied)), *overrides, f"seed={seed}")
                recipe = _load(spec, f"sweep {origin}, variant '{variant}'", own)
                run = _run_name(spec.name, variant, seed, origin=origin)
                cells.append(Cell(run=run, variant=variant, label=label, seed=seed, overrides=own, recipe=recipe))
    _require_different(cells, origin=origin)
    require_equal(spec, grid, cells, origin=origin)
    recipes = {cell.variant: cell.recipe for cell in cells}
    claims_of(spec.claims, spec.judged_on, recipes, origin=origin)
    return cells


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
    """Raise RecipeError if two cells have the same name or the same recipe, or a model for comparison a variant's."""
    also = {name for cell in cells for name in cell.recipe.evaluation.also}
    if taken := [cell.variant for cell in cells if cell.variant in also]:
        raise RecipeError(
            f"sweep {origin}, field 'evaluation.also': {taken[0]!r} is also a variant, and the table could not tell "
            "them apart; give the model another name"
        )
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
