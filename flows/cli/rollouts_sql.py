"""`kdrl rollouts sql`: DuckDB over the rollouts of runs."""

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from flows.cli.rollouts_shared import open_store, print_json
from flows.cli.rollouts_shown import fits, number, one_line, paged, table
from flows.cli.shared import JsonOption, PlainConsole, errors
from kdrl_core.errors import DataError

_CELL_CHARS = 60


class SQLCommand(TyperCommand):
    """Adds the views' columns to the help, which are read only then."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """List the views and their columns."""
        from kdrl_core.look.rollouts.record import RECORD, describe
        from kdrl_core.look.rollouts.views import PROMPTS, STEPS, sql_type

        rollouts = [(f"{name} {sql_type(name)}", describe(name)) for name in RECORD.names]
        for view, columns in (
            ("rollouts: a row is a response", rollouts),
            ('steps: a row is a step; also every metric and timing by its name, e.g. "loss/total"', [*STEPS.items()]),
            ("prompts: a row is a prompt of a stage", [*PROMPTS.items()]),
        ):
            with formatter.section(f"View {view}"):
                formatter.write_dl(columns)


def sql(
    runs: Annotated[list[str], typer.Argument(metavar="RUN… QUERY", help="Runs, and last the query, in quotes.")],
    limit: Annotated[int, typer.Option(min=0, help="Rows to print; 0: all.")] = 100,
    as_json: JsonOption = False,
) -> None:
    """Ask runs anything: DuckDB's SQL over the views rollouts, steps and prompts.

    \b
    kdrl rollouts sql first "select step, reward_mean, clip_ratio from steps where stage = 'stage2'"
    kdrl rollouts sql first "select verdict, count(*), avg(length) from rollouts where step = 143 group by all"
    kdrl rollouts sql first "select prompt_id, reward_last - reward_first as gain from prompts order by gain"
    kdrl rollouts sql a b "select run, avg(reward) from rollouts where response ilike '%wait%' group by run"
    kdrl rollouts sql first "select reason, count(*) from rollouts where reward = 0 group by 1 order by 2 desc"

    A query must be one SELECT, and can read only the files of the runs. Queries without texts and per-token values
    read only the index: about a second for a million rollouts.
    """
    with errors():
        *names, query = runs
        if not names:
            raise DataError(f"{query}: give a run and a query, e.g. kdrl rollouts sql {query} 'from steps'")
        with open_store(names) as store:
            # One row more shows that there are more.
            found = store.sql(query, limit=limit + 1 if limit else None)
            is_cut = bool(limit) and len(found) > limit
            rows = found.slice(0, limit or None).to_pylist()
            if as_json:
                print_json(rows)
                return
            lines = [[_cell(value) for value in row.values()] for row in rows]
            with paged() as console:
                if fits(found.column_names, lines, console.width):
                    types = zip(found.column_names, found.schema.types, strict=True)
                    texts = [name for name, kind in types if _is_text(kind)]
                    console.print(table(found.column_names, lines, left=texts))
                else:
                    _print_records(rows, console)
                told = f"first {limit:,} rows; --limit 0 prints all" if is_cut else f"{len(rows):,} rows"
                console.print(told, style="dim")


def _print_records(rows: list[dict[str, Any]], console: PlainConsole) -> None:
    """A line a column, where a row is too wide for the console."""
    for number_, row in enumerate(rows):
        console.print(f"row {number_}", style="bold")
        lines = [[name, one_line(_shown(value))] for name, value in row.items()]
        console.print(table(["column", "value"], lines, left=["column", "value"], width=console.width))


def _is_text(kind: Any) -> bool:
    return str(kind) in ("string", "large_string") or "list" in str(kind)


def _cell(value: Any) -> str:
    shown = one_line(_shown(value))
    return shown if len(shown) <= _CELL_CHARS else f"{shown[: _CELL_CHARS - 1]}…"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return number(value, 4)
    return "–" if value is None else str(value)
