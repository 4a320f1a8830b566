"""`kdrl filter`: apply a recipe's data rules (B.1.1, B.3) to files of any size. The work is in kdrl_core.data."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from flows.cli_label import OnError
from kdrl_core.errors import DataError, ModelError

if TYPE_CHECKING:
    from kdrl_core.data import FilterReport

_LINE_EVERY_S = 10.0


def filter_command(
    recipe: Annotated[
        str,
        typer.Option("--recipe", "-r", help="Name of a shipped recipe (see: kdrl recipes), or path of a YAML file."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Parquet file to write: the problems that are kept.")],
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            "-i",
            metavar="FILE",
            help="Problems: Parquet, JSON Lines, JSON; path, glob or builtin:…; repeatable. Default: the stage's own.",
        ),
    ] = None,
    stage: Annotated[str | None, typer.Option(help="Stage whose rules apply; default: the recipe's last.")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Tokenizer that measures prompts, where the student's is not at hand."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="FIELD=VALUE", help="Change a field of the recipe. Repeatable."),
    ] = None,
    on_error: Annotated[
        OnError | None, typer.Option(help="Malformed rows: stop, or drop and count; default: the recipe's (fail).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Filter problems by a stage's rules, and say what each rule dropped.

    Files are streamed: they may be larger than memory. The output is what a stage's data.files reads, and the same
    whatever the order of the rows. Example:

    kdrl filter --recipe paper-1.5b --input 'data/skywork-or1-math/*.parquet' --output data/pool.parquet
    """
    from flows.cli import _err, _errors, _out  # not above: flows.cli registers this command
    from kdrl_core.config import load_recipe

    with _errors():
        loaded = load_recipe(recipe, overrides or [])
        from kdrl_core.data import filter_files, find_files
        from kdrl_core.data.filter import check_stage

        name = check_stage(loaded, stage)
        config = loaded.stage(name)
        changes: dict[str, Any] = {} if on_error is None else {"on_error": on_error.value}
        if inputs:
            changes |= {"files": inputs, "format": "auto"}
        config = config.model_copy(update={"data": config.data.model_copy(update=changes)})
        loaded = loaded.model_copy(update={name: config})
        _check_output(output, find_files(config.data), force=force)
        measure = _tokenizer(loaded, tokenizer)
        with _progress(_err) as progress:
            report = filter_files(loaded, output.absolute(), stage=name, tokenizer=measure, on_progress=progress)
        if as_json:
            _out.print_json(data={"output": str(output), **report.to_json()})
        else:
            print_report(report, _out)
            _out.print(f"output    {output}", highlight=False, soft_wrap=True, markup=False)


def print_report(report: "FilterReport", console: Console) -> None:
    """The report as a table: rule, rows dropped, rows left, what the rule says."""
    table = RichTable(box=SIMPLE_HEAD, show_edge=False)
    for column, justify in (("rule", "left"), ("dropped", "right"), ("left", "right"), ("description", "left")):
        table.add_column(column, justify=justify, no_wrap=column != "description")  # type: ignore[arg-type]
    left = report.rows_in
    table.add_row("rows in", "", f"{left:,}", "")
    for rule in report.rules:
        left -= rule.dropped
        table.add_row(rule.rule, f"{rule.dropped:,}", f"{left:,}", rule.description)
    table.add_row("rows out", "", f"{report.rows_out:,}", "")
    console.print(table, markup=False)


def _tokenizer(recipe: Any, path: str | None) -> Any:
    from kdrl_core.config import ModelConfig
    from kdrl_core.data import load_tokenizer

    if path is not None:
        model = ModelConfig(path=path, trust_remote_code=recipe.student.trust_remote_code)
        try:
            return load_tokenizer(model, role="student")
        except ModelError as error:
            raise ModelError(f"--tokenizer {path}: {error}") from error
    try:
        return load_tokenizer(recipe.student)
    except ModelError as error:
        raise ModelError(f"{error}; or measure prompts with another tokenizer: --tokenizer DIR") from error


def _check_output(output: Path, files: list[Path], *, force: bool) -> None:
    if output.suffix != ".parquet":
        raise DataError(f"--output {output}: problems are written as Parquet; give a name that ends in .parquet")
    if output.is_dir():
        raise DataError(f"--output {output} is a folder; name a file in it")
    if output.resolve() in [file.resolve() for file in files]:
        raise DataError(f"--output {output} is an input as well; give another file")
    if output.exists() and not force:
        raise DataError(f"--output {output} exists; give another file, or --force to replace it")


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int], None]]:
    """Rows by pass: a live line on a terminal, else a line every few seconds."""
    if console.is_terminal:
        with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as bar:
            task = bar.add_task("reading", total=None)
            yield lambda name, rows: bar.update(task, description=f"{name}: {rows:,} rows")
        return
    last = time.monotonic()

    def line(name: str, rows: int) -> None:
        nonlocal last
        if time.monotonic() - last > _LINE_EVERY_S:
            last = time.monotonic()
            console.print(f"{name}: {rows:,} rows", highlight=False)

    yield line
