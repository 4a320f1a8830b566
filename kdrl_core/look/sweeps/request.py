"""From the options of a command to a sweep and its cells. All of them are validated before anything runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
"""Source of a sweep without a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A sweep that is ready to run."""

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
    vary: Sequence[str] | None = None,
    overrides: Sequence[str] | None = None,
    share_with: Sequence[str] | None = None,
) -> Request:
    """The sweep that was asked for, with its cells.

    A sweep that was started before goes on as it was started, except for what is given here. A YAML file is read anew,
    and the options that the sweep was started with are applied to it again.

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
        name = name or _name(recipe, vary or ())
    values, record, origin = _before(source, name)
    given = {option: value for option, value in (("recipe", recipe), ("seeds", seeds)) if value is not None}
    varied = dict(map(parse_vary, vary or ()))
    options = {**origin.options, **given, "vary": {**origin.options.get("vary", {}), **varied}}
    if _is_file(source):
        given, varied = {n: value for n, value in options.items() if n != "vary"}, options["vary"]
    values = {**values, **given, **({} if name is None else {"name": name})}
    values["vary"] = {**values["vary"], **varied}
    for of_recipe in values.get("recipes", {}).values():
        of_recipe["vary"] = {field: some for field, some in of_recipe["vary"].items() if field not in varied}
    spec = validate_sweep(values, origin=source or _VARY)
    own = tuple(overrides if overrides is not None else record.overrides if record else ())
    shared = tuple(share_with if share_with is not None else record.share_with if record else ())
    for other in shared:
        read_record(other)
    cells = tuple(expand(spec, own, origin=source))
    return Request(spec=spec, overrides=own, share_with=shared, cells=cells, origin=replace(origin, options=options))


def _before(source: str | None, name: str | None) -> tuple[dict[str, Any], SweepRecord | None, Origin]:
    """What a request starts from: the sweep's values, its record if it was started, and what it was made of.

    Raises:
        RecipeError: there is no such sweep, or `name` is that of a sweep made of another one.
    """
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
    """Check the inputs of every cell, and the runs that exist already, before anything runs.

    Raises:
        KdrlError: as `check_inputs` and `require_same_recipe`; the message names the cell.
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


def _without_seed(recipe: Recipe) -> str:
    return config_hash(recipe.model_copy(update={"seed": 0}))


def _with_cell(error: KdrlError, request: Request, cell: Cell) -> tuple[Any, ...]:
    """The error's arguments with the cell in front of its text."""
    first, *rest = error.args or ("",)
    return (f"sweep {request.spec.name}, variant '{cell.variant}', seed {cell.seed}: {first}", *rest)
