"""A sweep and a recipe → its cells: one recipe per variant, combination of values, and seed."""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdrl_core.config import Recipe, config_hash, did_you_mean, load_recipe
from kdrl_core.config.paths import validate_run_name
from kdrl_core.errors import RecipeError, RunError
from kdrl_core.ledger.labels import reference_labels
from kdrl_core.look.reporting.run_summary import MODEL_NAMES
from kdrl_core.look.sweeps.spec import ACCURACY, CLAIM_METRICS, LENGTH, SweepSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run of a sweep."""

    run: str
    """Name of the run: `<sweep>--<variant>--seed<n>`."""
    variant: str
    """Label of its row: equal for all seeds."""
    seed: int
    overrides: tuple[str, ...]
    """Of the sweep's recipe, as `kdrl run --set` takes them."""
    recipe: Recipe


def expand(spec: SweepSpec, overrides: Sequence[str] = (), *, origin: str | None = None) -> list[Cell]:
    """Every cell of a sweep, seed by seed, in the order of the variants; each recipe is validated.

    Args:
        overrides: `--set` of the command line; they win in every cell.
        origin: names the sweep in errors; default: its name.

    Raises:
        RecipeError: a cell's recipe is not valid (cell, file and field are named), two variants are the same, a
            label makes no run name, or a claim names what the sweep does not have.
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
    _check_claims(spec, cells, origin=origin)
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


def _check_claims(spec: SweepSpec, cells: Sequence[Cell], *, origin: str) -> None:
    """Raise RecipeError if a claim names a variant, model, benchmark or metric that the sweep does not have."""
    variants = list(dict.fromkeys(cell.variant for cell in cells))
    benchmarks = [benchmark.name for benchmark in cells[0].recipe.evaluation.benchmarks]
    names = dict.fromkeys(MODEL_NAMES[label] for cell in cells for label in reference_labels(cell.recipe))
    references = [*names, *(f"{name} of {variant}" for name in names for variant in variants)]
    for number, claim in enumerate(spec.claims, start=1):
        where = f"sweep {origin}, claim {number}"
        kind, colon, benchmark = claim.measure.partition(":")
        # Reference models have answers, but no metrics of the compared stage.
        labels = [*variants, *(references if kind in (ACCURACY, LENGTH) else ())]
        for field, label in (("more", claim.more), ("less", claim.less)):
            if label not in labels:
                raise RecipeError(f"{where}, field '{field}': no variant '{label}'{did_you_mean(label, labels)}")
        if claim.more == claim.less:
            raise RecipeError(f"{where}: '{claim.more}' is compared with itself; correct 'more' or 'less'")
        if kind == ACCURACY and benchmark not in benchmarks:
            raise RecipeError(
                f"{where}, field 'measure': no benchmark '{benchmark}'{did_you_mean(benchmark, benchmarks)}; "
                f"accuracy:NAME, of {', '.join(benchmarks)}"
            )
        if kind != ACCURACY and colon:
            raise RecipeError(
                f"{where}, field 'measure': '{claim.measure}' is none; give accuracy:BENCHMARK or a metric"
            )
        if kind != ACCURACY and kind not in CLAIM_METRICS and not kind.startswith(("time/", "throughput/", "sync/")):
            raise RecipeError(
                f"{where}, field 'measure': no metric '{kind}'{did_you_mean(kind, [LENGTH, *CLAIM_METRICS])}; "
                "accuracy:BENCHMARK, length, or a column of metrics.parquet"
            )


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
