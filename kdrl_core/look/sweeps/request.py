"""What a command asks for → a sweep and its cells, all of them validated before anything runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrl_core.boxes.preflight import check_inputs
from kdrl_core.config import Recipe, config_hash, load_recipe, parse_value
from kdrl_core.errors import KdrlError, RecipeError
from kdrl_core.ledger import require_same_recipe
from kdrl_core.look.sweeps.cells import Cell, expand
from kdrl_core.look.sweeps.spec import SweepSpec, load_sweep, validate_sweep
from kdrl_core.look.sweeps.state import Origin, SweepPaths, SweepRecord, read_record

_MAX_NAME = 60
_VARY = "--vary"
"""What a sweep without a file is made of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A sweep as it is to run."""

    spec: SweepSpec
    overrides: tuple[str, ...]
    share_with: tuple[str, ...]
    cells: tuple[Cell, ...]
    origin: Origin


def make_request(
    source: str | None,
    *,
    name: str | None = None,
    recipe: str | None = None,
    seeds: int | list[int] | None = None,
    vary: Sequence[str] = (),
    overrides: Sequence[str] | None = None,
    share_with: Sequence[str] | None = None,
) -> Request:
    """The sweep that was asked for, with its cells.

    A sweep that was started before goes on as it was started; what is given here takes the place of that. Only a YAML
    file is read anew, with the options that the sweep was started with on top.

    Args:
        source: name of a shipped sweep or of one that was started, or path of a YAML file; None: `vary` alone.
        name: of the sweep, its folder and its runs; default: the file's.
        vary: `FIELD=a,b,c` each, beside what the sweep varies.
        overrides: `FIELD=VALUE` of every cell; None: those it was started with.
        share_with: other sweeps that were started, whose finished work may be taken over.

    Raises:
        RecipeError: no such sweep, a cell's recipe is not valid, or `name` is that of a sweep made of another one.
        RunError: a sweep of `share_with` was not started.
    """
    if source is None and not vary:
        raise RecipeError("nothing is varied; name a sweep (kdrl sweep list), or give --vary FIELD=a,b,c")
    if source is None:
        name = name or _name(recipe, vary)
    is_file = (source or "").endswith((".yaml", ".yml"))
    known = None if is_file else _started(name or source)  # under another name, `source` is its file
    made_of = _VARY if source is None else Path(source).name if is_file else source
    taken = _started(name)
    if taken is not None and source != name and taken.origin.source not in (None, made_of):
        raise RecipeError(
            f"--name {name}: a sweep of that name was made of {taken.origin.source}, not of {made_of}; take another "
            f"name, or go on with it: kdrl sweep run {name}"
        )
    base: dict[str, Any]
    if source is None and known is None:
        base = {"name": name, "recipe": "miniature", "vary": {}}
    elif known is not None:
        base = known.spec.model_dump(mode="json")
    else:
        assert source is not None
        base = load_sweep(source).model_dump(mode="json")
    kept = _started(name or base["name"])
    new: dict[str, Any] = {"recipe": recipe, "seeds": seeds}
    given = {option: value for option, value in new.items() if value is not None}
    varied = dict(map(parse_vary, vary))
    origin = Origin() if kept is None else kept.origin
    if known is None and origin.source not in (None, made_of):  # of a name that another file had
        origin = Origin()
    options = {**origin.options, **given, "vary": {**origin.options.get("vary", {}), **varied}}
    if is_file:
        given, varied = {n: value for n, value in options.items() if n != "vary"}, options["vary"]
    values = {**base, **given, **({} if name is None else {"name": name})}
    values["vary"] = {**values["vary"], **varied}
    for of_recipe in values.get("recipes", {}).values():
        of_recipe["vary"] = {field: some for field, some in of_recipe["vary"].items() if field not in varied}
    spec = validate_sweep(values, origin=source or "--vary")
    own = tuple(overrides if overrides is not None else kept.overrides if kept else ())
    shared = tuple(share_with if share_with is not None else kept.share_with if kept else ())
    for other in shared:
        read_record(other)
    return Request(
        spec=spec,
        overrides=own,
        share_with=shared,
        cells=tuple(expand(spec, own, origin=source)),
        origin=Origin(source=known.origin.source if known else made_of, options=options),
    )


def check_request(request: Request) -> None:
    """Look at the inputs of every cell, and at the runs that there are already, before anything runs.

    Raises:
        KdrlError: as `check_inputs` and `require_same_recipe`, with the cell named.
    """
    seen: set[str] = set()
    for cell in request.cells:
        try:
            require_same_recipe(cell.run, cell.recipe)
            if (what := _without_seed(cell.recipe)) not in seen:
                check_inputs(cell.recipe)
            seen.add(what)
        except KdrlError as error:
            raise type(error)(*_with_cell(error, request, cell)) from None


def donors_of(request: Request) -> list[str]:
    """Every run with which the cells of a sweep may share: its own cells, and those of `share_with`."""
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


def _started(name: str | None) -> SweepRecord | None:
    if name is None or name.endswith((".yaml", ".yml")) or not SweepPaths.of(name).record.is_file():
        return None
    return read_record(name)


def _without_seed(recipe: Recipe) -> str:
    return config_hash(recipe.model_copy(update={"seed": 0}))


def _with_cell(error: KdrlError, request: Request, cell: Cell) -> tuple[Any, ...]:
    """The error's arguments with the cell in front of its text."""
    first, *rest = error.args or ("",)
    return (f"sweep {request.spec.name}, variant '{cell.variant}', seed {cell.seed}: {first}", *rest)
