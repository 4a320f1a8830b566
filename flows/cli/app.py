"""The command line `kdrl`. Heavy imports wait until a command has checked its input: a bad recipe fails in a second."""

from contextlib import nullcontext
from typing import Annotated, Any

import typer

from flows.cli.check import check, recover
from flows.cli.data import filter_command, label
from flows.cli.deploy import deploy
from flows.cli.doctor import doctor
from flows.cli.evaluate import evaluate
from flows.cli.plan import plan
from flows.cli.printed_tables import alarm_mark, fitted, grid, print_alarms, print_listing
from flows.cli.program import CONTEXT, Program, complete_recipe, complete_run, print_version
from flows.cli.report import report
from flows.cli.rollouts import app as rollouts_app
from flows.cli.serve import bake_teacher, serve
from flows.cli.shared import (
    JsonOption,
    PlainConsole,
    RecipeOption,
    RunArgument,
    SetOption,
    err,
    errors,
    interruptible,
    out,
)
from flows.cli.sweep import app as sweep_app
from flows.cli.ui import ui
from flows.cli.verify import verify_command
from kdrl_core.errors import RunError

app = typer.Typer(
    name="kdrl",
    cls=Program,
    context_settings=CONTEXT,
    help="Post-train a reasoning LLM with a teacher and a verifiable reward (KDRL), as a resumable Prefect pipeline.",
    epilog="Start here:  kdrl run --recipe miniature   then   kdrl status",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _program(
    _: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


_STATUS_COLUMNS = ["run", "state", "progress", "reward", "alarms", "started"]

VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show Prefect's log instead of the progress display.")
]


@app.command()
def run(
    recipe: RecipeOption = "miniature",
    name: Annotated[
        str | None, typer.Option(help="Run name; default: recipe and time. An existing run is resumed.")
    ] = None,
    overrides: SetOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Run the full pipeline in this process: filter, stage 1, stage 2, evaluation, report.

    Nothing has to be set up: without PREFECT_API_URL the run starts a Prefect API of its own and ends it again.
    You may interrupt the run at any time (Ctrl-C); `kdrl resume` continues it from its files.

    \b
    kdrl run --recipe miniature --name first
    kdrl run --name grpo --set stage2.objective=grpo --set stage2.steps=60   a --set for each field
    kdrl run --recipe mine.yaml                                             see: kdrl recipes miniature > mine.yaml
    """
    from kdrl_core.config import load_recipe
    from kdrl_core.config.fetch import fetched
    from kdrl_core.ledger import RunPaths, default_run_name, require_free, require_same_recipe, validate_run_name
    from kdrl_core.look.planning.machine import require_runnable

    with errors():
        loaded = fetched(load_recipe(recipe, overrides or []))
        run_name = validate_run_name(name or default_run_name(loaded.name))
        require_free(RunPaths.of(run_name).lock)
        require_same_recipe(run_name, loaded)
        require_runnable(loaded)
        _run_in_process(recipe, run_name, overrides or [], verbose=verbose)


@app.command()
def resume(
    run_name: RunArgument,
    overrides: SetOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Continue a run from its files; published steps are not computed again.

    `--set` changes fields that published files do not depend on, e.g. --set stage2.steps=400 for more steps.

    \b
    kdrl resume first
    kdrl resume first --set stage2.steps=400
    """
    from kdrl_core.config import load_recipe
    from kdrl_core.config.fetch import fetched
    from kdrl_core.ledger import open_run, require_free, require_resumable, require_same_recipe
    from kdrl_core.look.planning.machine import require_runnable

    with errors():
        opened = open_run(run_name)
        require_free(opened.paths.lock)
        loaded = fetched(load_recipe(opened.paths.recipe, overrides or []))
        require_resumable(opened, loaded)
        from kdrl_core.boxes.completion import is_finished

        if loaded == opened.recipe and is_finished(opened, verify=True):
            out.print(f"nothing to do: run {run_name} is finished; its report is {opened.paths.report / 'report.html'}")
            return
        require_same_recipe(run_name, loaded)
        require_runnable(loaded)
        _run_in_process(str(opened.paths.recipe), run_name, overrides or [], verbose=verbose)


@app.command()
def status(
    run_name: Annotated[
        str | None,
        typer.Argument(metavar="[RUN]", help="One run in detail; default: all runs.", autocompletion=complete_run),
    ] = None,
    as_json: JsonOption = False,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Follow the run until it ends (Ctrl-C to leave).")
    ] = False,
) -> None:
    """Show the state of all runs: stage, step, reward, alarms, the process at work. With RUN: metrics and results.

    \b
    kdrl status
    kdrl status first --watch
    kdrl status | cut -f1,3   piped, a list is tab-separated
    """
    from kdrl_core.ledger import list_runs, open_run

    with errors():
        if run_name is None:
            if watch:
                raise RunError("--watch follows one run; name it: kdrl status RUN --watch")
            names = list_runs()
            if not names and not as_json:
                out.print("no runs yet; start one with: kdrl run --recipe miniature")
                return
            rows = []
            if names:
                from kdrl_core.look.reporting.run_summary import named_status  # costs seconds

                rows = [named_status(name) for name in names]
            if as_json:
                out.print_json(data=rows)
                return
            _print_status(rows)
            return
        opened = open_run(run_name)
        from kdrl_core.look.reporting.run_summary import run_status

        if watch:
            from flows.cli.watch import follow

            follow(opened.paths, out)
        if as_json:
            from kdrl_core.look.reporting.run_summary import summarize

            out.print_json(data={**run_status(opened), "summary": summarize(opened).to_json()})
            return
        _print_status([run_status(opened)])
        print_alarms(opened, are_told=watch and not out.is_terminal)
        print_summary(opened)


@app.command()
def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", help="A recipe to print with every default filled in.", autocompletion=complete_recipe
        ),
    ] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the shipped recipes, or validate one and show every field.

    \b
    kdrl recipes
    kdrl recipes miniature --set stage2.beta.init=0.1
    kdrl recipes miniature > mine.yaml   a file of your own to begin with
    """
    from kdrl_core.config import dump_recipe, list_recipes, load_recipe

    with errors():
        if name is not None:
            recipe = load_recipe(name, overrides or [])
            if as_json:
                out.print_json(data=recipe.model_dump(mode="json"))
            else:
                typer.echo(dump_recipe(recipe), nl=False)
            return
        rows = [{"recipe": each, "description": load_recipe(each).description} for each in list_recipes()]
        if as_json:
            out.print_json(data=rows)
        else:
            _print_rows(rows, ["recipe", "description"])


app.command("filter")(filter_command)
app.command()(label)
app.command()(evaluate)
app.command("verify")(verify_command)
app.command()(recover)
app.command()(check)
app.command()(bake_teacher)
app.command()(serve)
app.command()(plan)
app.command()(doctor)
app.command()(deploy)
app.command()(report)
app.command()(ui)
app.add_typer(sweep_app, name="sweep")
app.add_typer(rollouts_app, name="rollouts")


def print_summary(opened: Any, console: PlainConsole = out) -> None:
    """Print a run's accuracy and phase tables, and where its files lie."""
    from kdrl_core.look.reporting.run_summary import summarize, tables_of

    summary = summarize(opened)
    for table in tables_of(summary):
        kinds = "L".ljust(table.num_text, "l").ljust(len(table.header), "r")
        rows = fitted(table, console.width)
        console.print(grid(table.header, kinds, rows, title=table.title, title_justify="left", title_style="bold"))
        console.print()
    for what, path in summary.paths.items():
        console.say(f"{what:>8}  {path}")


