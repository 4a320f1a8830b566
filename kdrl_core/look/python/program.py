"""`kdrl.run`: the program `kdrl run` as a function."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from kdrl_core import process_guard
from kdrl_core.config import load_recipe
from kdrl_core.errors import RecipeError, RunError, Stopped
from kdrl_core.ledger import RunPaths, default_run_name
from kdrl_core.look.python.reader import RunReader

_PROGRAM = (sys.executable, "-P", "-m", "flows.cli")
"""`kdrl`, wherever its script lies, and whatever package `flows` the working directory has."""
_INTERRUPTED = 130
_ERROR = "error: "
"""How the program begins the line that says why it failed."""


def run(
    recipe: str | Path = "miniature",
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    name: str | None = None,
) -> RunReader:
    """Run a recipe to its end, or continue the run `name` where its files end. Returns the finished run, to be read.

    This starts the program `kdrl run` as a process of its own and waits for it. So Prefect, signals and the memory of
    GPUs in this process stay as they are. Progress goes to stderr: a bar on a terminal, lines in a notebook or a log.

    Ctrl-C (in a notebook: interrupt the kernel) stops the run in order and raises KeyboardInterrupt; what is done is on
    disk. Call `run` again with the same name and recipe to go on. If this process is killed, the run is killed as well.

    Args:
        recipe: name of a shipped recipe (`kdrl recipes` lists them), or path of a YAML file.
        overrides: changes to the recipe: a mapping such as `{"stage2.steps": 100}`, or texts such as
            `"stage2.steps=100"`.
        name: folder below artifacts/runs (`$KDRL_ARTIFACTS`); default: recipe and time. An existing run is resumed.

    Raises:
        RecipeError: the recipe or a change is not valid; nothing was started.
        RunError: bad name, the run exists with another recipe, another process works on it, or it failed. The message
            is the program's own; on a terminal, where the program shows it itself, it says so.
        Stopped: somebody else stopped the program.
    """
    changes = _as_texts(overrides)
    loaded = load_recipe(recipe, changes)
    run_name = name or default_run_name(loaded.name)
    root = RunPaths.of(run_name).root
    command = [*_PROGRAM, "run", "--recipe", str(recipe), "--name", run_name]
    code, said, is_interrupted = _follow([*command, *(part for text in changes for part in ("--set", text))])
    if is_interrupted:
        raise KeyboardInterrupt
    if code == _INTERRUPTED:
        raise Stopped(f"run {run_name} was stopped; call run again with this name to go on")
    if code != 0:
        raise RunError(said or f"run {run_name} failed, {process_guard.how_ended(code)}; its last lines say why")
    return RunReader(root)


def _as_texts(overrides: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """Changes as `--set` takes them. JSON is YAML. Raises RecipeError for a change that is no text."""
    if isinstance(overrides, Mapping):
        return [f"{field}={json.dumps(value, default=_plain)}" for field, value in overrides.items()]
    texts = [overrides] if isinstance(overrides, str) else list(overrides)
    if wrong := [each for each in texts if not isinstance(each, str)]:
        raise RecipeError(f'override {wrong[0]!r}: give a text such as "stage2.steps=100", or a mapping of fields')
    return texts


def _plain(value: Any) -> Any:
    """A number of NumPy as one of Python, anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)


def _follow(command: list[str]) -> tuple[int, str, bool]:
    """Run a command and show what it says on stderr. A guard ends it if this process dies.

    Returns its exit code, the error that it named, empty if none is known, and whether Ctrl-C came here.
    """
    shown = sys.stderr if sys.stderr.isatty() else None
    process = subprocess.Popen(
        [sys.executable, "-I", process_guard.__file__, str(os.getpid()), *command],
        stdin=subprocess.DEVNULL,
        stdout=shown or subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=None if shown else {**os.environ, "TTY_COMPATIBLE": "0"},  # plain lines: notebooks set FORCE_COLOR
        start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
    )
    said, is_interrupted = "", False
    try:
        while True:
            try:
                for line in process.stdout or ():
                    sys.stderr.write(line)
                    said = line.removeprefix(_ERROR).strip() if line.startswith(_ERROR) else said
                return process.wait(), said, is_interrupted
            except KeyboardInterrupt:
                is_interrupted = True
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
    finally:
        if process.poll() is None:
            process_guard.kill_group(process.pid)
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
