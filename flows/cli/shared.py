"""What the commands of `kdrl` have in common: consoles, options, errors, checks of an output, progress in a log."""

import functools
import inspect
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from flows.cli.program import complete_field, complete_recipe, complete_run
from flows.guard import guard_children
from flows.signals import STOPPED, Signals
from kdrl_core.config.paths import artifacts_root
from kdrl_core.errors import DataError, KdrlError, Stopped, told, visible
from kdrl_core.ledger.lock import log_of, redact


class PlainConsole(Console):
    """Shows text as it is: much of what kdrl prints comes from models or from other people's files.

    Markup and emoji codes have no effect, and numbers get no colour. Control characters are spelled out, because they
    could rewrite the terminal.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def say(self, text: str | Text, style: str | None = None) -> None:
        """Print a text whole, however long its lines are."""
        self.print(text, style=style, soft_wrap=True)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


out = PlainConsole()
err = PlainConsole(stderr=True)

_LINE_EVERY_S = 10.0


class OnError(StrEnum):
    """What to do with malformed rows."""

    FAIL = "fail"
    DROP = "drop"


RecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe",
        "-r",
        help="Name of a shipped recipe (see: kdrl recipes), or path of a YAML file.",
        autocompletion=complete_recipe,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="FIELD=VALUE",
        help="Change a field, e.g. --set stage2.beta.init=2e-3. Repeatable.",
        autocompletion=complete_field,
    ),
]
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="Name of a run (see: kdrl status).", autocompletion=complete_run)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
OnErrorOption = Annotated[
    OnError | None, typer.Option(help="Malformed rows: stop, or drop and count; default: the recipe's.")
]
ColumnsOption = Annotated[
    str | None,
    typer.Option(
        metavar="FIELD=COLUMN,…",
        help="Columns with names of their own: problem=question,answer=reward_model.ground_truth; also id, source.",
    ),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]


_NOT_OURS = ("prefect.", "httpx", "httpcore", "requests.", "urllib3.", "torch.")
"""Modules whose exceptions tell of a server, a network or a device that failed."""


@contextmanager
def errors() -> Iterator[None]:
    """An error ends the program with one line and exit code 1. The traceback is in the run's log, or in a file of its
    own if the command works on no run."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        text, log = told(error), log_of(error)
        if not isinstance(error, KdrlError):
            is_ours = not isinstance(error, OSError | MemoryError) and not type(error).__module__.startswith(_NOT_OURS)
            text = redact(text) + ("; this is a bug in kdrl, please report it" if is_ours else "")
            log = log or _keep_traceback(error)
        with suppress(OSError, ValueError):  # the terminal may be gone
            err.say(f"error: {text}" + (f" (log: {log})" if log else ""), style="red")
        raise SystemExit(1) from None


def _say_at_the_end(text: str) -> None:
    err.show_cursor()  # a live display may have hidden it
    err.say(text)


def _keep_traceback(error: Exception) -> str | None:
    """The file that now holds the traceback of an error; None if it cannot be written."""
    content = redact(f"{' '.join(sys.argv)}\n{''.join(traceback.format_exception(error))}")
    for folder in (artifacts_root() / "logs", Path(tempfile.gettempdir())):
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"kdrl-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
            file.write_text(content, encoding="utf-8")
            return str(file)
    return None


@contextmanager
def interruptible(way_on: str, *, has_children: bool = True) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP end the program in order, soon (`flows.signals`): workers and servers stop, `way_on`
    is printed, the exit code is the shell's for the signal. If this process is killed, a guard ends its children."""
    if has_children:
        guard_children()
    last_words = f"interrupted; {way_on}"
    with Signals(_say_at_the_end, last_words) as came:
        try:
            yield
            return
        except KeyboardInterrupt:
            text = last_words
        except Stopped as stop:
            text = last_words if came.number else f"{stop}"
        came.is_told = True
        with suppress(OSError, ValueError):
            err.say(text)
    raise SystemExit(STOPPED if came.number else 1)


def with_options(
    parameter: str, options: Mapping[str, Any], fill: Callable[..., Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command: `options` (name → annotated type, default None) take the place of its `parameter`, which gets
    `fill(**values)`. A KdrlError in `fill` ends the program like any other."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def call(**given: Any) -> None:
            with errors():
                filled = fill(**{name: given.pop(name) for name in options})
            command(**given, **{parameter: filled})

        signature, kind = inspect.signature(command), inspect.Parameter.KEYWORD_ONLY
        added = [inspect.Parameter(name, kind, default=None, annotation=one) for name, one in options.items()]
        parameters: list[inspect.Parameter] = []
        for own in signature.parameters.values():
            parameters += added if own.name == parameter else [own.replace(kind=kind)]
        call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return functools.update_wrapper(call, command, assigned=("__module__", "__name__", "__doc__"))

    return decorate


def check_output(
    output: Path,
    inputs: Iterable[Path],
    *,
    what: str,
    force: bool,
    written_as: str = "Parquet",
    suffixes: Sequence[str] = (".parquet",),
) -> None:
    """Raise DataError if `what` cannot be written to `output`: wrong suffix, an input, or it exists without --force."""
    if output.suffix not in suffixes:
        raise DataError(
            f"--output {output}: {what} are written as {written_as}; give a name that ends in {' or '.join(suffixes)}"
        )
    if output.is_dir():
        raise DataError(f"--output {output} is a folder; name a file in it")
    if output.resolve() in [file.expanduser().resolve() for file in inputs]:
        raise DataError(f"--output {output} is an input as well; give another file")
    if output.exists() and not force:
        raise DataError(f"--output {output} exists; give another file, or --force to replace it")


class LogLines:
    """Progress for a log: a line every few seconds, none twice."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = time.monotonic()
        self._shown = ""

    def show(self, line: str, *, is_last: bool = False) -> None:
        """Print the line if it is time for one, or the last."""
        if line != self._shown and (is_last or time.monotonic() - self._last > _LINE_EVERY_S):
            self._last, self._shown = time.monotonic(), line
            self._console.print(line)


@contextmanager
def counted_progress(console: Console, unit: str) -> Iterator[Callable[[str, int, int | None], None]]:
    """Yields `progress(name, done, total)`, total None if unknown. It shows a bar on a terminal, else log lines."""
    if not console.is_terminal:
        lines = LogLines(console)
        yield lambda name, done, total: lines.show(
            f"{name}: {done:,} {unit}" if total is None else f"{name}: {done:,}/{total:,} {unit}", is_last=done == total
        )
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(unit, total=None)
        yield lambda name, done, total: bar.update(task, description=name, completed=done, total=total)
