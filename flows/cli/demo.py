"""`make demo`: the whole pipeline through a real Prefect server and worker, on loopback.

Starts server, work pool, deployments and worker, then `prefect deployment run kdrl/full-pipeline --watch`; prints the
result, and the next commands to try. At the end it stops all that it has started, also after a failure or Ctrl-C.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated

import psutil
import typer

from flows.cli.app import print_summary
from flows.cli.local_prefect import free_port, prefect_home, server_environment
from flows.cli.shared import PlainConsole
from flows.cli.watch import watching
from flows.guard import guard_children
from kdrl_core.errors import KdrlError
from kdrl_core.ledger import RunPaths, open_run

POOL = "kdrl"
_PROJECT = Path(__file__).parent.parent.parent
_SERVER_TIMEOUT_S = 120
_STOP_TIMEOUT_S = 10

_console = PlainConsole()


class DemoError(KdrlError, RuntimeError):
    """A part of the demo did not come up."""


class Processes:
    """Programs that the demo has started, each in its own session. `stop_all` ends them with their children."""

    def __init__(self, environment: dict[str, str], log_dir: Path) -> None:
        self._environment = environment
        self._log_dir = log_dir
        self._running: list[tuple[str, subprocess.Popen[bytes]]] = []

    def start(self, name: str, command: Sequence[str], cwd: Path = _PROJECT) -> subprocess.Popen[bytes]:
        """Start a program in the background, its output in `<name>.log`."""
        self._log_dir.mkdir(parents=True, exist_ok=True)
        with self.log(name).open("wb") as log:
            process = subprocess.Popen(
                command,
                env=self._environment,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._running.append((name, process))
        return process

    def call(self, name: str, command: Sequence[str]) -> None:
        """Run a program to its end. Raises DemoError with its last lines if it fails."""
        process = self.start(name, command)
        if process.wait() != 0:
            raise DemoError(f"{name} failed with exit code {process.returncode}: {self.tail(name)}")

    def log(self, name: str) -> Path:
        return self._log_dir / f"{name}.log"

    def tail(self, name: str) -> str:
        """The last lines of a program's output, and where the rest is."""
        lines = self.log(name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"{' | '.join(lines[-3:])} (all of it: {self.log(name)})"

    def last_line(self, name: str, *, containing: str) -> str | None:
        """The last line of a program's output that has the text, from the text on; None if no line has it."""
        lines = self.log(name).read_text(encoding="utf-8", errors="replace").splitlines()
        found = [line[line.index(containing) :] for line in lines if containing in line]
        return found[-1] if found else None

    def stop_all(self) -> None:
        """Stop every program and its children, newest first: SIGTERM, then SIGKILL."""
        family: list[psutil.Process] = []
        for _, process in reversed(self._running):
            with suppress(psutil.NoSuchProcess):
                parent = psutil.Process(process.pid)
                family += [parent, *parent.children(recursive=True)]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.terminate()
        _, alive = psutil.wait_procs(family, timeout=_STOP_TIMEOUT_S)
        for member in alive:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(alive, timeout=_STOP_TIMEOUT_S)


def demo(
    recipe: Annotated[str, typer.Option(help="Recipe to run.")] = "miniature",
    port: Annotated[int | None, typer.Option(help="Port of the Prefect server; default: any free one.")] = None,
    name: Annotated[str | None, typer.Option(help="Run name; default: demo and time.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a field of the recipe.")
    ] = None,
) -> None:
    """Run the pipeline once through a Prefect server and worker of its own."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    run_name = name or f"demo-{datetime.now().astimezone():%Y%m%d-%H%M%S}"
    started = time.monotonic()
    try:
        exit_code = _demo(recipe, port, run_name, overrides or [])
    except KdrlError as error:
        _console.say(f"error: {error}", style="red")
        exit_code = 1
    except KeyboardInterrupt:
        _console.print(f"\ninterrupted, everything stopped; go on with: kdrl resume {run_name}")
        exit_code = 130
    _console.say(f"demo ended with exit code {exit_code} after {time.monotonic() - started:.0f} s")
    raise SystemExit(exit_code)


def _demo(recipe: str, port: int | None, run_name: str, overrides: list[str]) -> int:
    from kdrl_core.boxes.preflight import check_inputs
    from kdrl_core.config import load_recipe

    loaded = load_recipe(recipe, overrides)
    paths = RunPaths.of(run_name)
    port = free_port(port)
    check_inputs(loaded)  # takes seconds: after what is seen at once
    prefect = str(Path(sys.executable).with_name("prefect"))
    guard_children()
    with ExitStack() as stack:
        processes = Processes(server_environment(port), prefect_home() / "logs")
        stack.callback(processes.stop_all)
        _console.say(f"Prefect server   http://127.0.0.1:{port}")
        command = [prefect, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        server = processes.start("server", command, cwd=prefect_home())  # where no settings of others lie
        _wait_until_healthy(server, processes, port)
        _console.say("deployments      kdrl deploy")
        processes.call("deploy", [sys.executable, "-m", "flows.cli", "deploy", "--pool", POOL])
        processes.start("worker", [prefect, "worker", "start", "--pool", POOL])
        command = [prefect, "deployment", "run", "kdrl/full-pipeline", "--watch", "-p", f"recipe={recipe}"]
        command += ["-p", f"run_name={run_name}", "-p", f"overrides={json.dumps(overrides)}"]
        _console.say(f"flow run         prefect deployment run kdrl/full-pipeline --watch -p run_name={run_name}")
        flow_run = processes.start("flow-run", command)
        with watching(paths, _console):
            exit_code = flow_run.wait()
    if exit_code != 0:
        # The failure hook writes cause and remedy into the worker's log, as one line.
        cause = processes.last_line("worker", containing=f"{run_name} failed: ") or processes.tail("flow-run")
        _console.say(f"error: {cause} (all of it: {processes.log('worker')})")
        return exit_code
    print_summary(open_run(run_name), _console)
    _print_next(run_name)
    return 0


def _wait_until_healthy(server: subprocess.Popen[bytes], processes: Processes, port: int) -> None:
    deadline = time.monotonic() + _SERVER_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise DemoError(f"the Prefect server ended with exit code {server.returncode}: {processes.tail('server')}")
        with (
            suppress(urllib.error.URLError, OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=2),
        ):
            return
        time.sleep(0.25)
    raise DemoError(f"the Prefect server was not healthy after {_SERVER_TIMEOUT_S} s: {processes.tail('server')}")


def _print_next(run_name: str) -> None:
    kdrl = os.path.relpath(Path(sys.executable).with_name("kdrl"))
    _console.say("\nNext:")
    more = open_run(run_name).recipe.stage("stage2").steps + 40
    _console.say(f"  # the numbers again, for programs\n  {kdrl} status {run_name} --json")
    _console.say(
        f"  # forty more KDRL steps, from where it ended\n  {kdrl} resume {run_name} --set stage2.steps={more}"
    )
    _console.say(f"  # the same without a teacher, to compare\n  {kdrl} run --name grpo --set stage2.objective=grpo")


if __name__ == "__main__":
    typer.run(demo)
