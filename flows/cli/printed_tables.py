"""What several commands print: tables, and the alarms that a run has raised."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import OverflowMethod
from rich.table import Table as RichTable
from rich.text import Text

from flows.cli.shared import PlainConsole, out
from kdrl_core.errors import visible

if TYPE_CHECKING:
    from kdrl_core.alarms import Alarm
    from kdrl_core.look.reporting.run_summary import Table
    from kdrl_core.look.sweeps.table import SweepTable

PIPED_WIDTH = 160
"""Characters of a line that is not for a terminal."""


def print_comparison(table: "SweepTable", report: Path) -> None:
    """Print the tables of a sweep or of runs, and where their report lies."""
    for one in table.tables():
        _print_table(one)
    out.print("▲ best, △ second best of the variants; – is missing")
    for note in table.notes:
        out.say(note)
    out.say(f"report  {report}")


def fitted(table: "Table", width: int) -> list[list[str]]:
    """The rows of a table. If they are wider than `width`, intervals stand on a line of their own."""
    columns = zip(table.header, *table.rows, strict=True)
    needed = sum(max(map(len, column)) + 3 for column in columns)
    return table.rows if needed <= width else _broken(table)


def grid(
    header: Sequence[str],
    kinds: str,
    rows: Iterable[Sequence[str | Text]],
    overflow: OverflowMethod = "ellipsis",
    **rest: Any,
) -> RichTable:
    """A plain table. `kinds` has one letter per column: l or L aligns it left, r or R right; L and R do not wrap."""
    table = RichTable(box=SIMPLE_HEAD, show_edge=False, **rest)
    for column, kind in zip(header, kinds, strict=True):
        table.add_column(column, justify="left" if kind in "lL" else "right", no_wrap=kind in "LR", overflow=overflow)
    for row in rows:
        table.add_row(*row)
    return table


def print_table(header: list[str], rows: list[list[str]], *, num_text: int = 1) -> None:
    """Print a table of a page, whose first `num_text` columns are text. Long cells are folded."""
    kinds = ("L" if num_text == 1 else "l" * num_text).ljust(len(header), "r")
    (out if out.is_terminal else PlainConsole(width=PIPED_WIDTH)).print(grid(header, kinds, rows, overflow="fold"))


def print_listing(header: list[str], rows: list[list[str]], *, num_text: int = 1) -> None:
    """Print a list: on a terminal a table, of as many columns as fit it, else tab-separated values."""
    if out.is_terminal:
        header, rows, left_out = narrowed(header, rows, out.width)
        letters = ["l" if _is_text(column) else "L" for column in zip(*rows, strict=True)] or ["L"] * len(header)
        kinds = "".join(letters[:num_text]).ljust(len(header), "r")
        out.print(grid(header, kinds, rows, overflow="fold"))
        tell_left_out(left_out, out)
    else:
        print_tsv(header, rows)


def print_tsv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print tab-separated values, a line each, after a line with the names of the columns. None is empty."""
    for row in [header, *rows]:
        typer.echo("\t".join("" if cell is None else " ".join(visible(str(cell)).split()) for cell in row))


_GAP = 3
_LEAST_TEXT = 20
"""Characters of a column of text, whose cells can be folded or cut, in a narrow table."""


def narrowed(
    header: Sequence[str], rows: Sequence[Sequence[Any]], width: int, *, drop: Sequence[str] | None = None
) -> tuple[list[str], list[list[Any]], list[str]]:
    """A table without the columns for which `width` is too small, and the names of those.

    Args:
        drop: columns that may be left out, in this order; None: from the last to the second.
    """
    needs = {}
    for name, *cells in zip(header, *rows, strict=True):
        most = _LEAST_TEXT if _is_text(cells) else width
        needs[name] = max(cell_len(name), *(min(cell_len(str(cell)), most) for cell in cells), 0)
    left_out = []
    for name in header[:0:-1] if drop is None else drop:
        if sum(needs.values()) + _GAP * (len(needs) - 1) <= width:
            break
        if needs.pop(name, None) is not None:
            left_out.append(name)
    places = [place for place, name in enumerate(header) if name in needs]
    return [header[place] for place in places], [[row[place] for place in places] for row in rows], left_out


def _is_text(cells: Iterable[Any]) -> bool:
    """Whether the cells of a column have words between which they can be folded."""
    return any(" " in str(cell) for cell in cells)


def tell_left_out(names: Sequence[str], console: PlainConsole) -> None:
    """Say which columns a table lacks for want of room."""
    if names:
        console.say(f"no room for {', '.join(names)}; a wider terminal has it, and --json", style="dim")


def _print_table(table: "Table") -> None:
    """Print intervals on a line of their own: otherwise a row of six benchmarks would be too wide."""
    out.print(table.title, style="bold")
    print_table(table.header, _broken(table), num_text=table.num_text)
    out.print()


def _broken(table: "Table") -> list[list[str]]:
    return [
        [*row[: table.num_text], *(cell.replace(" (", "\n(") for cell in row[table.num_text :])] for row in table.rows
    ]


_SHOWN_ALARMS = 10


def print_alarms(opened: Any, *, are_told: bool) -> None:
    """Print a line for each alarm of the run, newest last (not if they `are_told` already), and the command that shows
    the newest one."""
    from kdrl_core.alarms import alarms_of

    raised = alarms_of(opened)
    for alarm in [] if are_told else raised[-_SHOWN_ALARMS:]:
        out.say(alarm_line(alarm))
    if raised:
        earlier = f"{len(raised) - _SHOWN_ALARMS} earlier ones: --json. " if len(raised) > _SHOWN_ALARMS else ""
        out.say(f"       {earlier}look at it: {raised[-1].commands(opened.name)[-1]}")
        out.print()


def alarm_line(alarm: "Alarm") -> Text:
    """An alarm in a line, coloured by its severity."""
    from kdrl_core.alarms import sentence

    return Text(f"alarm  {sentence(alarm)}", style="bold red" if alarm.severity == "critical" else "yellow")


def alarm_mark(alarms: list[dict[str, Any]]) -> str:
    """`3, 1 critical`: how many alarms a run has raised; empty if none."""
    critical = sum(alarm["severity"] == "critical" for alarm in alarms)
    return f"{len(alarms)}{f', {critical} critical' if critical else ''}" if alarms else ""
