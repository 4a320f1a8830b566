r"""Grading a file of responses, JSON Lines or Parquet, however large: `kdrl verify`.

The file is read twice. The first pass checks every row, so that a malformed row is reported before a worker starts.
The second pass judges batch by batch. The output appears as a whole or not at all.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kdrl_core.errors import DataError
from kdrl_core.ledger import replace_file
from kdrl_core.types import Verdict
from kdrl_core.verify.pool import VerdictOptions, Verifier
from kdrl_core.verify.row_files import VERDICT_NAMES, RowFile
from kdrl_core.verify.rows import Batch, Columns
from kdrl_core.verify.screening import answer_region
from kdrl_core.verify.tally import FileTally

MAX_GROUPS = 1_000

OnProgress = Callable[[str, int, int | None], None]
"""Pass (reading, verifying), rows done, rows in all (None: not known yet)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GradingOptions:
    """How the rows of a file are judged, and what happens to those that cannot be."""

    verdicts: VerdictOptions
    """What a verdict depends on besides the row."""
    on_error: Literal["fail", "drop"] = "fail"
    """Malformed rows stop the grading, or are dropped and counted."""
    replace_columns: bool = False
    """Verdicts that the file already has are replaced; otherwise they are an error."""
    box: bool = False
    """An answer without a box is put into one; see `box_answer`."""


def grade_file(
    file: RowFile,
    columns: Columns,
    verifier: Verifier,
    *,
    options: GradingOptions,
    output: Path | None = None,
    on_progress: OnProgress | None = None,
) -> FileTally:
    """Judge every row of `file`, and write its rows with their verdicts to `output`.

    Args:
        columns: see `choose_columns`.
        verifier: its workers are started once all rows have been checked, and are left running.
        output: a file of the same format; None: only the tally is made.

    Raises:
        DataError: a row is malformed (with on_error=fail), all rows are, or the output would have a column twice.
        StorageError: the output cannot be written.
    """
    report = on_progress or (lambda name, done, total: None)
    tally = FileTally(columns=columns)
    if output is not None:
        _check_names(file, columns, replace=options.replace_columns)
    num_rows = _check_rows(file, tally, on_error=options.on_error, report=report)
    if output is not None:  # the names of JSON Lines are all known only now
        _check_names(file, columns, replace=options.replace_columns)
    started, computed_before = time.perf_counter(), verifier.num_computed
    verifier.start()

    def judged() -> Iterator[tuple[Batch, list[Verdict]]]:
        for batch in file.batches(columns, with_rows=output is not None):
            if batch.faults and options.on_error == "fail":  # the file has changed since it was checked
                raise _malformed(batch.faults[0])
            verdicts = verifier.verify_batch(
                _boxed(batch, options) if options.box else batch.items,
                **options.verdicts,
                on_progress=lambda done, _: report("verifying", tally.total.num_rows + done, num_rows),
            )
            tally.add(batch, verdicts, unit=file.unit)
            yield batch, verdicts

    if output is None:
        for _ in judged():
            pass
    else:
        replace_file(output, lambda path: file.write(path, judged()))
    tally.num_computed = verifier.num_computed - computed_before
    tally.seconds = time.perf_counter() - started
    return tally


def _boxed(batch: Batch, options: GradingOptions) -> list[tuple[str, str]]:
    return [(box_answer(text, think_opened=options.verdicts["think_opened"]), truth) for text, truth in batch.items]


def box_answer(response: str, *, think_opened: bool = False) -> str:
    r"""The response with all text outside the thought put in a ``\boxed{}``, unless a box is there already."""
    region = answer_region(response, think_opened=think_opened)
    if r"\boxed" in region or not region.strip():
        return response
    start = response.rfind("</think>") + len("</think>") if "</think>" in response else 0
    # A backslash at the end would escape the brace: with a blank after it, it is LaTeX's blank.
    answer = region.strip() + (" " if region.strip().endswith("\\") else "")
    return rf"{response[:start]}\boxed{{{answer}}}{response[start + len(region) :]}"


def _check_rows(file: RowFile, tally: FileTally, *, on_error: str, report: OnProgress) -> int:
    """The number of rows that can be judged; the others are noted in the tally.

    Raises DataError at the first malformed row, unless such rows are dropped.
    """
    num_rows = 0
    groups: set[str | None] = set()
    for batch in file.batches(tally.columns, with_rows=False):
        if batch.faults:
            tally.first_dropped = tally.first_dropped or batch.faults[0]
            if on_error == "fail":
                raise _malformed(batch.faults[0])
        num_rows += len(batch.items)
        tally.num_dropped += len(batch.faults)
        groups.update(batch.groups)
        if len(groups) > MAX_GROUPS:
            raise DataError(
                f"{file.origin}: column '{tally.columns.by}' has over {MAX_GROUPS:,} different values; "
                "give --by a column with fewer, such as the source of the problems"
            )
        report("reading", num_rows + tally.num_dropped, None)
    if not num_rows:
        raise DataError(f"{file.origin}: every row is malformed; the first: {tally.first_dropped}")
    return num_rows


def _malformed(fault: str) -> DataError:
    return DataError(f"{fault}; correct the row, or leave such rows out with --on-error drop")


def _check_names(file: RowFile, columns: Columns, *, replace: bool) -> None:
    """Raise DataError if a column of the file has the name of a verdict's, unless that column may be replaced."""
    present = [name for name in file.names if name in VERDICT_NAMES]
    if lost := [name for name in (columns.response, columns.truth) if name in present]:
        raise DataError(f"{file.origin}: column '{lost[0]}' is an input, and verdicts have that name; rename it")
    if present and not replace:
        raise DataError(
            f"{file.origin} has a column '{present[0]}' already, and verdicts have that name; "
            "rename it, or replace it with --force"
        )
