"""The program `kdrl` as a whole: help as wide as the terminal, hints beside errors of usage, and completion.

A shell calls the program for each completion, so heavy modules are imported where a name is asked for.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import typer
from typer.core import TyperGroup

from kdrl_core.errors import KdrlError

_NO_LIMIT = 10_000
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": _NO_LIMIT}
"""Settings of every command: `-h`, and help that uses the whole terminal."""
_UsageError: Any = typer.BadParameter.__base__  # click's, which typer does not export
_SENTENCE = re.compile(r".*?\.(?=\s|$)", re.DOTALL)
_EXTRA_FIELD = re.compile(r"unexpected extra argument.*\((?P<given>.*=.*)\)")


class Program(TyperGroup):
    """A group of commands. It lists them with the first sentence of their help, whole, and explains errors of usage."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, _first_sentence(each.help)) for name, each in commands if each is not None and not each.hidden]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Raises click's UsageError, with a hint if there is one."""
        try:
            return super().invoke(ctx)
        except _UsageError as error:
            if found := _EXTRA_FIELD.search(error.message):
                again = " ".join(f"--set {field}" for field in found["given"].split())
                error.message += f"; every field needs a --set of its own: {again}"
            if not error.message and getattr(getattr(error, "param", None), "name", "") == "recipe":  # it is missing
                error.message = "kdrl recipes lists them; the one to try is --recipe miniature"
            raise


def _first_sentence(text: str | None) -> str:
    found = _SENTENCE.match(text or "")
    return " ".join((found[0] if found else text or "").split())


def print_version(is_asked: bool) -> None:
    """Print kdrl's version and end the program, if it is asked for."""
    if is_asked:
        try:
            typer.echo(f"kdrl {version('kdrl')}")
        except PackageNotFoundError:  # a checkout that is not installed
            from kdrl_core import __version__

            typer.echo(f"kdrl {__version__}")
        raise typer.Exit


# --- completion -------------------------------------------------------------------------------------------------------


def complete_recipe(incomplete: str) -> list[str]:
    """Shipped recipes, and YAML files."""
    from kdrl_core.config import list_recipes

    return [*(name for name in list_recipes() if name.startswith(incomplete)), *_yaml_files(incomplete)]


def complete_sweep(incomplete: str) -> list[str]:
    """Shipped sweeps, those that were started, and YAML files."""
    from kdrl_core.look.sweeps.spec import list_sweeps

    names = dict.fromkeys([*list_sweeps(), *complete_started("")])
    return [*(name for name in names if name.startswith(incomplete)), *_yaml_files(incomplete)]


def complete_started(incomplete: str) -> list[str]:
    """Sweeps that were started."""
    from kdrl_core.look.sweeps.state import list_started

    with suppress(KdrlError):
        return [name for name in list_started() if name.startswith(incomplete)]
    return []


def complete_run(incomplete: str) -> list[str]:
    """Runs, the newest first."""
    from kdrl_core.ledger import list_runs

    with suppress(KdrlError):
        return [name for name in reversed(list_runs()) if name.startswith(incomplete)]
    return []


def complete_stage(incomplete: str) -> list[str]:
    """The stages of a recipe."""
    return [name for name in ("stage1", "stage2") if name.startswith(incomplete)]


def complete_verdict(incomplete: str) -> list[str]:
    """Kinds of verdicts."""
    from kdrl_core.types import VerdictKind

    return [kind.value for kind in VerdictKind if kind.value.startswith(incomplete)]


def complete_column(incomplete: str) -> list[str]:
    """Columns that responses can be sorted by."""
    from kdrl_core.look.rollouts.filters import SORTABLE

    return [name for name in SORTABLE if name.startswith(incomplete)]


def complete_field(incomplete: str) -> list[tuple[str, str]]:
    """Fields of a recipe as `--set` takes them, each with its description."""
    from kdrl_core.config import Recipe

    return [(f"{name}=", told) for name, told in _fields(Recipe, "") if name.startswith(incomplete)]


def _fields(section: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """Dotted name and description of each field of a section of recipes, and of the sections in it."""
    for name, field in section.model_fields.items():
        kinds = [kind for kind in get_args(field.annotation) or [field.annotation] if kind is not NoneType]
        yield f"{prefix}{name}", field.description or ""
        if len(kinds) == 1 and hasattr(kinds[0], "model_fields"):
            yield from _fields(kinds[0], f"{prefix}{name}.")


def _yaml_files(incomplete: str) -> list[str]:
    place = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    with suppress(OSError):
        found = [f"{each}/" if each.is_dir() else str(each) for each in sorted(place.iterdir())]
        return [each for each in found if each.startswith(incomplete) and each.endswith(("/", ".yaml", ".yml"))]
    return []