def _run_in_process(recipe: str, run_name: str, overrides: list[str], *, verbose: bool) -> None:
    """Run the flow here, with the progress display. Raises KdrlError if it fails."""
    from flows.cli.local_prefect import use_private_prefect
    from flows.cli.watch import watching
    from kdrl_core.ledger import RunPaths, open_run

    with interruptible(f"go on with: kdrl resume {run_name}"):
        wait_for_server = use_private_prefect(log_level="INFO" if verbose else "CRITICAL")
        err.print(f"run {run_name}: starting …")
        from flows.full_pipeline import full_pipeline
        from kdrl_core.boxes.session import close_sessions

        wait_for_server()
        try:
            with nullcontext() if verbose else watching(RunPaths.of(run_name), err):
                full_pipeline(recipe=recipe, run_name=run_name, overrides=overrides)
        finally:
            close_sessions()
    print_summary(open_run(run_name))


def _print_rows(rows: list[dict[str, Any]], columns: list[str]) -> None:
    lines = []
    for row in rows:
        started = str(row.get("started") or "")[:16].replace("T", " ")
        shown = {**row, "started": started, "alarms": alarm_mark(row.get("alarms") or [])}
        if row.get("reward") is not None:
            shown["reward"] = round(row["reward"], 3)
        lines.append(["" if shown.get(column) is None else str(shown[column]) for column in columns])
    print_listing(columns, lines, num_text=len(columns))


def _print_status(rows: list[dict[str, Any]]) -> None:
    _print_rows(rows, _STATUS_COLUMNS)
    for row in rows:
        if found := row.get("last_error"):
            out.say(f"last error of {row['run']}, {found['at'][:16]}: {found['error']} (log: {found['log']})")


def main() -> None:
    """Entry point of the `kdrl` program."""
    with errors():
        app()


if __name__ == "__main__":
    main()
