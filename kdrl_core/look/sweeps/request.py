"""From the options of a command to a sweep and its cells. All cells are validated before anything runs.

A cell waits if another one is making a part of it, so that no work is done twice.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kdrl_core.boxes.preflight import check_inputs
from kdrl_core.boxes.sharing import Part, parts_of
from kdrl_core.config import anchored, config_hash, dump_recipe, load_recipe, parse_value
from kdrl_core.config.fetch import fetched
from kdrl_core.errors import KdrlError, RecipeError
from kdrl_core.ledger import replace_file, require_same_recipe
from kdrl_core.look.sweeps.spec import Cell, expand, load_sweep, validate_sweep
from kdrl_core.look.sweeps.state import Origin, SweepPaths, SweepRecord, read_record

_MAX_NAME = 60
_VARY = "--vary"
"""Source of a sweep without a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request(SweepRecord):
    """A sweep that is ready to run."""

    cells: tuple[Cell, ...]


def make_request(
    source: str | None,
    *,
    name: str | None = None,
    recipe: str | None = None,
    seeds: int | list[int] | None = None,
    vary: Sequence[str] | None = None,
    overrides: Sequence[str] | None = None,
    share_with: Sequence[str] | None = None,
) -> Request:
    """The sweep that was asked for, with its cells.

    A sweep that was started before keeps its options, except those that are given here. A YAML file is read again, and
    the sweep's earlier options are applied to it.

    Args:
        source: name of a shipped sweep or of one that was started, or path of a YAML file; None: `vary` alone.
        name: of the sweep, its folder and its runs; default: the file's.
        vary: `FIELD=a,b,c` each, in addition to what the sweep varies.
        overrides: `FIELD=VALUE` of every cell; None: those it was started with.
        share_with: other sweeps that were started, whose finished work may be taken over.

    Raises:
        RecipeError: no such sweep, a cell's recipe is not valid, or the started sweep `name` has another source.
        RunError: a sweep of `share_with` was not started.
    """
    if source is None and not vary:
        raise RecipeError("nothing is varied; name a sweep (kdrl sweep list), or give --vary FIELD=a,b,c")
    if source is None:
        name = name or _name(recipe, vary or ())
    values, record, origin = _before(source, name)
    given = {option: value for option, value in (("recipe", recipe), ("seeds", seeds)) if value is not None}
    varied = dict(map(parse_vary, vary or ()))
    options = {**origin.options, **given, "vary": {**origin.options.get("vary", {}), **varied}}
    if _is_file(source):
        given, varied = {n: value for n, value in options.items() if n != "vary"}, options["vary"]
    values = _with_options(values, {**given, **({} if name is None else {"name": name})}, varied)
    spec = validate_sweep(values, origin=source or _VARY)
    own = tuple(overrides if overrides is not None else record.overrides if record else ())
    shared = tuple(share_with if share_with is not None else record.share_with if record else ())
    for other in shared:
        read_record(other)
    cells = tuple(expand(spec, own, origin=source))
    return Request(spec=spec, overrides=own, share_with=shared, cells=cells, origin=replace(origin, options=options))


def _with_options(values: Mapping[str, Any], given: Mapping[str, Any], varied: Mapping[str, Any]) -> dict[str, Any]:
    """A sweep's values with the options of a command, which override those by recipe or variant as well."""

    def without(several: Mapping[str, Any]) -> dict[str, Any]:
        return {field: some for field, some in several.items() if field not in varied}

    found = {**values, **given, "vary": {**values["vary"], **varied}}
    for grid in (found, *found.get("recipes", {}).values()):
        grid["vary_each"] = {label: without(several) for label, several in grid.get("vary_each", {}).items()}
        if grid is not found:
            grid["vary"] = without(grid["vary"])
            grid["seeds"] = None if "seeds" in given else grid["seeds"]
    return found


def _before(source: str | None, name: str | None) -> tuple[dict[str, Any], SweepRecord | None, Origin]:
    """What a request starts from: the sweep's values, its record if it was started, and its origin. Raises RecipeError
    if there is no such sweep, or the started sweep `name` has another source."""
    file = load_sweep(source) if source is not None and _is_file(source) else None
    made_of = _VARY if source is None else source if file is None else Path(source).name
    record = _started(name or (source if file is None else file.name))
    is_same = record is not None and record.origin.source in (None, made_of)
    if record is not None and not is_same and name not in (None, source):
        raise RecipeError(
            f"--name {name}: a sweep of that name was made of {record.origin.source}, not of {made_of}; take another "
            f"name, or go on with it: kdrl sweep run {name}"
        )
    if record is not None and file is None:
        return record.spec.model_dump(mode="json"), record, record.origin
    origin = Origin(source=made_of, options=record.origin.options if record is not None and is_same else {})
    if source is None:
        return {"name": name, "recipe": "miniature", "vary": {}}, record, origin
    return (file or load_sweep(source)).model_dump(mode="json"), record, origin


