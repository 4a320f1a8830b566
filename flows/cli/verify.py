"""`kdrl verify`: the verdicts of a run's verifier on responses in any file. The work is in kdrl_core.verify.grading."""

import os
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.printed_tables import grid
from flows.cli.shared import JsonOption, OnError, check_output, counted_progress, err, errors, interruptible, out
from kdrl_core.errors import DataError
from kdrl_core.types import VerdictKind

if TYPE_CHECKING:
    from kdrl_core.verify.grading import FileTally
    from kdrl_core.verify.pool import Verifier

_MAX_TIMEOUT_S = 3_600.0


def verify_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Rows with responses: .jsonl, .ndjson or .parquet.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write: the rows with their verdicts, in FILE's format."),
    ] = None,
    response: Annotated[
        str | None,
        typer.Option(
            metavar="COL", help="Column of the responses, text or chat messages; default: response, completion, …"
        ),
    ] = None,
    truth: Annotated[
        str | None,
        typer.Option(
            metavar="COL",
            help="Column of the right answers, such as reward_model.ground_truth; default: ground_truth, gold, …",
        ),
    ] = None,
    expected: Annotated[
        str | None,
        typer.Option(metavar="COL", help="Column with 1 or true where the response is right: measures the verifier."),
    ] = None,
    by: Annotated[
        str | None, typer.Option(metavar="COL", help="Also print a summary for each value of this column.")
    ] = None,
    require_format: Annotated[
        bool | None,
        typer.Option(
            "--format/--no-format",
            help="Reward = format × accuracy (<think>…</think>, then a box), or accuracy alone. "
            "Default: --format; with --box: --no-format.",
        ),
    ] = None,
    think_opened: Annotated[
        bool, typer.Option("--think-opened", help="The prompts end with <think>: responses begin inside the thought.")
    ] = False,
    think_closed: Annotated[
        bool,
        typer.Option("--think-closed", help="The prompts end with </think>: responses have no thought, and no tags."),
    ] = False,
    box: Annotated[
        bool, typer.Option("--box", help=r"Bare answers: put an answer without a \boxed{} into one.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes that compare answers; default: one per CPU.")
    ] = None,
    timeout_s: Annotated[
        float,
        typer.Option("--timeout", metavar="SECONDS", help="CPU time of a comparison; above it the verdict is timeout."),
    ] = 10.0,
    memory_limit_mb: Annotated[
        int, typer.Option("--memory-limit", metavar="MB", help="Limit of one worker; beyond it the verdict is error.")
    ] = 2_048,
    on_error: Annotated[OnError, typer.Option(help="Malformed rows: stop, or drop and count.")] = OnError.FAIL,
    max_malformed_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="A larger share of malformed rows stops --on-error drop as well.")
    ] = 0.1,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing output, and verdicts that FILE already has.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Verify the responses in a file: correct, wrong, malformed, no_answer, timeout or error, and why.

    Prints a summary. With --output it also writes every row unchanged, followed by the columns reward, format_reward,
    accuracy_reward, verdict, extracted and reason. Files may be larger than memory. Even a hostile answer
    costs at most --timeout. Examples:

    kdrl verify samples.jsonl --no-format --output verified.jsonl

    kdrl verify cases.jsonl --box --expected expected --by source
    """
    with errors():
        from kdrl_core.verify.row_files import open_rows, suffixes_like
        from kdrl_core.verify.rows import choose_columns

        if think_opened and think_closed:
            raise DataError("--think-opened and --think-closed: prompts end in one way; leave one of them out")
        rows = open_rows(file)
        if output is not None:
            suffixes = suffixes_like(file)
            kind = "Parquet" if ".parquet" in suffixes else "JSON Lines"
            check_output(output, [file], what=f"verdicts on {file}", force=force, written_as=kind, suffixes=suffixes)
        columns = choose_columns(
            rows.names, origin=rows.origin, response=response, truth=truth, expected=expected, by=by
        )
        verifier = _verifier(workers, timeout_s, memory_limit_mb)
        from kdrl_core.ledger import require_writable
        from kdrl_core.verify.grading import GradingOptions, grade_file
        from kdrl_core.verify.screening import VerdictOptions

        if output is not None:
            require_writable(output.absolute().parent, free_mb=64)
        verdicts = VerdictOptions(
            require_format=not box if require_format is None else require_format,
            think_opened="closed" if think_closed else think_opened,
        )
        options = GradingOptions(
            verdicts=verdicts,
            on_error=on_error.value,
            max_malformed_share=max_malformed_share,
            replace_columns=force,
            box=box,
        )
        target = None if output is None else output.absolute()
        with (
            interruptible("no output was written"),
            closing(verifier),
            counted_progress(err, "rows") as progress,
        ):
            tally = grade_file(rows, columns, verifier, options=options, output=target, on_progress=progress)
        _warn(tally)
        if as_json:
            where = {"file": str(file), "output": None if output is None else str(output)}
            out.print_json(data={**where, "workers": verifier.workers, **tally.to_json()})
        else:
            _print_summary(tally, verifier.workers)
            if output is not None:
                out.print(f"output    {output}", highlight=False, soft_wrap=True)


def _verifier(workers: int | None, timeout_s: float, memory_limit_mb: int) -> "Verifier":
    """A verifier that is not started yet. Raises DataError if a limit is out of bounds."""
    from kdrl_core.verify.pool import MIN_MEMORY_LIMIT_MB, Verifier

    if not 0 < timeout_s <= _MAX_TIMEOUT_S:
        raise DataError(f"--timeout {timeout_s:g}: give seconds above 0, up to {_MAX_TIMEOUT_S:g}")
    if memory_limit_mb < MIN_MEMORY_LIMIT_MB:
        raise DataError(
            f"--memory-limit {memory_limit_mb}: sympy alone needs more; give at least {MIN_MEMORY_LIMIT_MB}"
        )
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Verifier(workers=workers or cpus, timeout_s=timeout_s, memory_limit_mb=memory_limit_mb)


def _warn(tally: "FileTally") -> None:
    """Warn about rows that were left out, and about timeouts and errors."""
    kinds, lines = tally.total.kinds, []
    if dropped := tally.dropped.total:
        lines.append(f"dropped {_count(dropped, 'malformed row')}: {tally.dropped.commonest()}")
    if tally.total.num_failed:
        timeouts, failures = kinds[VerdictKind.TIMEOUT], kinds[VerdictKind.ERROR]
        counts = [_count(timeouts, "timeout")] * bool(timeouts) + [_count(failures, "error")] * bool(failures)
        advice = "; --timeout allows more time" if timeouts else ""
        lines.append(f"{' and '.join(counts)}: reward 0, but not found wrong; the first: {tally.first_failed}{advice}")
    for line in lines:
        err.print(f"warning: {line}", style="yellow", highlight=False, soft_wrap=True)


def _print_summary(tally: "FileTally", workers: int) -> None:
    total = tally.total
    rows = [[kind.value, f"{total.kinds[kind]:,}", _percent(total.share(kind))] for kind in VerdictKind]
    out.print(grid(["verdict", "rows", "share"], "lrr", rows))
    if tally.groups:
        lines = _by_lines(tally)
        for line in ["", lines[0], "─" * len(lines[0]), *lines[1:], ""]:
            out.say(line)
    columns = tally.columns
    dropped = f", {_count(tally.dropped.total, 'malformed row')} dropped" if tally.dropped.total else ""
    lines = [
        f"rows      {total.num_rows:,}{dropped}; responses in '{columns.response}', truths in '{columns.truth}'",
        f"reward    {total.reward_mean:.3f} on average; format {_percent(total.format_share)}, "
        f"accuracy {_percent(total.accuracy)}",
    ]
    if total.agreement is not None:
        lines.append(
            f"expected  {_percent(total.agreement, digits=2)} agreement, "
            f"{_count(total.false_positives, 'false positive')}, {_count(total.false_negatives, 'false negative')} "
            f"(by '{columns.expected}')"
        )
    lines.append(
        f"time      {tally.seconds:.1f} s, {tally.rows_per_s:,.0f} rows/s; "
        f"{_count(tally.num_computed, 'comparison')} by {_count(workers, 'worker')}"
    )
    for line in lines:
        out.say(line)


def _by_lines(grades: "FileTally") -> list[str]:
    """The summary by group, aligned by hand: values may be long, and a table would cut numbers to fit the terminal."""
    kinds = [kind for kind in VerdictKind if grades.total.kinds[kind]]  # the others are zero in every line
    rows = [["rows", *(kind.value for kind in kinds), "reward"]]
    rows[0] += ["agreement", "false +", "false −"] if grades.columns.expected is not None else []
    for tally in grades.groups.values():
        rows.append([f"{tally.num_rows:,}", *(f"{tally.kinds[kind]:,}" for kind in kinds), f"{tally.reward_mean:.3f}"])
        if tally.agreement is not None:
            rows[-1] += [_percent(tally.agreement), f"{tally.false_positives:,}", f"{tally.false_negatives:,}"]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [f" {line}  {name}" for line, name in zip(lines, [str(grades.columns.by), *grades.groups], strict=True)]


def _percent(share: float, *, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
