"""Tables of comparisons on a terminal: `kdrl sweep` and `kdrl report`."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable

from flows.cli.shared import PlainConsole, out

if TYPE_CHECKING:
    from kdrl_core.look.reporting.tables import Table
    from kdrl_core.look.sweeps.table import SweepTable

_PIPED_WIDTH = 160
"""Characters of a table that is not for a terminal."""


def print_comparison(table: "SweepTable", report: Path) -> None:
    """Print the tables of a sweep or of runs, and where their report lies."""
    for one in table.tables():
        _print_table(one)
    out.print("▲ best, △ second best of the variants; – is missing")
    out.say(f"report  {report}")


def fitted(table: "Table", width: int) -> list[list[str]]:
    """The rows of a table. If they are wider than `width`, intervals stand on a line of their own."""
    columns = zip(table.header, *table.rows, strict=True)
    needed = sum(max(map(len, column)) + 3 for column in columns)
    return table.rows if needed <= width else _broken(table)


def print_rows(header: list[str], rows: list[list[str]], *, num_text: int = 1) -> None:
    """Print a table whose first `num_text` columns are text, which is folded where it is long."""
    table = RichTable(box=SIMPLE_HEAD, show_edge=False)
    for position, column in enumerate(header):
        table.add_column(
            column,
            justify="left" if position < num_text else "right",
            overflow="fold",
            no_wrap=position == 0 and num_text == 1,
        )
    for row in rows:
        table.add_row(*row)
    (out if out.is_terminal else PlainConsole(width=_PIPED_WIDTH)).print(table)


def _print_table(table: "Table") -> None:
    """With intervals on a line of their own: otherwise a row of six benchmarks would be too wide."""
    out.print(table.title, style="bold")
    print_rows(table.header, _broken(table), num_text=table.num_text)
    out.print()


def _broken(table: "Table") -> list[list[str]]:
    return [
        [*row[: table.num_text], *(cell.replace(" (", "\n(") for cell in row[table.num_text :])] for row in table.rows
    ]
