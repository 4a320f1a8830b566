"""`kdrl rollouts show`: responses, a line each or in full. `kdrl rollouts sql`: DuckDB over the rollouts of runs."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperCommand

from flows.cli.printed_tables import narrowed, print_tsv, tell_left_out
from flows.cli.program import complete_column
from flows.cli.rollouts_shared import (
    RunsArgument,
    fits,
    legend,
    log_ratios,
    number,
    one_line,
    open_store,
    paged,
    plain,
    print_json,
    table,
    token_text,
    verdict,
    why_nothing,
    with_filter,
)
from flows.cli.shared import JsonOption, PlainConsole, err, errors, out
from kdrl_core.errors import DataError

if TYPE_CHECKING:
    from kdrl_core.look.rollouts.query import RolloutFilter, RolloutStore

_UNLIKELIEST = 8
_LISTED = [
    "run", "stage", "step", "prompt_id", "sample", "verdict", "reward", "length", "finish_reason", "kl_mean",
    "response_preview",
]  # fmt: skip
"""Columns of the list where it is no terminal's."""
_LEAST_NEEDED = ["KL", "sample", "stage", "reward", "length", "run"]
"""Columns that a narrow terminal does without, in this order."""


@with_filter
def show(
    runs: RunsArgument,
    where: "RolloutFilter",
    sort: Annotated[
        str,
        typer.Option(
            help="Column to sort by, e.g. reward, length, kl_mean, repetition_rate.", autocompletion=complete_column
        ),
    ] = "step",
    descending: Annotated[bool, typer.Option("--desc", help="Greatest first.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="How many to show; default: 20, or 1 with --full.")] = None,
    offset: Annotated[int, typer.Option(min=0, help="How many to skip.")] = 0,
    full: Annotated[
        bool, typer.Option("--full", help="Show whole responses, each token coloured by teacher–student log-ratio.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show responses: a line each, or in full.

    \b
    kdrl rollouts show first --step 143 --verdict malformed          what went wrong at step 143
    kdrl rollouts show first --sort kl_mean --desc --limit 5         where student and teacher differ most
    kdrl rollouts show first --text "wait, wait" --length 500-       long ones with these words
    kdrl rollouts show first --step 143 --prompt q-1f… --sample 3    one in full
    kdrl rollouts show first --prompt q-1f… --sort step              one problem over the whole run

    In full, each token has a background colour: red if the teacher finds it less likely than the student does, blue if
    more likely. Below, the tokens that the teacher finds least likely are listed.
    """
    with errors():
        full = full or where.sample is not None
        with open_store(runs) as store:
            page = store.page(
                where, sort=sort, descending=descending, limit=limit or (1 if full else 20), offset=offset
            )
            found = [_in_full(store, row) for row in page.rows] if full else page.rows
            if as_json:
                print_json({"total": page.total, "rows": found})
                return
            if not found:
                raise DataError(why_nothing(store))
            if not full and not out.is_terminal:
                print_tsv(_LISTED, [[row[name] for name in _LISTED] for row in found])
                return
            with paged() as console:
                if full:
                    for record in found:
                        _print_record(record, console)
                else:
                    _print_page(found, console, several=len(runs) > 1)
                if page.total > len(found):
                    shown = f"{offset + 1}–{offset + len(found)}" if len(found) > 1 else f"{offset + 1}"
                    console.print(f"{shown} of {page.total:,}; --limit, --offset and --sort show others", style="dim")


def _print_page(rows: list[dict[str, Any]], console: PlainConsole, *, several: bool) -> None:
    names = [*(["run"] if several else []), "stage", "step", "prompt_id", "sample", "verdict", "reward", "length", "KL"]
    lines = [
        [
            *([row["run"]] if several else []),
            row["stage"],
            row["step"],
            row["prompt_id"],
            row["sample"],
            verdict(row["verdict"]),
            number(row["reward"], 2),
            Text(number(row["length"]), "red" if row["finish_reason"] == "length" else ""),
            number(row["kl_mean"]),
            one_line(row["response_preview"]),
        ]
        for row in rows
    ]
    columns, lines, left_out = narrowed([*names, "response"], lines, console.width, drop=_LEAST_NEEDED)
    left = ["run", "stage", "prompt_id", "verdict", "response"]
    console.print(table(columns, lines, left=left, width=console.width))
    tell_left_out(left_out, console)


def _in_full(store: "RolloutStore", row: dict[str, Any]) -> dict[str, Any]:
    record = store.record(**{name: row[name] for name in ("run", "stage", "step", "prompt_id", "sample")})
    return {**record, "log_ratios": log_ratios(record)}


def _print_record(record: dict[str, Any], console: PlainConsole) -> None:
    console.print(
        f"{record['run']} {record['stage']} step {record['step']}, prompt {record['prompt_id']}, "
        f"sample {record['sample']}",
        style="bold",
    )
    heading = Text()
    heading.append_text(verdict(record["verdict"]))
    heading.append_text(plain(f": {record['reason']}" if record["reason"] else ""))
    console.say(heading)
    if record["reward_values"]:
        names = [f"{one['name']} {number(one['value'])}" for one in record["reward_values"]]
        console.say(plain(f"functions: {' · '.join(names)}"))
    facts = [
        f"reward {number(record['reward'], 2)} (format {number(record['format_reward'], 0)}, "
        f"accuracy {number(record['accuracy_reward'], 0)})",
        f"found {record['extracted'] if record['extracted'] is not None else '–'}",
        f"true {record['ground_truth'] if record['ground_truth'] is not None else '–'}",
        f"advantage {number(record['advantage'])}",
        f"KL {number(record['kl_mean'])} a token, {number(record['kl_sum'], 2)} in all",
        f"KD weight {number(record['kd_weight'], 0)}",
        f"{number(record['length'])} tokens, {record['finish_reason'] or '–'}",
        f"repetition {number(record['repetition_rate'])}",
        f"policy {number(record['policy_version'])}",
        f"seed {record['seed'] if record['seed'] is not None else '–'}",
    ]
    console.say(plain(" · ".join(facts)))
    console.print("\nprompt", style="bold")
    console.say(plain(record["prompt"] or ""))
    console.print("\nresponse", style="bold")
    tokens, ratios = record["tokens"], record["log_ratios"]
    if tokens is None or ratios is None:
        console.say(plain(record["response"] or ""))
        lacking = "no teacher scored it" if ratios is None else "the run's tokenizer is not at hand"
        console.print(f"\nwithout colours: {lacking}", style="dim")
    else:
        console.say(token_text(tokens, ratios))
        console.print()
        console.print(legend())
        _print_unlikeliest(record, tokens, ratios, console)
    console.print()


def _print_unlikeliest(
    record: dict[str, Any], tokens: list[str], ratios: list[float | None], console: PlainConsole
) -> None:
    """The tokens that the teacher finds least likely compared with the student."""
    known = sorted((ratio, place) for place, ratio in enumerate(ratios) if ratio is not None and ratio < 0)
    teacher, rows = record["teacher_logprobs"], []
    for ratio, place in known[:_UNLIKELIEST]:
        before = "".join(tokens[max(0, place - 6) : place])[-24:]
        rows.append([place, number(ratio, 2), number(teacher[place] - ratio, 2), number(teacher[place], 2)])
        rows[-1] += [repr(tokens[place]), before.replace("\n", "↵")]
    if not rows:
        return
    names = ["position", "log-ratio", "student", "teacher", "token", "after"]
    console.print(table(names, rows, left=["token", "after"]))


_CELL_CHARS = 60


class SQLCommand(TyperCommand):
    """Adds the views' columns to the help. They are loaded only for the help."""

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
    runs: Annotated[list[str], typer.Argument(metavar="RUN… QUERY", help="Runs, then the query in quotes.")],
    limit: Annotated[int, typer.Option(min=0, help="Rows to print; 0: all.")] = 100,
    as_json: JsonOption = False,
) -> None:
    """Query runs with DuckDB's SQL over the views rollouts, steps and prompts.

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
            if not out.is_terminal:
                print_tsv(found.column_names, [list(row.values()) for row in rows])
                if is_cut:
                    err.say(f"first {limit:,} rows; --limit 0 prints all")
                return
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
    """Print one line per column, for rows that are too wide for the console."""
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
