"""Counts of verdicts: how many of each kind, and how many agree with what was expected."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from kdrl_core.types import Verdict, VerdictKind
from kdrl_core.verify.rows import Batch, Columns


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
        """Share of the verdicts of this kind."""
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
    num_dropped: int = 0
    """Malformed rows, which are neither judged nor written."""
    first_dropped: str | None = None
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
        """As plain data."""
        used = {"response": self.columns.response, "truth": self.columns.truth}
        used |= {name: value for name in ("expected", "by") if (value := getattr(self.columns, name))}
        found = {
            "columns": used,
            **self.total.to_json(),
            "dropped": self.num_dropped,
            "first_dropped": self.first_dropped,
            "first_failed": self.first_failed,
            "comparisons": self.num_computed,
            "seconds": self.seconds,
            "rows_per_s": self.rows_per_s,
        }
        if self.columns.by is not None:
            found["by"] = {name: tally.to_json() for name, tally in self.groups.items()}
        return found