def check_request(request: Request) -> None:
    """Check the inputs of every cell, and the runs that exist already, before anything runs. Raises the errors of
    `check_inputs` and `require_same_recipe`; the message names the cell."""
    seen: set[str] = set()
    for cell in request.cells:
        try:
            fetched(cell.recipe)
            require_same_recipe(cell.run, cell.recipe)
            if (what := config_hash(cell.recipe.model_copy(update={"seed": 0}))) not in seen:
                check_inputs(cell.recipe)
            seen.add(what)
        except KdrlError as error:
            first, *rest = error.args or ("",)
            where = f"sweep {request.spec.name}, variant '{cell.variant}', seed {cell.seed}"
            raise type(error)(f"{where}: {first}", *rest) from None


def write_record(request: Request) -> None:
    """Write the record, and the recipe of each cell, with absolute paths: workers may have another current folder."""
    paths = SweepPaths.of(request.spec.name)
    for cell in request.cells:
        replace_file(paths.recipe(cell.run), dump_recipe(anchored(cell.recipe)).encode())
    content = {
        "spec": request.spec.model_dump(mode="json"),
        "overrides": request.overrides,
        "share_with": request.share_with,
        "origin": asdict(request.origin),
        "cells": [{"run": cell.run, "variant": cell.variant, "seed": cell.seed} for cell in request.cells],
    }
    replace_file(paths.record, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def donors_of(request: Request) -> list[str]:
    """Every run from which a cell may take over finished work: the sweep's own cells, and those of `share_with`."""
    others = [cell.run for sweep in request.share_with for cell in read_record(sweep).cells]
    return [*(cell.run for cell in request.cells), *others]


def parse_vary(text: str) -> tuple[str, list[Any]]:
    """`FIELD=a,b,c` as field and values, each of them YAML."""
    field, equals, values = text.partition("=")
    if not equals or not field or not values:
        raise RecipeError(f"--vary {text}: expected FIELD=a,b,c, e.g. --vary stage2.learning_rate=1e-4,3e-4")
    return field, parse_value(f"[{values}]", field=f"--vary {text}")


def _name(recipe: str | None, vary: Sequence[str]) -> str:
    loaded = load_recipe(recipe or "miniature")
    fields = "-".join(parse_vary(text)[0] for text in vary)
    name = f"{loaded.name}-by-{fields}"
    if len(name) > _MAX_NAME:
        raise RecipeError(f"{name} would be too long a name for a sweep; give it one with --name")
    return name


def _is_file(source: str | None) -> bool:
    return (source or "").endswith((".yaml", ".yml"))


def _started(name: str | None) -> SweepRecord | None:
    if name is None or _is_file(name) or not SweepPaths.of(name).record.is_file():
        return None
    return read_record(name)


def next_cell(
    pending: Sequence[Cell], running: Iterable[Cell], made: Collection[str], parts: Mapping[str, Sequence[Part]]
) -> Cell | None:
    """The first pending cell that shares no unfinished part with a running cell; None if all have to wait. `made`: keys
    of the parts that some run has finished; `parts`: name of a run → parts of its cell."""
    under_way = {part.key for cell in running for part in parts[cell.run]} - set(made)
    for cell in pending:
        if not any(part.is_waited_for and part.key in under_way for part in parts[cell.run]):
            return cell
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Optimiser steps of a sweep."""

    alone: int
    """If every cell did all of its stages itself."""
    shared: int
    """How many of these are taken over from another cell."""
    by_part: Mapping[str, tuple[int, int]]
    """Part → number of cells that have it, and how often it is made."""

    @property
    def to_train(self) -> int:
        return self.alone - self.shared


def estimate(cells: Sequence[Cell]) -> Estimate:
    """The work of a sweep from its start, and how much of it is shared."""
    alone = trained = 0
    seen: set[str] = set()
    counts: dict[str, list[int]] = {}
    for cell in cells:
        for part in parts_of(cell.recipe):
            count = counts.setdefault(part.name, [0, 0])
            count[0] += 1
            count[1] += part.key not in seen
            steps = cell.recipe.stage(part.name).steps if part.name in cell.recipe.stages else 0
            alone += steps
            trained += 0 if part.key in seen else steps
            seen.add(part.key)
    return Estimate(
        alone=alone, shared=alone - trained, by_part={name: (have, made) for name, (have, made) in counts.items()}
    )
