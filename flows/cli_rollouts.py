"""`kdrl rollouts`: stats, show, diff, sql, export and import. The work is in kdrl_core.rollouts."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from flows.cli_rollouts_diff import diff
from flows.cli_rollouts_files import export, import_command
from flows.cli_rollouts_shared import (
    FinishOption,
    KLOption,
    LengthOption,
    PromptOption,
    RewardOption,
    RunsArgument,
    SampleOption,
    StageOption,
    StepsOption,
    TextOption,
    VerdictOption,
    make_filter,
    open_store,
    print_json,
)
from flows.cli_rollouts_sql import SQLCommand, sql
from flows.cli_shared import JsonOption, PlainConsole, errors
from flows.rollouts_shown import (
    legend,
    log_ratios,
    mean,
    number,
    one_line,
    paged,
    plain,
    sparkline,
    stretches,
    table,
    token_text,
    verdict,
)
from kdrl_core.errors import DataError

if TYPE_CHECKING:
    from kdrl_core.rollouts.query import RolloutStore

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="See what a run sampled: trends, responses, SQL.")
_SHOWN_STEPS = 40
_UNLIKELIEST = 8
_TRENDS = {
    "reward_mean": ("reward", 3),
    "length_mean": ("length", 1),
    "clip_ratio": ("clip ratio", 3),
    "repetition_mean": ("repetition", 3),
    "kl_mean": ("teacher KL", 3),
    "entropy": ("entropy", 3),
    "verdict_correct": ("correct", 3),
    "verdict_wrong": ("wrong", 3),
    "verdict_malformed": ("malformed", 3),
    "verdict_no_answer": ("no answer", 3),
    "verdict_timeout": ("timeout", 3),
    "verdict_error": ("error", 3),
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
        bool, typer.Option("--all", help=f"A line a step; else more than {_SHOWN_STEPS} are put together.")
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
    from flows.cli_rollouts_shared import whole_range

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
            raise DataError(_nothing(store))
        with paged() as console:
            for run, name in dict.fromkeys((row["run"], row["stage"]) for row in rows):
                _print_stage([row for row in rows if (row["run"], row["stage"]) == (run, name)], console, every_step)


@app.command()
def show(
    runs: RunsArgument,
    stage: StageOption = None,
    steps: StepsOption = None,
    prompt_id: PromptOption = None,
    sample: SampleOption = None,
    verdicts: VerdictOption = None,
    finish: FinishOption = None,
    reward: RewardOption = None,
    length: LengthOption = None,
    kl: KLOption = None,
    text: TextOption = None,
    sort: Annotated[
        str, typer.Option(help="Column to sort by, e.g. reward, length, kl_mean, repetition_rate.")
    ] = "step",
    descending: Annotated[bool, typer.Option("--desc", help="Greatest first.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="How many; default: 20, in full 1.")] = None,
    offset: Annotated[int, typer.Option(min=0, help="How many to pass over.")] = 0,
    full: Annotated[
        bool, typer.Option("--full", help="In full: every token on its teacher–student log-ratio.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show responses: a line each, or in full.

    \b
    kdrl rollouts show first --step 143 --verdict malformed          what went wrong at step 143
    kdrl rollouts show first --sort kl_mean --desc --limit 5         where student and teacher differ most
    kdrl rollouts show first --text "wait, wait" --length 500-       long ones that say so
    kdrl rollouts show first --step 143 --prompt q-1f… --sample 3    one in full
    kdrl rollouts show first --prompt q-1f… --sort step              one problem over the whole run

    In full each token stands on a colour: red where the teacher finds it unlikelier than the student does, blue where
    likelier. Without colours, or to be sure, the unlikeliest tokens are listed below.
    """
    with errors():
        where = make_filter(
            stage=stage,
            steps=steps,
            prompt_id=prompt_id,
            sample=sample,
            verdicts=verdicts,
            finish=finish,
            reward=reward,
            length=length,
            kl=kl,
            text=text,
        )
        full = full or sample is not None
        with open_store(runs) as store:
            page = store.page(
                where, sort=sort, descending=descending, limit=limit or (1 if full else 20), offset=offset
            )
            found = [_in_full(store, row) for row in page.rows] if full else page.rows
            if as_json:
                print_json({"total": page.total, "rows": found})
                return
            if not found:
                raise DataError(_nothing(store))
            with paged() as console:
                if full:
                    for record in found:
                        _print_record(record, console)
                else:
                    _print_page(found, console, several=len(runs) > 1)
                if page.total > len(found):
                    shown = f"{offset + 1}–{offset + len(found)}" if len(found) > 1 else f"{offset + 1}"
                    console.print(
                        f"{shown} of {page.total:,}; --limit, --offset and --sort show others",
                        style="dim",
                        highlight=False,
                    )


