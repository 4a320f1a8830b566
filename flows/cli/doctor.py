"""`kdrl doctor`: try a recipe on this machine before a run is paid for. kdrl_core.look.doctor does the work."""

from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.shared import JsonOption, PlainConsole, RecipeOption, SetOption, err, errors, interruptible, out

_MARKS = {"ok": ("✓", "green"), "failed": ("✗", "red"), "skipped": ("–", "dim")}
_WIDTH = 25


def doctor(
    recipe: RecipeOption,
    overrides: SetOption = None,
    folder: Annotated[
        Path | None, typer.Option(help="Folder on the disk to measure; default: the artifacts folder.", file_okay=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check this machine for a recipe, then do a step of it for real, with random weights of the recipe's shapes.

    Nothing is downloaded: models and data need not be there. First it checks versions, driver, GPUs, links, /dev/shm,
    limits and disk. Then a process of its own starts the engines, ranks and workers of the recipe. With the code of a
    run, in the order of a step, it samples, scores, verifies, updates at the longest sequences, syncs, saves and loads.

    \b
    kdrl doctor --recipe paper-1.5b
    kdrl doctor --recipe paper-1.5b --set trainer.ranks=4 --folder /scratch/kdrl
    kdrl doctor --recipe miniature --json > doctor.json

    A line for each check: ✓ fine, ✗ failed, with what to do about it, – skipped, with the reason. It resumes no run and
    leaves nothing behind but cached kernels. Exit code 0 if nothing failed, else 1.
    """
    from kdrl_core.config import load_recipe
    from kdrl_core.look.doctor.examine import examine

    console = err if as_json else out
    with errors(), interruptible("nothing is left behind"):
        loaded = load_recipe(recipe, overrides or [])
        with err.status("") as waiting:

            def show(event: dict[str, Any]) -> None:
                if event["event"] == "begin":
                    waiting.update(f"{event['check']} …")
                else:
                    _show(console, event)

            diagnosis = examine(loaded, folder=folder, on_event=show)
        if as_json:
            out.print_json(data=diagnosis.to_json())
        failed = diagnosis.failed
        seconds = sum(each.seconds for each in diagnosis.checks)
        counted = f"{len(diagnosis.checks)} checks in {seconds:,.0f} s"
        console.say(f"{counted}: {', '.join(failed)} failed" if failed else f"{counted}: nothing failed")
        if failed:
            raise SystemExit(1)


def _show(console: PlainConsole, event: dict[str, Any]) -> None:
    """The line of a check; below a failed one what to do, and the end of the log of a process that died."""
    mark, style = _MARKS[event["status"]]
    console.say(f"{mark} {event['check']:<{_WIDTH}} {event['seconds']:>7.1f} s  {event['says']}", style=style)
    if event.get("remedy"):
        console.say(f"  → {event['remedy']}")
    if log := event.get("figures", {}).get("log"):
        for line in log.splitlines():
            console.say(f"    {line}", style="dim")
