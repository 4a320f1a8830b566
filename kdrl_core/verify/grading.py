r"""Grade a file of responses of any size, JSON Lines or Parquet: `kdrl verify`.

The file is read twice. The first pass checks every row, so that a malformed row is reported before a worker starts.
The second pass judges batch by batch. The output appears as a whole or not at all. A tally counts the verdicts of each
kind, and those that are as expected.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kdrl_core.errors import DataError
from kdrl_core.ledger import replace_file
from kdrl_core.types import ThinkOpened, Verdict, VerdictKind
from kdrl_core.verify.faults import Fault, Reasons
from kdrl_core.verify.pool import Verifier
from kdrl_core.verify.row_files import VERDICT_NAMES, RowFile
from kdrl_core.verify.rows import Batch, Columns
from kdrl_core.verify.screening import VerdictOptions, answer_region

MAX_GROUPS = 1_000

OnProgress = Callable[[str, int, int | None], None]
"""Pass (reading, verifying), rows done, rows in all (None: not known yet)."""


@dataclass(slots=True)
class Tally:
    """Counts of verdicts and of their agreement with the expected ones."""

    kinds: Counter[VerdictKind] = field(default_factory=Counter)
    reward_sum: float = 0.0
    format_sum: float = 0.0
    accuracy_sum: float = 0.0
    num_expected: int = 0
    false_positives: int = 0
    """Found correct, although the answer is wrong."""
    false_negatives: int = 0
    """Not found correct, for whatever reason, although the answer is right."""

    def add(self, verdict: Verdict, expected: bool | None) -> None:
        """Count one verdict. `expected`: whether the response is right; None if that is not known."""
        self.kinds[verdict.kind] += 1
        self.reward_sum += verdict.reward
        self.format_sum += verdict.format_reward
        self.accuracy_sum += verdict.accuracy_reward
        if expected is not None:
            found = verdict.kind is VerdictKind.CORRECT
            self.num_expected += 1
            self.false_positives += found and not expected
            self.false_negatives += expected and not found

    @property
    def num_rows(self) -> int:
        return self.kinds.total()

    @property
    def num_failed(self) -> int:
        """Timeouts and errors: the reward is 0, but nothing is known about the answer."""
        return self.kinds[VerdictKind.TIMEOUT] + self.kinds[VerdictKind.ERROR]

    @property
    def reward_mean(self) -> float:
        return self._share(self.reward_sum)

    @property
    def format_share(self) -> float:
        return self._share(self.format_sum)

    @property
    def accuracy(self) -> float:
        """Share of right answers, whatever the format."""
        return self._share(self.accuracy_sum)

    @property
    def agreement(self) -> float | None:
        """Share of verdicts that are as expected; None without expectations."""
        if not self.num_expected:
            return None
        return (self.num_expected - self.false_positives - self.false_negatives) / self.num_expected

    def share(self, kind: VerdictKind) -> float:
        return self._share(self.kinds[kind])

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; shares from 0 to 1."""
        found: dict[str, Any] = {
            "rows": self.num_rows,
            "verdicts": {kind.value: {"count": self.kinds[kind], "share": self.share(kind)} for kind in VerdictKind},
            "reward_mean": self.reward_mean,
            "format_share": self.format_share,
            "accuracy": self.accuracy,
        }
        if self.agreement is not None:
            found["expected"] = {
                "agreement": self.agreement,
                "false_positives": self.false_positives,
                "false_negatives": self.false_negatives,
            }
        return found

    def _share(self, amount: float) -> float:
        return amount / self.num_rows if self.num_rows else 0.0