def _nothing(store: "RolloutStore") -> str:
    """Why there is nothing to show."""
    infos = store.runs()
    if not any(info.num_rollouts for info in infos):
        return f"run {infos[0].name} has no rollouts yet (SFT stages have none); kdrl status says where it stands"
    stages = "; ".join(
        f"{info.name}: " + ", ".join(f"{stage} {count} steps" for stage, count in info.num_steps.items())
        for info in infos
    )
    return f"no rollout meets these conditions; there are {stages}"


def _print_stage(rows: list[dict[str, Any]], console: PlainConsole, every_step: bool) -> None:
    first, last = rows[0], rows[-1]
    console.print(
        f"{first['run']} {first['stage']}: steps {first['step']} to {last['step']}, "
        f"{sum(row['num_rollouts'] for row in rows):,} rollouts",
        style="bold",
        highlight=False,
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
        console.print("means over several steps; --all has each alone", style="dim", highlight=False)
    console.print(table(["step", *(label for label, _ in columns.values())], lines))
    console.print()


def _steps_of(rows: list[dict[str, Any]]) -> str:
    first, last = rows[0]["step"], rows[-1]["step"]
    return str(first) if first == last else f"{first}–{last}"


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
    console.print(
        table(
            [*names, "response"], lines, left=["run", "stage", "prompt_id", "verdict", "response"], width=console.width
        )
    )


def _in_full(store: "RolloutStore", row: dict[str, Any]) -> dict[str, Any]:
    record = store.record(**{name: row[name] for name in ("run", "stage", "step", "prompt_id", "sample")})
    return {**record, "log_ratios": log_ratios(record)}


def _print_record(record: dict[str, Any], console: PlainConsole) -> None:
    console.print(
        f"{record['run']} {record['stage']} step {record['step']}, prompt {record['prompt_id']}, "
        f"sample {record['sample']}",
        style="bold",
        highlight=False,
    )
    heading = Text()
    heading.append_text(verdict(record["verdict"]))
    heading.append_text(plain(f": {record['reason']}" if record["reason"] else ""))
    console.print(heading, soft_wrap=True)
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
    console.print(plain(" · ".join(facts)), soft_wrap=True)
    console.print("\nprompt", style="bold")
    console.print(plain(record["prompt"] or ""), soft_wrap=True)
    console.print("\nresponse", style="bold")
    tokens, ratios = record["tokens"], record["log_ratios"]
    if tokens is None or ratios is None:
        console.print(plain(record["response"] or ""), soft_wrap=True)
        lacking = "no teacher scored it" if ratios is None else "the run's tokenizer is not at hand"
        console.print(f"\nwithout colours: {lacking}", style="dim")
    else:
        console.print(token_text(tokens, ratios), soft_wrap=True)
        console.print()
        console.print(legend())
        _print_unlikeliest(record, tokens, ratios, console)
    console.print()


def _print_unlikeliest(
    record: dict[str, Any], tokens: list[str], ratios: list[float | None], console: PlainConsole
) -> None:
    """The tokens that the teacher finds unlikely where the student did not."""
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


app.command()(diff)
app.command(cls=SQLCommand)(sql)
app.command()(export)
app.command("import")(import_command)
