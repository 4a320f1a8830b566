"""`kdrl label`: measure the difficulty labels that a filter needs (B.1.1). The work is in kdrl_core.labelling."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from kdrl_core.errors import DataError

if TYPE_CHECKING:
    from kdrl_core.labelling import LabelSummary

_LINE_EVERY_S = 10.0


class OnError(StrEnum):
    """What to do with malformed rows."""

    FAIL = "fail"
    DROP = "drop"


def label(
    recipe: Annotated[
        str,
        typer.Option("--recipe", "-r", help="Name of a shipped recipe (see: kdrl recipes), or path of a YAML file."),
    ],
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
        str | None, typer.Option(metavar="DIR", help="Model to sample; default: the recipe's student.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--label", help="Name of the label; default: the stage's data.difficulty.student.")
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
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="FIELD=VALUE", help="Change a field of the recipe. Repeatable."),
    ] = None,
    on_error: Annotated[
        OnError | None, typer.Option(help="Malformed rows: stop, or drop and count; default: the recipe's.")
    ] = None,
    keep_work: Annotated[
        bool, typer.Option("--keep-work", help="Keep the folder OUTPUT.work with every response and its verdict.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure difficulty labels: sample every problem, count the wrong answers (pass@k), write them with it.

    Interrupt it whenever you like (Ctrl-C): the same command goes on where it stopped. The output is what a stage's
    data.files and `kdrl filter` read.
    """
    from flows.cli import _err, _errors, _out  # not above: flows.cli registers this command
    from kdrl_core.config import load_recipe
    from kdrl_core.labelling.work import work_folder
    from kdrl_core.ledger import require_writable

    with _errors():
        loaded = load_recipe(recipe, overrides or [])
        _check_output(output, inputs, force=force)
        from kdrl_core.labelling import label_problems, plan_labels

        plan = plan_labels(
            loaded,
            inputs,
            stage=stage,
            model=model,
            label=name,
            samples=samples,
            only_missing=only_missing,
            max_problems=max_problems,
            on_error=None if on_error is None else on_error.value,
        )
        require_writable(output.absolute().parent, free_mb=64)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            with _progress(_err) as progress:
                summary = label_problems(
                    plan, output.absolute(), shard_problems=shard_problems, keep_work=keep_work, on_progress=progress
                )
        except KeyboardInterrupt:
            _err.print(f"interrupted; the same command goes on from {work_folder(output)}", highlight=False)
            raise SystemExit(130) from None
        if as_json:
            _out.print_json(data={"output": str(output), **summary.to_json()})
        else:
            _print_summary(summary, output, plan.stage, _out)


def _check_output(output: Path, inputs: list[str], *, force: bool) -> None:
    if output.suffix != ".parquet":
        raise DataError(f"--output {output}: labels are written as Parquet; give a name that ends in .parquet")
    if output.is_dir():
        raise DataError(f"--output {output} is a folder; name a file in it")
    if output.absolute() in [Path(file).expanduser().absolute() for file in inputs]:
        raise DataError(f"--output {output} is an input as well; give another file")
    if output.exists() and not force:
        raise DataError(f"--output {output} exists; give another file, or --force to replace it")


class _Lines:
    """Progress as a line every few seconds, for a log."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = time.monotonic()
        self._shown = -1

    def __call__(self, done: int, total: int) -> None:
        is_due = done == total or time.monotonic() - self._last > _LINE_EVERY_S
        if is_due and done != self._shown:
            self._last, self._shown = time.monotonic(), done
            self._console.print(f"label: {done}/{total} responses", highlight=False)


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[int, int], None]]:
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("responses", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


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
        f"responses {summary.length_mean:.1f} tokens, {100 * summary.clip_ratio:.1f} % cut, "
        f"{100 * summary.timeout_share:.1f} % timeouts, {100 * summary.error_share:.1f} % errors",
    ]
    if summary.num_too_long:
        lines.append(
            f"too long  {summary.num_too_long} problems over {stage}.max_prompt_tokens have no label; "
            f"set {stage}.data.missing_labels=drop"
        )
    for line in [*lines, f"output    {output}"]:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