@dataclass(slots=True, kw_only=True)
class FileTally:
    """Counts of the verdicts on one file, in all and by group."""

    columns: Columns
    total: Tally = field(default_factory=Tally)
    groups: dict[str, Tally] = field(default_factory=dict)
    """By value of the column `by`, in the order of their first rows; empty without that column."""
    dropped: Reasons = field(default_factory=Reasons)
    """Malformed rows, which are neither judged nor written."""
    first_failed: str | None = None
    """Row and reason of the first timeout or error."""
    num_computed: int = 0
    """Comparisons that workers made: different (answer, truth) pairs that rules could not settle."""
    seconds: float = 0.0
    """From the start of the workers to the last verdict."""

    def add(self, batch: Batch, verdicts: list[Verdict], *, unit: str) -> None:
        """Count the verdicts on a batch; `unit` is what the file calls its rows."""
        rows = zip(verdicts, batch.expected, batch.groups, batch.numbers, strict=True)
        for verdict, expected, group, number in rows:
            self.total.add(verdict, expected)
            if group is not None:
                self.groups.setdefault(group, Tally()).add(verdict, expected)
            if self.first_failed is None and verdict.kind in (VerdictKind.TIMEOUT, VerdictKind.ERROR):
                self.first_failed = f"{unit} {number}: {verdict.reason}"

    @property
    def rows_per_s(self) -> float:
        return self.total.num_rows / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        used = {"response": self.columns.response, "truth": self.columns.truth}
        used |= {name: value for name in ("expected", "by") if (value := getattr(self.columns, name))}
        found = {
            "columns": used,
            **self.total.to_json(),
            "dropped": self.dropped.total,
            "first_dropped": self.dropped.first,
            "first_failed": self.first_failed,
            "comparisons": self.num_computed,
            "seconds": self.seconds,
            "rows_per_s": self.rows_per_s,
        }
        if self.columns.by is not None:
            found["by"] = {name: tally.to_json() for name, tally in self.groups.items()}
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class GradingOptions:
    """How the rows of a file are judged, and what happens to those that cannot be."""

    verdicts: VerdictOptions
    """What a verdict depends on besides the row."""
    on_error: Literal["fail", "drop"] = "fail"
    """Malformed rows stop the grading, or are dropped and counted."""
    max_malformed_share: float = 0.1
    """A larger share of malformed rows is an error although they are dropped."""
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
    """Judge every row of `file`, and write its rows with their verdicts to `output`, a file of the same format.

    The verifier's workers are started once all rows have been checked, and are left running.

    Raises:
        DataError: a row is malformed (with on_error=fail), too many are, or the output would have a column twice.
        StorageError: the output cannot be written.
    """
    report = on_progress or (lambda name, done, total: None)
    tally = FileTally(columns=columns)
    if output is not None:
        _check_names(file, columns, replace=options.replace_columns)
    num_rows = _check_rows(file, tally, options, report)
    if output is not None:  # only now are all names of JSON Lines known
        _check_names(file, columns, replace=options.replace_columns)
    started, computed_before = time.perf_counter(), verifier.num_computed
    verifier.start()
    think_opened = options.verdicts["think_opened"]

    def judged() -> Iterator[tuple[Batch, list[Verdict]]]:
        for batch in file.batches(columns, with_rows=output is not None):
            if batch.faults and options.on_error == "fail":  # the file has changed since it was checked
                raise _malformed(batch.faults[0])
            verdicts = verifier.verify_batch(
                [(box_answer(text, think_opened=think_opened), truth) for text, truth in batch.items]
                if options.box
                else batch.items,
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


def box_answer(response: str, *, think_opened: ThinkOpened = False) -> str:
    r"""The response with all text outside the thought put in a ``\boxed{}``, unless a box is there already."""
    region = answer_region(response, think_opened=think_opened)
    if r"\boxed" in region or not region.strip():
        return response
    start = response.rfind("</think>") + len("</think>") if "</think>" in response else 0
    # A backslash at the end would escape the brace; with a space after it, LaTeX reads a space.
    answer = region.strip() + (" " if region.strip().endswith("\\") else "")
    return rf"{response[:start]}\boxed{{{answer}}}{response[start + len(region) :]}"


def _check_rows(file: RowFile, tally: FileTally, options: GradingOptions, report: OnProgress) -> int:
    """The number of rows that can be judged; the others are noted in the tally.

    Raises DataError at the first malformed row, or, if such rows are dropped, where they are too many.
    """
    num_rows = 0
    groups: set[str | None] = set()
    for batch in file.batches(tally.columns, with_rows=False):
        if batch.faults:
            if options.on_error == "fail":
                raise _malformed(batch.faults[0])
            for fault in batch.faults:
                tally.dropped.add_fault(fault)
        num_rows += len(batch.items)
        groups.update(batch.groups)
        if len(groups) > MAX_GROUPS:
            raise DataError(
                f"{file.origin}: column '{tally.columns.by}' has over {MAX_GROUPS:,} different values; "
                "give --by a column with fewer, such as the source of the problems"
            )
        report("reading", num_rows + tally.dropped.total, None)
    tally.dropped.refuse_above(
        options.max_malformed_share,
        num_rows + tally.dropped.total,
        where=file.origin,
        remedy="name the right columns with --response and --truth, correct the rows, or raise --max-malformed-share",
    )
    if not num_rows:
        raise DataError(f"{file.origin}: every row is malformed; the first: {tally.dropped.first}")
    return num_rows


def _malformed(fault: Fault) -> DataError:
    return DataError(f"{fault}; correct the row, or leave such rows out with --on-error drop")


def _check_names(file: RowFile, columns: Columns, *, replace: bool) -> None:
    """Raise DataError if a column of the file is named like a verdict column, unless that column may be replaced."""
    present = [name for name in file.names if name in VERDICT_NAMES]
    if lost := [name for name in (columns.response, columns.truth) if name in present]:
        raise DataError(f"{file.origin}: column '{lost[0]}' is an input, and verdicts have that name; rename it")
    if present and not replace:
        raise DataError(
            f"{file.origin} has a column '{present[0]}' already, and verdicts have that name; "
            "rename it, or replace it with --force"
        )
