"""`kdrl rollouts`: stats, show, diff, sql, export and import. The work is in kdrl_core.look.rollouts."""

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.printed_tables import narrowed, print_tsv, tell_left_out
from flows.cli.program import Program
from flows.cli.rollouts_files import export, import_command
from flows.cli.rollouts_shared import (
    PromptOption,
    RunsArgument,
    StageOption,
    StepsOption,
    mean,
    number,
    one_line,
    open_store,
    paged,
    print_json,
    sparkline,
    stretches,
    table,
    verdict,
    whole_range,
    why_nothing,
)
from flows.cli.rollouts_show import SQLCommand, show, sql
from flows.cli.shared import JsonOption, PlainConsole, errors, out
from kdrl_core.errors import DataError
from kdrl_core.types import VerdictKind

if TYPE_CHECKING:
    from kdrl_core.look.rollouts.diff import Difference
    from kdrl_core.look.rollouts.query import RolloutFilter, RolloutStore

_STEPS = re.compile(r"(?:(?P<stage>[A-Za-z][\w.-]*):)?(?P<steps>\d+(?:-\d*)?|-\d+)")
_RESPONSES = 50


def diff(
    sides: Annotated[
        list[str], typer.Argument(metavar="RUN STEP STEP | RUN RUN", help="One run and two steps, or two runs.")
    ],
    stage: StageOption = None,
    steps: StepsOption = None,
    prompt_id: PromptOption = None,
    limit: Annotated[int, typer.Option(min=0, help="Problems to list; 0: all.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """Compare the same problems at two steps of a run, or in two runs: rewards, verdicts, lengths, KL.

    \b
    kdrl rollouts diff first 140 150                  two steps of the last stage
    kdrl rollouts diff first stage2:0-39 240-279      ranges of steps: more problems are in both
    kdrl rollouts diff grpo kdrl --stage stage2       two runs, problem by problem
    kdrl rollouts diff grpo kdrl --step 143           two runs at the same step
    kdrl rollouts diff first 0-39 240-279 --prompt q-1f…   one problem: the responses themselves

    A step draws a part of the pool: two steps share problems only if the whole pool was drawn in between.
    """
    from kdrl_core.look.rollouts.diff import compare

    with errors():
        runs, selected = _runs_and_steps(sides)
        with open_store(runs) as store:
            before, after = _filters(store, selected, stage, steps, prompt_id)
            labels = _label(before), _label(after)
            if prompt_id is not None:
                _responses(store, (before, after), labels, as_json)
                return
            found = compare(store, before, after, labels)
            if as_json:
                print_json(found.to_json())
                return
            with paged() as console:
                _print(found, console, limit, _hint(store, before, after) if not found.prompts else "")


def _runs_and_steps(sides: list[str]) -> tuple[list[str], list[str]]:
    if len(sides) == 3 and all(_STEPS.fullmatch(side) for side in sides[1:]):
        return sides[:1], sides[1:]
    if len(sides) == 2:
        if sides[0] == sides[1]:
            raise DataError(f"{sides[0]} is compared with itself; give two runs, or a run and two steps")
        return sides, []
    raise DataError(
        f"{' '.join(sides)}: give a run and two steps, e.g. first 140 150, or two runs, e.g. grpo kdrl --step 143"
    )


def _filters(
    store: "RolloutStore", selected: list[str], stage: str | None, steps: str | None, prompt_id: str | None
) -> "tuple[RolloutFilter, RolloutFilter]":
    from kdrl_core.look.rollouts.query import RolloutFilter

    infos = store.runs()
    names = [info.name for info in infos]
    if selected:
        if steps is not None:
            raise DataError("--step is for two runs; for one run, name two steps: kdrl rollouts diff RUN STEP STEP")
        made, last = [], stage or next(iter(reversed(infos[0].stages)), None)
        for text in selected:
            match = _STEPS.fullmatch(text)
            assert match
            last = match["stage"] or last
            low, high = whole_range("step", match["steps"])
            made.append(RolloutFilter(run=names[0], stage=last, step_min=low, step_max=high, prompt_id=prompt_id))
        return made[0], made[1]
    low, high = whole_range("--step", steps)
    before, after = (
        RolloutFilter(run=name, stage=stage, step_min=low, step_max=high, prompt_id=prompt_id) for name in names
    )
    return before, after


def _label(where: "RolloutFilter") -> str:
    low, high = where.step_min, where.step_max
    if low is None and high is None:
        steps = "all steps"
    elif low == high:
        steps = f"step {low}"
    else:
        steps = f"steps {'' if low is None else low}–{'' if high is None else high}"
    return " ".join(part for part in (where.run, where.stage, steps) if part)


def _hint(store: "RolloutStore", before: "RolloutFilter", after: "RolloutFilter") -> str:
    """Names the steps that draw the problems of `before` again."""
    from dataclasses import replace

    rows = store.aggregate(before, "select distinct prompt_id from rows")
    wanted = {row["prompt_id"] for row in rows}
    elsewhere = replace(after, step_min=None, step_max=None, stage=before.stage)
    found = store.aggregate(elsewhere, "select step, list(distinct prompt_id) as prompts from rows group by step")
    shared = {row["step"]: len(wanted.intersection(row["prompts"])) for row in found}
    own = range(before.step_min or 0, (before.step_max or before.step_min or 0) + 1)
    best = sorted(((count, step) for step, count in shared.items() if count and step not in own), reverse=True)[:5]
    if not best:
        return "none of these problems is drawn at another step"
    return "steps that share problems: " + ", ".join(f"{step} ({count})" for count, step in best)


def _print(found: "Difference", console: PlainConsole, limit: int, hint: str) -> None:
    rows: list[list[Any]] = [
        [side.label, *(number(getattr(side, name), digits) for name, digits in _SIDE_COLUMNS.values())]
        for side in (found.before, found.after)
    ]
    console.print(table(["", *_SIDE_COLUMNS], rows, left=[""]))
    console.print()
    for side in (found.before, found.after):
        shares = ", ".join(f"{kind} {share:.1%}" for kind, share in side.verdicts.items())
        console.say(f"{side.label}: {shares or 'no verdicts'}")
    console.print()
    counts = found.counts
    if not counts["common"]:
        console.say(f"no problem is on both sides; {hint}")
        return
    console.say(
        f"{counts['common']:,} common problems: {counts['better']:,} better, {counts['worse']:,} worse, "
        f"{counts['same']:,} the same; {counts['newly_solved']:,} newly solved, "
        f"{counts['no_longer_solved']:,} no longer, {counts['other_verdict']:,} with another usual verdict"
    )
    console.print()
    shown = found.prompts[: limit or None]
    rows = [
        [
            one.prompt_id,
            f"{one.reward_change:+.2f}",
            _arrow(one.reward, 2),
            f"{one.correct[0]}/{one.num_rollouts[0]} → {one.correct[1]}/{one.num_rollouts[1]}",
            verdict(one.verdict[0]) if one.verdict[0] == one.verdict[1] else f"{one.verdict[0]} → {one.verdict[1]}",
            _arrow(one.length, 0),
            _arrow(one.kl, 2),
            one_line(one.ground_truth),
        ]
        for one in shown
    ]
    names = ["prompt_id", "Δ reward", "reward", "correct", "usual verdict", "length", "KL", "true answer"]
    console.print(table(names, rows, left=["prompt_id", "usual verdict", "true answer"]))
    if len(shown) < len(found.prompts):
        console.print(f"{len(shown)} of {len(found.prompts):,}; --limit 0 lists all", style="dim")


_SIDE_COLUMNS = {
    "rollouts": ("num_rollouts", 0),
    "problems": ("num_prompts", 0),
    "reward": ("reward_mean", 3),
    "length": ("length_mean", 1),
    "clip ratio": ("clip_ratio", 3),
    "KL": ("kl_mean", 3),
}
"""Columns, their fields of `Side`, and digits."""


def _arrow(pair: tuple[float | None, float | None], digits: int) -> str:
    return f"{number(pair[0], digits)} → {number(pair[1], digits)}"


def _responses(
    store: "RolloutStore", sides: "tuple[RolloutFilter, RolloutFilter]", labels: tuple[str, str], as_json: bool
) -> None:
    """The responses to one problem on both sides."""
    pages = [store.page(side, limit=_RESPONSES) for side in sides]
    if not any(page.total for page in pages):
        raise DataError(why_nothing(store))
    if as_json:
        found: dict[str, Any] = {
            side: {"label": label, "total": page.total, "rows": page.rows}
            for side, label, page in zip(("before", "after"), labels, pages, strict=True)
        }
        print_json(found)
        return
    with paged() as console:
        for label, page in zip(labels, pages, strict=True):
            console.print(f"{label}: {page.total} responses", style="bold")
            rows = [
                [
                    row["step"],
                    row["sample"],
                    verdict(row["verdict"]),
                    number(row["reward"], 2),
                    number(row["length"]),
                    number(row["kl_mean"]),
                    one_line(row["extracted"]),
                    one_line(row["response_preview"]),
                ]
                for row in page.rows
            ]
            names = ["step", "sample", "verdict", "reward", "length", "KL", "found", "response"]
            console.print(table(names, rows, left=["verdict", "found", "response"], width=console.width))
            console.print()


app = typer.Typer(
    cls=Program,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="See what a run sampled: trends, responses, SQL.",
)
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
            "--all", help=f"One line per step; without it, more than {_SHOWN_STEPS} steps are averaged in groups."
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
        if not out.is_terminal:
            columns = ["run", "stage", "step", *_STEP_COLUMNS]
            print_tsv(columns, [[row[name] for name in columns] for row in rows])
            return
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
    shown, lines, left_out = narrowed(["step", *(label for label, _ in columns.values())], lines, console.width)
    console.print(table(shown, lines))
    tell_left_out(left_out, console)
    console.print()


def _steps_of(rows: list[dict[str, Any]]) -> str:
    first, last = rows[0]["step"], rows[-1]["step"]
    return str(first) if first == last else f"{first}–{last}"


app.command()(show)
app.command()(diff)
app.command(cls=SQLCommand)(sql)
app.command()(export)
app.command("import")(import_command)
