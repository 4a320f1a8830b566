"""`kdrl rollouts export` and `kdrl rollouts import`."""

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.rollouts_shared import RunsArgument, open_store, print_json, with_filter
from flows.cli.shared import ForceOption, JsonOption, check_output, counted_progress, err, errors, out
from kdrl_core.errors import DataError

if TYPE_CHECKING:
    from kdrl_core.look.rollouts.filters import RolloutFilter


class Dump(StrEnum):
    """Trainers whose dumps can be read."""

    VERL = "verl"
    TRL = "trl"


@with_filter
def export(
    runs: RunsArgument,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write: .parquet, .jsonl or .csv.")],
    columns: Annotated[
        str | None,
        typer.Option(metavar="A,B,C", help="Columns of the record; default: all (kdrl rollouts sql --help)."),
    ] = None,
    where: "RolloutFilter",
    limit: Annotated[int | None, typer.Option(min=1, help="Write at most N rollouts.")] = None,
    quote_formulas: Annotated[
        bool,
        typer.Option("--quote-formulas", help="CSV: put ' before texts that begin with =, +, -, @, tab or CR."),
    ] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write rollouts, all or some, to one file: Parquet, JSON lines or CSV.

    \b
    kdrl rollouts export first -o first.parquet                            everything, with the documented schema
    kdrl rollouts export first -o wrong.jsonl --step 143 --verdict wrong
    kdrl rollouts export a b -o rewards.csv --columns run,stage,step,prompt_id,sample,reward,length

    The file appears only once it is complete. In CSV, lists are written as JSON. A spreadsheet may run a
    text that begins with =, +, - or @ as a formula: such texts are counted, and quoted with --quote-formulas.
    """
    from kdrl_core.look.rollouts.files import SUFFIXES, export_rollouts

    with errors():
        check_output(output, [], what="rollouts", force=force, written_as="Parquet, JSON or CSV", suffixes=SUFFIXES)
        names = [name.strip() for name in columns.split(",")] if columns else None
        with open_store(runs) as store, counted_progress(err, "rollouts") as progress:
            total = store.page(where, limit=0).total
            if not total:
                raise DataError("no rollout meets these conditions; nothing was written")
            total = min(total, limit or total)
            formulas: list[int] = []
            written = export_rollouts(
                store,
                where,
                output,
                columns=names,
                limit=limit,
                quote_formulas=quote_formulas,
                on_formulas=formulas.append,
                on_step=lambda done: progress("writing", done, total),
            )
        if formulas:
            fate = "quoted" if quote_formulas else "a spreadsheet may run them as formulas; see --quote-formulas"
            err.say(f"{formulas[0]:,} texts begin with =, +, -, @, tab or CR: {fate}", style="yellow")
        if as_json:
            print_json({"path": str(output), "rollouts": written, "bytes": output.stat().st_size})
        else:
            size = output.stat().st_size / 2**20
            out.say(f"{written:,} rollouts, {size:,.1f} MiB: {output}")


def import_command(
    source: Annotated[Path, typer.Argument(metavar="PATH", help="The dump's folder, or one of its files.")],
    kind: Annotated[Dump, typer.Option("--from", help="The trainer that wrote it.")],
    output: Annotated[str, typer.Option("--output", "-o", metavar="RUN", help="Name of a new run, or a new folder.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of the model's tokenizer; adds tokens, lengths and repetition.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a run from another trainer's dump, for kdrl rollouts and kdrl ui.

    \b
    kdrl rollouts import verl-dump/ --from verl --output theirs           trainer.rollout_data_dir=verl-dump
    kdrl rollouts import out/completions --from trl --output theirs       log_completions=True
    kdrl rollouts stats theirs

    Columns that the dump lacks stay empty: verl and TRL write no tokens and no logprobs. TRL's reward is the sum of
    its reward functions' columns.
    """
    from kdrl_core.ledger import RunPaths
    from kdrl_core.look.rollouts.files import import_dump

    with errors():
        target = Path(output) if os.sep in output else RunPaths.of(output).root
        with counted_progress(err, "files") as progress:
            made = import_dump(
                source,
                kind.value,
                target,
                tokenizer=tokenizer,
                on_file=lambda done, total: progress("reading", done, total),
            )
        if as_json:
            print_json(
                {
                    **{name: getattr(made, name) for name in ("stage", "num_steps", "num_rollouts")},
                    "path": str(made.path),
                    "reward_columns": made.reward_columns,
                }
            )
            return
        reward = " + ".join(made.reward_columns) or "none"
        out.say(f"{made.num_rollouts:,} rollouts of {made.num_steps:,} steps; reward: {reward}")
        out.say(f"kdrl rollouts stats {output}")
