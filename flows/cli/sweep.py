"""`kdrl sweep`: list, show, run, status and report of sweeps. The work is in kdrl_core.look.sweeps and flows.sweep."""

import logging
from typing import Annotated, Any

import typer

from flows.cli.printed_tables import print_comparison, print_listing, print_table
from flows.cli.program import Program, complete_recipe, complete_started, complete_sweep
from flows.cli.shared import JsonOption, SetOption, err, errors, interruptible, out, with_options
from kdrl_core.errors import RecipeError, RunError, Stopped

app = typer.Typer(
    cls=Program,
    no_args_is_help=False,
    invoke_without_command=True,
    rich_markup_mode=None,
)

SweepArgument = Annotated[
    str,
    typer.Argument(
        metavar="SWEEP",
        help="A shipped sweep (kdrl sweep list), one that was started, or a YAML file.",
        autocompletion=complete_sweep,
    ),
]
StartedArgument = Annotated[
    str,
    typer.Argument(metavar="SWEEP", help="Name of a sweep that was started.", autocompletion=complete_started),
]
ASKED: dict[str, Any] = {
    "name": Annotated[
        str | None, typer.Option(help="Name of the sweep, its folder and its runs; default: from the file.")
    ],
    "recipe": Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            help="Replaces the sweep's recipe: a shipped one, or a YAML file.",
            autocompletion=complete_recipe,
        ),
    ],
    "seeds": Annotated[
        str | None, typer.Option(help="How many seeds, e.g. 5, or which, e.g. 0,3,7; default: the sweep's.")
    ],
    "vary": Annotated[
        list[str] | None,
        typer.Option("--vary", metavar="FIELD=A,B,C", help="Run every variant with each value. Repeatable."),
    ],
    "overrides": SetOption,
    "share_with": Annotated[
        list[str] | None,
        typer.Option(
            "--share-with",
            metavar="SWEEP",
            autocompletion=complete_started,
            help="Also take over the same work that this sweep has finished. Repeatable.",
        ),
    ],
}
"""Options that define a sweep, by the parameter of `make_request` that they fill."""
WorkersOption = Annotated[
    int, typer.Option(min=1, help="Cells at a time; each has a process and needs a core or a GPU.")
]
DeploymentOption = Annotated[
    str | None,
    typer.Option(help="Let the workers of a deployment run the cells, e.g. kdrl/full-pipeline (see kdrl deploy)."),
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show Prefect's log as well.")]


def _asked(*, seeds: str | None, **given: Any) -> dict[str, Any]:
    """The values of ASKED as `make_request` takes them."""
    return {"seeds": _seeds(seeds), **given}


@app.callback()
@with_options("asked", {name: option for name, option in ASKED.items() if name != "share_with"}, _asked)
def vary_only(
    context: typer.Context,
    asked: dict[str, Any],
    workers: WorkersOption = 1,
    verbose: VerboseOption = False,
) -> None:
    """Compare variants over seeds: runs that share common work, then one table.

    Without a command, run every combination of the values of --vary, e.g.
    kdrl sweep --recipe miniature --vary stage2.beta.decay=0.0,0.005 --seeds 3
    """
    if context.invoked_subcommand is not None:
        if verbose or workers != 1 or any(value not in (None, []) for value in asked.values()):
            with errors():
                raise RecipeError(f"options go after the command: kdrl sweep {context.invoked_subcommand} … --vary …")
        return
    if not asked["vary"]:
        typer.echo(context.get_help())
        raise SystemExit(2)
    _run(None, asked, workers, None, verbose)


@app.command("list")
def list_command(as_json: JsonOption = False) -> None:
    """List the shipped sweeps, and those that were started here.

    \b
    kdrl sweep list
    """
    from kdrl_core.look.sweeps.spec import list_sweeps, load_sweep
    from kdrl_core.look.sweeps.state import list_started, read_record

    with errors():
        rows = [
            {"sweep": name, "started": False, "description": load_sweep(name).description} for name in list_sweeps()
        ]
        for name in list_started():
            row = {"sweep": name, "started": True, "description": read_record(name).spec.description}
            rows = [*(one for one in rows if one["sweep"] != name), row]
        rows.sort(key=lambda row: str(row["sweep"]))
        if as_json:
            out.print_json(data=rows)
            return
        shown = [[str(row["sweep"]), "yes" if row["started"] else "", str(row["description"])] for row in rows]
        print_listing(["sweep", "started", "description"], shown, num_text=3)


@app.command()
@with_options("asked", ASKED, _asked)
def show(
    sweep: SweepArgument,
    asked: dict[str, Any],
    as_yaml: Annotated[
        bool, typer.Option("--yaml", help="Print the sweep's file, which you may change and run.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Validate every cell of a sweep, and show what each variant is, where it is described, the work that cells share,
    and the number of steps to train. Models and data need not be there yet.

    \b
    kdrl sweep show table1 -r paper-1.5b
    kdrl sweep show baselines --yaml > mine.yaml   a sweep of your own to begin with
    """
    from kdrl_core.look.sweeps.equality import differences, last_stage_told, unequal_notes
    from kdrl_core.look.sweeps.request import estimate, make_request
    from kdrl_core.look.sweeps.spec import dump_sweep

    with errors():
        request = make_request(sweep, **asked)
        if as_yaml:
            typer.echo(dump_sweep(request.spec), nl=False)
            return
        work = estimate(request.cells)
        variants = [cell for cell in request.cells if cell.seed == request.cells[0].seed]
        first, sources = variants[0].recipe, request.spec.sources
        fields = {c.variant: differences(first, c.recipe) for c in variants} | {
            variants[0].variant: last_stage_told(first)
        }
        if as_json:
            cells = [
                {"run": c.run, "variant": c.variant, "seed": c.seed, "overrides": list(c.overrides)}
                for c in request.cells
            ]
            told = [
                {"variant": c.variant, "source": sources.get(c.label), "fields": fields[c.variant]} for c in variants
            ]
            shared = {part: {"cells": have, "made": made} for part, (have, made) in work.by_part.items()}
            steps = {"alone": work.alone, "shared": work.shared, "to_train": work.to_train}
            found = {"sweep": request.spec.name, "variants": told, "cells": cells, "shared": shared, "steps": steps}
            out.print_json(data=found)
            return
        out.say(f"{request.spec.name}: {request.spec.description}  Recipe: {request.spec.recipe}.")
        rows = [[c.variant, "\n".join(fields[c.variant]) or "–", sources.get(c.label, "")] for c in variants]
        print_table(["variant", "fields (below the first: other than there)", "source"], rows, num_text=3)
        for note in unequal_notes({c.variant: c.recipe for c in variants}):
            out.say(note)
        seeds_told = ", ".join(str(seed) for seed in dict.fromkeys(c.seed for c in request.cells))
        out.print(f"{len(request.cells)} cells: {len(rows)} variants × seeds {seeds_told}")
        rows = [[part, str(have), str(made)] for part, (have, made) in work.by_part.items()]
        print_table(["shared", "cells", "times done"], rows)
        out.say(f"{work.to_train:,} steps to train; {work.alone:,} if the cells shared nothing")


@app.command()
@with_options("asked", ASKED, _asked)
def run(
    sweep: SweepArgument,
    asked: dict[str, Any],
    workers: WorkersOption = 1,
    deployment: DeploymentOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Run a sweep, or continue its unfinished cells; then print its table. Exit code 0 if all cells are finished.

    Every cell is validated before the first one starts. If a cell fails, it is reported, and the others go on. Options
    that you leave out keep the values that the sweep was started with.

    \b
    kdrl sweep run baselines --workers 2
    kdrl sweep run baselines --name long --set stage2.steps=200 --seeds 5
    """
    _run(sweep, asked, workers, deployment, verbose)


@app.command()
def status(sweep: StartedArgument, as_json: JsonOption = False) -> None:
    """Show the state of a sweep's cells. Each cell is a run: kdrl status, resume and check work on it.

    \b
    kdrl sweep status baselines
    """
    from kdrl_core.look.sweeps.state import SweepPaths, cell_status, read_record

    with errors():
        record, paths = read_record(sweep), SweepPaths.of(sweep)
        statuses = [cell_status(paths, cell) for cell in record.cells]
        if as_json:
            out.print_json(data={"sweep": sweep, "cells": [one.to_json() for one in statuses]})
            return
        rows = [[one.run, one.state.value, _progress(one.run), one.detail] for one in statuses]
        print_listing(["cell", "state", "progress", "detail"], rows, num_text=3)
        counts = {
            state: sum(one.state is state for one in statuses) for state in dict.fromkeys(s.state for s in statuses)
        }
        (out if out.is_terminal else err).print(", ".join(f"{count} {state.value}" for state, count in counts.items()))


@app.command()
def report(sweep: StartedArgument, as_json: JsonOption = False) -> None:
    """Print the tables of a sweep, finished or not, and write the report: an HTML page, Markdown, CSV and JSON.

    \b
    kdrl sweep report baselines
    """
    from kdrl_core.look.sweeps.comparison import write_sweep_report
    from kdrl_core.look.sweeps.state import SweepPaths

    with errors():
        table = write_sweep_report(sweep)
        if as_json:
            out.print_json(data=table.to_json())
        else:
            print_comparison(table, SweepPaths.of(sweep).report / "sweep.html")


def _run(sweep: str | None, asked: dict[str, Any], workers: int, deployment: str | None, verbose: bool) -> None:
    from kdrl_core.ledger import require_free
    from kdrl_core.look.sweeps.request import check_request, make_request
    from kdrl_core.look.sweeps.state import SweepPaths

    with errors():
        request = make_request(sweep, **asked)
        check_request(request)
        from flows.cli.local_prefect import use_private_prefect

        started = request.spec.name
        require_free(SweepPaths.of(started).lock)
        with interruptible(f"go on with: kdrl sweep run {started}"):
            wait_for_server = use_private_prefect(log_level="INFO" if verbose else "CRITICAL")
            err.print(f"sweep {started}: starting …")
            from flows.sweep import sweep as sweep_flow

            wait_for_server()
            _tell_events()
            try:
                sweep_flow(source=sweep, **asked, workers=workers, deployment=deployment)
            except Stopped:
                raise
            except RunError:
                _print_if_there(started)
                raise
        _print_if_there(started)


def _seeds(text: str | None) -> int | list[int] | None:
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--seeds {text}: give how many, e.g. 5, or which, e.g. 0,3,7") from None
    return numbers if "," in text else numbers[0]


def _tell_events() -> None:
    """Print what the sweep logs about its cells, except warnings: `use_private_prefect` prints those."""
    handler = logging.Handler(logging.INFO)
    handler.addFilter(lambda record: record.levelno < logging.WARNING)
    handler.emit = lambda record: err.say(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("kdrl.sweep").addHandler(handler)


def _print_if_there(sweep: str) -> None:
    from kdrl_core.look.sweeps.comparison import write_sweep_report
    from kdrl_core.look.sweeps.state import SweepPaths

    if SweepPaths.of(sweep).record.is_file():
        print_comparison(write_sweep_report(sweep), SweepPaths.of(sweep).report / "sweep.html")


def _progress(run: str) -> str:
    from kdrl_core.ledger import RunPaths
    from kdrl_core.look.reporting.run_summary import named_status

    if not RunPaths.of(run).root.is_dir():
        return ""
    found: dict[str, Any] = named_status(run)
    return str(found.get("progress", ""))
