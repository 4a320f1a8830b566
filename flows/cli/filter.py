"""`kdrl filter`: apply a recipe's data rules (B.1.1, B.3) to files of any size. The work is in kdrl_core.data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from flows.cli.shared import (
    ForceOption,
    JsonOption,
    LogLines,
    OnErrorOption,
    RecipeOption,
    SetOption,
    check_output,
    err,
    errors,
    out,
)
from kdrl_core.errors import DataError, ModelError

if TYPE_CHECKING:
    from kdrl_core.data import FilterReport


def filter_command(
    recipe: RecipeOption,
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
        typer.Option(metavar="DIR", help="Tokenizer that measures prompts, if the student's is not on this machine."),
    ] = None,
    overrides: SetOption = None,
    on_error: OnErrorOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Filter problems by a stage's rules, and say what each rule dropped.

    Files may be larger than memory. The output can be an entry of a stage's data.files, and it does not depend on the
    order of the rows. Example:

    kdrl filter --recipe paper-1.5b --input 'data/skywork-or1-math/*.parquet' --output data/pool.parquet
    """
    from kdrl_core.config import load_recipe

    with errors():
        loaded = load_recipe(recipe, overrides or [])
        from kdrl_core.data import filter_files, find_files
        from kdrl_core.data.filter import check_stage

        name = check_stage(loaded, stage)
        config = loaded.stage(name)
        changes: dict[str, Any] = {} if on_error is None else {"on_error": on_error.value}
        if inputs:
            changes |= {"files": inputs}
            if not any(override.startswith(f"{name}.data.format=") for override in overrides or []):
                changes |= {"format": "auto"}  # the recipe's is that of its own files
        config = config.model_copy(update={"data": config.data.model_copy(update=changes)})
        loaded = loaded.model_copy(update={name: config})
        try:
            files = find_files(config.data)
        except DataError as error:
            raise DataError(str(error).replace("data.files:", "--input") if inputs else f"{name}.{error}") from error
        check_output(output, files, what="problems", force=force)
        measure = _tokenizer(loaded, tokenizer)
        with _progress() as progress:
            report = filter_files(loaded, output.absolute(), stage=name, tokenizer=measure, on_progress=progress)
        if as_json:
            out.print_json(data={"output": str(output), **report.to_json()})
        else:
            _print_report(report)
            out.print(f"output    {output}", highlight=False, soft_wrap=True)


def _print_report(report: "FilterReport") -> None:
    """Print the report as a table: rule, rows dropped, rows left, description."""
    table = RichTable(box=SIMPLE_HEAD, show_edge=False)
    for column, justify in (("rule", "left"), ("dropped", "right"), ("left", "right"), ("description", "left")):
        table.add_column(column, justify=justify, no_wrap=column != "description")  # type: ignore[arg-type]
    table.add_row("rows in", "", f"{report.rows_in:,}", "")
    for rule, left in report.lines():
        table.add_row(rule.rule, f"{rule.dropped:,}", f"{left:,}", rule.description)
    table.add_row("rows out", "", f"{report.rows_out:,}", "")
    out.print(table)


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


@contextmanager
def _progress() -> Iterator[Callable[[str, int], None]]:
    """Show pass and rows: a live line on a terminal, else a line every few seconds."""
    if err.is_terminal:
        with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=err) as bar:
            task = bar.add_task("reading", total=None)
            yield lambda name, rows: bar.update(task, description=f"{name}: {rows:,} rows")
        return
    lines = LogLines(err)
    yield lambda name, rows: lines.show(f"{name}: {rows:,} rows")
