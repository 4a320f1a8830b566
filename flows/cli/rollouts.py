"""`kdrl rollouts`: stats, show, diff, sql, export and import. The work is in kdrl_core.look.rollouts."""

from typing import Annotated, Any

import typer

from flows.cli.rollouts_diff import diff
from flows.cli.rollouts_files import export, import_command
from flows.cli.rollouts_shared import (
    RunsArgument,
    StageOption,
    StepsOption,
    mean,
    number,
    open_store,
    paged,
    print_json,
    sparkline,
    stretches,
    table,
    whole_range,
    why_nothing,
)
from flows.cli.rollouts_show import SQLCommand, show, sql
from flows.cli.shared import JsonOption, PlainConsole, errors
from kdrl_core.errors import DataError
from kdrl_core.types import VerdictKind

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="See what a run sampled: trends, responses, SQL.")
_SHOWN_STEPS = 40
_TRENDS = {
    "reward_mean": ("reward", 3),
    "length_mean": ("length", 1),
    "clip_ratio": ("clip ratio", 3),
    "repetition_mean": ("repetition", 3),
    "kl_mean": ("teacher KL", 3),
    "entropy": ("entropy", 3),
    **{f"verdict_{kind.value}": (kind.value.replace("_", " "), 3) for kind in VerdictKind},
}
_STEP_COLUMNS = {
    "num_rollouts": ("rollouts", 0),
    "reward_mean": ("reward", 3),
    "length_p05": ("len 5%", 0),
    "length_p50": ("median", 0),
    "length_p95": ("95%", 0),
    "clip_ratio": ("clip", 3),
    "kl_mean": ("KL", 3),
    "entropy": ("entropy", 3),
    "verdict_correct": ("correct", 2),
    "verdict_wrong": ("wrong", 2),
    "verdict_malformed": ("malf.", 2),
    "verdict_no_answer": ("no ans.", 2),
    "num_groups_all_wrong": ("all wrong", 0),
    "num_groups_all_right": ("all right", 0),
}


@app.command()
def stats(
    runs: RunsArgument,
    stage: StageOption = None,
    steps: StepsOption = None,
    every_step: Annotated[
        bool,
        typer.Option(
            "--all", help=f"One line per step; otherwise more than {_SHOWN_STEPS} steps are averaged in groups."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show how reward, lengths, KL and verdicts moved over the steps of runs.

    \b
    kdrl rollouts stats first                        trends as sparklines, then the steps
    kdrl rollouts stats first --step 130-160 --all   step by step, where the reward fell
    kdrl rollouts stats first second --stage stage2  two runs, one below the other
    kdrl rollouts stats first --json                 every number of every step, with all metrics
    """
    with errors(), open_store(runs) as store:
        low, high = whole_range("--step", steps)
        rows = [
            row
            for row in store.steps(stage=stage)
            if (low is None or row["step"] >= low) and (high is None or row["step"] <= high)
        ]
        if as_json:
            print_json(rows)
            return
        if not rows:
            raise DataError(why_nothing(store))
        with paged() as console:
            for run, name in dict.fromkeys((row["run"], row["stage"]) for row in rows):
                _print_stage([row for row in rows if (row["run"], row["stage"]) == (run, name)], console, every_step)


def _print_stage(rows: list[dict[str, Any]], console: PlainConsole, every_step: bool) -> None:
    first, last = rows[0], rows[-1]
    console.print(
        f"{first['run']} {first['stage']}: steps {first['step']} to {last['step']}, "
        f"{sum(row['num_rollouts'] for row in rows):,} rollouts",
        style="bold",
    )
    ends = max(1, len(rows) // 10)
    trends = []
    for name, (label, digits) in _TRENDS.items():
        values = [row[name] for row in rows]
        if any(values):
            start, end = mean(values[:ends]), mean(values[-ends:])
            trends.append([label, number(start, digits), "→", number(end, digits), sparkline(values)])
    trends.append(["lengths 5–95 %", number(last["length_p05"], 0), "–", number(last["length_p95"], 0), ""])
    console.print(table(["", "start", " ", "end", "trend"], trends, left=["", "trend"]))
    console.print()
    parts = [[row] for row in rows] if every_step else stretches(rows, _SHOWN_STEPS)
    columns = {name: shown for name, shown in _STEP_COLUMNS.items() if any(row[name] is not None for row in rows)}
    lines = [
        [_steps_of(part), *(number(mean([row[name] for row in part]), digits) for name, (_, digits) in columns.items())]
        for part in parts
    ]
    if len(parts) < len(rows):
        console.print("means over several steps; --all has each alone", style="dim")
    console.print(table(["step", *(label for label, _ in columns.values())], lines))
    console.print()


def _steps_of(rows: list[dict[str, Any]]) -> str:
    first, last = rows[0]["step"], rows[-1]["step"]
    return str(first) if first == last else f"{first}–{last}"


app.command()(show)
app.command()(diff)
app.command(cls=SQLCommand)(sql)
app.command()(export)
app.command("import")(import_command)
