"""`kdrl filter` applies a recipe's data rules (B.1.1, B.3) to files of any size; `kdrl label` measures the difficulty
labels that they need. The work is in kdrl_core.data and kdrl_core.labelling."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from flows.cli.printed_tables import grid
from flows.cli.shared import (
    ColumnsOption,
    ForceOption,
    JsonOption,
    LogLines,
    OnErrorOption,
    RecipeOption,
    SetOption,
    check_output,
    counted_progress,
    err,
    errors,
    interruptible,
    out,
)
from kdrl_core.errors import DataError, ModelError

if TYPE_CHECKING:
    from kdrl_core.data import FilterReport
    from kdrl_core.labelling import LabelSummary


def filter_command(
    recipe: RecipeOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Parquet file to write: the problems that are kept.")],
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            "-i",
            metavar="FILE",
            help="Problems: Parquet, Arrow, JSON, JSON Lines or CSV; path, glob, folder of a saved set, builtin:… or "
            "hf://…; repeatable. Default: the stage's own.",
        ),
    ] = None,
    stage: Annotated[str | None, typer.Option(help="Stage whose rules apply; default: the recipe's last.")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Tokenizer that measures prompts, if the student's is not on this machine."),
    ] = None,
    columns: ColumnsOption = None,
    overrides: SetOption = None,
    on_error: OnErrorOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Filter problems by a stage's rules, and say what each rule dropped.

    kdrl knows the columns of verl, Skywork-OR1, DAPO, slime, TRL, DeepScaleR, GSM8K, MATH, NuminaMath, OpenR1-Math and
    Big-Math; name others with --columns. Files may be larger than memory. The output does not depend on the order of
    the rows. A stage can read it (data.files). Examples:

    \b
    kdrl filter --recipe paper-1.5b --input 'data/skywork-or1-math/*.parquet' --output data/pool.parquet
    kdrl filter -r miniature -i mine.csv --columns problem=task,answer=key -o pool.parquet
    """
    from kdrl_core.config import ColumnsConfig, DataConfig, load_recipe
    from kdrl_core.config.fetch import fetched

    with errors():
        loaded = load_recipe(recipe, overrides or [])
        from kdrl_core.data import filter_files, find_files
        from kdrl_core.data.filter import check_stage
        from kdrl_core.data.fitting import require_fitting

        name = check_stage(loaded, stage)
        config = loaded.stage(name)
        changes: dict[str, Any] = {} if on_error is None else {"on_error": on_error.value}
        if inputs:
            # The recipe's format and columns are for its own files.
            own = [field for field in ("format", "columns") if _is_set(f"{name}.data.{field}", overrides)]
            given = DataConfig(files=inputs)
            changes |= {field: getattr(given, field) for field in ("files", "format", "columns") if field not in own}
        if columns is not None:
            changes |= {"columns": ColumnsConfig.of(columns)}
        config = config.model_copy(update={"data": config.data.model_copy(update=changes)})
        loaded = loaded.model_copy(update={name: config})
        loaded = fetched(loaded, f"{name}.data.*", *([] if tokenizer else ["student.path"]), weights=False)
        config = loaded.stage(name)
        try:
            files = find_files(config.data)
        except DataError as error:
            raise DataError(str(error).replace("data.files:", "--input") if inputs else f"{name}.{error}") from error
        check_output(output, files, what="problems", force=force)
        require_fitting(loaded, name)
        measure = _tokenizer(loaded, tokenizer)
        with _progress() as progress:
            report = filter_files(loaded, output.absolute(), stage=name, tokenizer=measure, on_progress=progress)
        if as_json:
            out.print_json(data={"output": str(output), **report.to_json()})
        else:
            _print_report(report)
            out.print(f"output    {output}", highlight=False, soft_wrap=True)


def _print_report(report: "FilterReport") -> None:
    rows = [[rule.rule, f"{rule.dropped:,}", f"{left:,}", rule.description] for rule, left in report.lines()]
    ends = (["rows in", "", f"{report.rows_in:,}", ""], ["rows out", "", f"{report.rows_out:,}", ""])
    out.print(grid(["rule", "dropped", "left", "description"], "LRRl", [ends[0], *rows, ends[1]]))
    for note in report.notes:
        out.say(note)


def _is_set(field: str, overrides: list[str] | None) -> bool:
    return any(override.startswith((f"{field}=", f"{field}.")) for override in overrides or [])


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
            min=1, help="Responses per problem; only the default is allowed, the stage's data.difficulty.num_samples."
        ),
    ] = None,
    only_missing: Annotated[
        bool, typer.Option("--only-missing/--all", help="Label the problems that lack the label, or all of them again.")
    ] = True,
    max_problems: Annotated[
        int | None, typer.Option(min=1, help="Read only the first N problems; the output has only these.")
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
    """Measure difficulty labels: sample each problem, count its wrong answers, write the count with the problem.

    You may interrupt it at any time (Ctrl-C): the same command continues where it stopped. A stage (data.files) and
    `kdrl filter` can read the output.

    \b
    kdrl label -r paper-1.5b -i problems.jsonl -o labelled.parquet
    kdrl label -r paper-1.5b -i problems.jsonl -o labelled.parquet --model models/Qwen2.5-3B --label qwen-3b
    """
    from kdrl_core.config import DataConfig, load_recipe
    from kdrl_core.config.fetch import fetched_files
    from kdrl_core.ledger import require_writable

    with errors():
        loaded = load_recipe(recipe, overrides or [])
        from kdrl_core.data import find_files

        inputs = DataConfig(files=fetched_files(inputs)).files
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
        told = f"the same command goes on from {work_folder(output)}"
        with interruptible(told), counted_progress(err, "responses") as progress:
            summary = label_problems(
                plan,
                output.absolute(),
                shard_problems=shard_problems,
                keep_work=keep_work,
                on_progress=partial(progress, "label"),
            )
        if as_json:
            out.print_json(data={"output": str(output), **asdict(summary)})
        else:
            _print_summary(summary, output, plan.stage)


def _print_summary(summary: "LabelSummary", output: Path, stage: str) -> None:
    rows = []
    for failures, count in enumerate(summary.histogram):
        share = f"{100 * count / summary.num_labelled:.1f} %" if summary.num_labelled else "–"
        rows.append([str(failures), str(count), share])
    out.print(grid([f"failures of {summary.num_samples}", "problems", "share"], "rrr", rows))
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
        out.say(line)
