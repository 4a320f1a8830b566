"""`kdrl label`: measure the difficulty labels that a filter needs (B.1.1). The work is in kdrl_core.labelling."""

import signal
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from flows.cli.shared import (
    ForceOption,
    JsonOption,
    OnErrorOption,
    RecipeOption,
    SetOption,
    check_output,
    counted_progress,
    err,
    errors,
    out,
)

if TYPE_CHECKING:
    from kdrl_core.labelling import LabelSummary


def label(
    recipe: RecipeOption,
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input", "-i", metavar="FILE", help="Problems: Parquet or JSON, path, glob or builtin:…; repeatable."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Parquet file to write: the problems with their labels.")
    ],
    stage: Annotated[
        str | None,
        typer.Option(
            help="Stage whose temperature, token limits and data.difficulty apply; default: the recipe's last."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="DIR", help="Model to sample; default: the recipe's student. Needs --label.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--label", help="Name of the label; default, without --model: the stage's data.difficulty.student."
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1, help="Responses per problem; must be the stage's data.difficulty.num_samples, the default."
        ),
    ] = None,
    only_missing: Annotated[
        bool, typer.Option("--only-missing/--all", help="Problems without the label, or all of them anew.")
    ] = True,
    max_problems: Annotated[
        int | None, typer.Option(min=1, help="Take the first N problems only, for the output as well.")
    ] = None,
    shard_problems: Annotated[int, typer.Option(min=1, help="Problems sampled and saved together.")] = 64,
    overrides: SetOption = None,
    on_error: OnErrorOption = None,
    keep_work: Annotated[
        bool, typer.Option("--keep-work", help="Keep the folder OUTPUT.work with every response and its verdict.")
    ] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure difficulty labels: sample every problem, count the wrong answers (pass@k), write them with it.

    Interrupt it whenever you like (Ctrl-C): the same command goes on where it stopped. The output is what a stage's
    data.files and `kdrl filter` read.
    """
    from kdrl_core.config import DataConfig, load_recipe
    from kdrl_core.ledger import require_writable

    with errors():
        loaded = load_recipe(recipe, overrides or [])
        from kdrl_core.data import find_files

        check_output(output, find_files(DataConfig(files=inputs)), what="labels", force=force)
        from kdrl_core.labelling import LabelOptions, label_problems, plan_labels, work_folder

        options = LabelOptions(
            stage=stage,
            model=model,
            label=name,
            samples=samples,
            only_missing=only_missing,
            max_problems=max_problems,
            on_error=None if on_error is None else on_error.value,
        )
        plan = plan_labels(loaded, inputs, options)
        require_writable(output.absolute().parent, free_mb=64)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            with counted_progress(err, "responses") as progress:
                summary = label_problems(
                    plan,
                    output.absolute(),
                    shard_problems=shard_problems,
                    keep_work=keep_work,
                    on_progress=partial(progress, "label"),
                )
        except KeyboardInterrupt:
            err.print(f"interrupted; the same command goes on from {work_folder(output)}", highlight=False)
            raise SystemExit(130) from None
        if as_json:
            out.print_json(data={"output": str(output), **asdict(summary)})
        else:
            _print_summary(summary, output, plan.stage, out)


def _print_summary(summary: "LabelSummary", output: Path, stage: str, console: Console) -> None:
    table = RichTable(box=SIMPLE_HEAD, show_edge=False)
    for column in (f"failures of {summary.num_samples}", "problems", "share"):
        table.add_column(column, justify="right")
    for failures, count in enumerate(summary.histogram):
        share = f"{100 * count / summary.num_labelled:.1f} %" if summary.num_labelled else "–"
        table.add_row(str(failures), str(count), share)
    console.print(table)
    lines = [
        f"label     {summary.label}: {summary.num_labelled} of {summary.num_problems} problems, "
        f"{summary.num_sampled} sampled for it",
        *(f"pass@{k:<4} {100 * value:.1f} %" for k, value in summary.pass_at.items()),
    ]
    if summary.num_sampled:
        lines.append(
            f"responses {summary.length_mean:.1f} tokens, {100 * summary.clip_ratio:.1f} % cut, "
            f"{100 * summary.timeout_share:.1f} % timeouts, {100 * summary.error_share:.1f} % errors"
        )
    if summary.num_too_long:
        lines.append(
            f"too long  {summary.num_too_long} problems over {stage}.max_prompt_tokens have no label; "
            f"set {stage}.data.missing_labels=drop"
        )
    for line in [*lines, f"output    {output}"]:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
