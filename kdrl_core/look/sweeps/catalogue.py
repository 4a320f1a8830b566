"""Catalogues: variants, each declared once with its values for each recipe. Sweeps say which of them they compare.

name: paper
variants:
  KDRL: {source: "Table 3: constant β 2e-3", recipes: {paper-1.5b: {stage2.beta: {init: 2.0e-3}}}}
  KD-RKL: {source: "B.2: otherwise as KDRL", base: KDRL, set: {stage2.objective: kd_rkl}}
seeds: {paper-1.5b: 1}       # of sweeps whose `seeds` are for another recipe

A sweep has `variants_of: paper` and `pick: [KDRL, KD-RKL]`. What it sets for a variant itself comes on top.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from kdrl_core.config import did_you_mean, read_fields
from kdrl_core.config.load import RECIPES_DIR
from kdrl_core.errors import RecipeError
from kdrl_core.look.sweeps.grid import STRICT, Label, RecipeGrid, Seeds, Values, layered

if TYPE_CHECKING:
    from kdrl_core.look.sweeps.spec import SweepSpec

CATALOGUES_DIR = RECIPES_DIR.parent / "catalogues"


class Method(BaseModel):
    """A variant as its source describes it."""

    model_config = STRICT

    source: str = Field(min_length=1, max_length=200, description="where it is described, and in which words")
    base: Label | None = Field(None, description="the variant that it is like, but for what it sets")
    set: Values = Field({}, description="fields that make it, on every recipe")
    recipes: dict[str, Values] = Field(
        {}, description="recipe's name → its fields there; others lack it, except its base's"
    )


class Catalogue(BaseModel):
    """Variants by label."""

    model_config = STRICT

    name: str
    description: str = ""
    variants: dict[Label, Method] = Field(min_length=1)
    seeds: dict[str, Seeds] = Field({}, description="recipe's name → seeds of sweeps that give none for it")

    @model_validator(mode="after")
    def _bases(self) -> Self:
        for label, method in self.variants.items():
            if method.base is None:
                continue
            if method.base not in self.variants:
                raise ValueError(
                    f"base of {label}: no variant '{method.base}'{did_you_mean(method.base, self.variants)}"
                )
            if self.variants[method.base].base is not None:
                raise ValueError(f"base of {label}: {method.base} has a base itself; take one that has none")
        return self

    def chain(self, label: str) -> list[Method]:
        """The variant after its base."""
        method = self.variants[label]
        return [method] if method.base is None else [self.variants[method.base], method]

    def recipes(self, labels: Sequence[str]) -> list[str]:
        """Names of the recipes that all of the variants have values for."""
        found = dict.fromkeys(name for method in self.variants.values() for name in method.recipes)
        return [name for name in found if all(self.has(label, name) for label in labels)]

    def has(self, label: str, recipe: str) -> bool:
        """Whether the variant exists on a recipe: it needs no values by recipe, or it or its base has them for this
        one. A variant that sets nothing there is only its base, so it does not exist."""
        method = self.variants[label]
        if method.base is not None and not method.set and not method.recipes.get(recipe):
            return False
        named = [name for method in self.chain(label) for name in method.recipes]
        return not named or recipe in named


def load_catalogue(source: str) -> Catalogue:
    """Read a catalogue: the name of a shipped one, or the path of a YAML file. Raises RecipeError if there is none, or
    a field of it is wrong."""
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        path = CATALOGUES_DIR / f"{source}.yaml"
    if not path.is_file():
        shipped = sorted(file.stem for file in CATALOGUES_DIR.glob("*.yaml"))
        raise RecipeError(
            f"field 'variants_of': no catalogue '{source}'{did_you_mean(source, shipped)}; shipped: "
            f"{', '.join(shipped)}, or give the path of a .yaml file"
        )
    try:
        return Catalogue.model_validate(read_fields(path, what="catalogue"))
    except ValidationError as error:
        faults = "; ".join(f"field '{'.'.join(map(str, one['loc']))}': {one['msg']}" for one in error.errors()[:10])
        raise RecipeError(f"catalogue {path}: {faults}") from None


def written_out(spec: "SweepSpec", *, origin: str) -> "SweepSpec":
    """The sweep with the variants that it picks from its catalogue, and without the names of both: a sweep that was
    started keeps its variants when the catalogue changes.

    Raises RecipeError if the catalogue has no such variant, or has no values of it for a recipe of the sweep.
    """
    if spec.variants_of is None:
        return spec
    try:
        catalogue = load_catalogue(spec.variants_of)
    except RecipeError as error:
        raise RecipeError(f"sweep {origin}: {error}") from None
    picked = spec.pick or list(catalogue.variants)
    known = f"catalogue {catalogue.name}"
    for label in picked:
        if label not in catalogue.variants:
            near = did_you_mean(label, catalogue.variants)
            raise RecipeError(f"sweep {origin}, field 'pick': {known} has no variant '{label}'{near}")
    grids = spec.recipes or {name: RecipeGrid() for name in catalogue.recipes(picked)}
    if not grids and any(method.recipes for method in catalogue.variants.values()):
        raise RecipeError(f"sweep {origin}, field 'pick': {known} has no recipe with values for all of these variants")
    for recipe, grid in grids.items():
        for label in picked:
            if not catalogue.has(label, recipe) and label not in grid.variants:
                raise RecipeError(
                    f"sweep {origin}, field 'recipes.{recipe}': {known} has no values of '{label}' for this recipe; "
                    f"give recipes.{recipe}.variants.{label}, or do not pick it"
                )
        _refuse_unpicked([*spec.variants, *grid.variants], picked, catalogue, origin=origin)
    general = {label: layered(*(method.set for method in catalogue.chain(label))) for label in picked}
    return spec.model_copy(
        update={
            "variants_of": None,
            "pick": [],
            "variants": _on_top(general, spec.variants),
            "recipes": {name: _grid(spec, catalogue, picked, name, grid) for name, grid in grids.items()},
            "sources": {label: catalogue.variants[label].source for label in picked} | spec.sources,
        }
    )


def _grid(spec: "SweepSpec", catalogue: Catalogue, picked: Sequence[str], recipe: str, grid: RecipeGrid) -> RecipeGrid:
    """Values for a recipe: the catalogue's, then the sweep's general ones again, then the sweep's for the recipe."""
    there = {label: layered(*(m.recipes.get(recipe, {}) for m in catalogue.chain(label))) for label in picked}
    own = {label: values for label, values in spec.variants.items() if there.get(label)}
    variants = {label: values for label, values in _on_top(there, own, grid.variants).items() if values}
    seeds = grid.seeds
    if seeds is None and not _gives_seeds(spec, recipe):
        seeds = catalogue.seeds.get(recipe)
    return grid.model_copy(update={"variants": variants, "seeds": seeds})


def _gives_seeds(spec: "SweepSpec", recipe: str) -> bool:
    """Whether `seeds` of the sweep are meant for a recipe: the one that the sweep names, or any if it names a file."""
    return "seeds" in spec.model_fields_set and (spec.recipe == recipe or spec.recipe.endswith((".yaml", ".yml")))


def _on_top(*layers: dict[str, Values]) -> dict[str, Values]:
    labels = dict.fromkeys(label for layer in layers for label in layer)
    return {label: layered(*(layer.get(label, {}) for layer in layers)) for label in labels}


def _refuse_unpicked(own: Sequence[str], picked: Sequence[str], catalogue: Catalogue, *, origin: str) -> None:
    """Raise RecipeError if the sweep sets something for a variant of the catalogue that it does not compare."""
    for label in own:
        if label in catalogue.variants and label not in picked:
            raise RecipeError(
                f"sweep {origin}, field 'variants.{label}': this variant of catalogue {catalogue.name} is not picked; "
                "add it to 'pick', or give yours another label"
            )
