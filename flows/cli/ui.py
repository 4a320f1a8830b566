"""`kdrl ui`: the rollouts of runs in a web browser."""

import webbrowser
from contextlib import suppress
from typing import Annotated

import typer

from flows.cli.shared import counted_progress, err, errors, interruptible, out


def ui(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Names of runs (see: kdrl status), or folders.")],
    port: Annotated[
        int, typer.Option(min=0, max=65_535, help="Port on 127.0.0.1; 0: 8741 if it is free, else any free one.")
    ] = 0,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open it in the web browser.")] = False,
) -> None:
    """Look through runs in a web browser: trends over steps, tables of rollouts, tokens, groups, two runs side by side.

    You may use it while a run is going on. It only reads, except that it first makes an index of the rollouts. It
    listens on loopback alone; from another machine, use a tunnel: ssh -L 8741:127.0.0.1:8741 HOST. Ctrl-C ends it.

    \b
    kdrl ui first grpo
    """
    from kdrl_core.look.rollouts.query import RolloutStore
    from kdrl_core.look.ui.app import create_app, listen, server_of, url_of

    with errors(), interruptible("nothing was changed", has_children=False), listen(port) as listening:
        with counted_progress(err, "steps") as progress:
            store = RolloutStore.open(runs, progress=lambda done, total: progress("reading", done, total))
        with store:
            for damaged in store.damaged:
                err.say(f"left out: {damaged.path}: {damaged.problem}", style="yellow")
            out.say(f"kdrl ui: {url_of(listening)}  (Ctrl-C ends it)")
            if open_browser:
                webbrowser.open(url_of(listening))
            with suppress(KeyboardInterrupt):
                server_of(create_app(store)).run(sockets=[listening])
