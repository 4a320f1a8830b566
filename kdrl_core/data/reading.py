"""What was found while problems were read, beside the problems: unusable rows, notes, and the place of each row.

It travels with a table in the metadata of its schema, so that the filter can name rows of files.
"""

import json
from bisect import bisect_right
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
import pyarrow as pa

from kdrl_core.config import DataConfig
from kdrl_core.data.normalize import Normalized
from kdrl_core.errors import DataError
from kdrl_core.verify.faults import Reasons

READING_KEY = b"kdrl.reading"
"""Key in the metadata of a table's schema: a `Reading` as JSON."""


@dataclass(slots=True)
class Reading:
    """The rows that have been read so far, of one or several files."""

    num_rows: int = 0
    """Rows that can be used."""
    malformed: Reasons = field(default_factory=Reasons)
    no_answer: Reasons = field(default_factory=Reasons)
    """Rows of which their set says that there is no answer."""
    notes: Reasons = field(default_factory=Reasons)
    """What is to be told of rows that can be used."""
    runs: list[tuple[int, str, int]] = field(default_factory=list)
    """Position, file and number of the first row of each run of consecutive rows."""

    def add(self, batch: Normalized, data: DataConfig) -> None:
        """Take in a batch. Raises DataError with its first malformed row, unless data.on_error=drop."""
        for fault in batch.faults:
            if data.on_error == "fail" and not fault.is_answer_missing:
                raise DataError(f"{fault}; drop the row or set <stage>.data.on_error=drop")
            (self.no_answer if fault.is_answer_missing else self.malformed).add_fault(fault)
        for what, rows in batch.notes.items():
            self.notes.add(what, f"{batch.origin} row {rows[0]}", len(rows))
        breaks = np.flatnonzero(np.diff(batch.rows) != 1) + 1
        for start in [0, *breaks.tolist()] if len(batch.rows) else []:
            self.runs.append((self.num_rows + start, batch.origin, int(batch.rows[start])))
        self.num_rows += len(batch.rows)

    def finish(self, data: DataConfig) -> None:
        """Called after the last batch. Raises DataError if too many rows are malformed."""
        self.malformed.refuse_above(
            data.max_malformed_share,
            self.num_rows + self.malformed.total + self.no_answer.total,
            where="problems",
            remedy="correct the rows, name the right columns in <stage>.data.columns, or raise "
            "<stage>.data.max_malformed_share",
        )

    def told(self) -> list[str]:
        """What was found, in words."""
        lines = [("malformed", self.malformed), ("no_answer", self.no_answer)]
        return [
            *(f"{rule}: {rows.commonest()}" for rule, rows in lines if rows.found),
            *(
                f"{what}: {count:,} row{'s' * (count > 1)}, the first: {first}"
                for what, (count, first) in self.notes.found.items()
            ),
        ]

    def place(self, position: int) -> str:
        """File and row of the usable row at a position; empty if it is not known."""
        run = bisect_right(self.runs, position, key=lambda one: one[0]) - 1
        if run < 0:
            return ""
        first, origin, row = self.runs[run]
        return f"{origin} row {row + position - first}"

    def metadata(self) -> dict[bytes, bytes]:
        """Metadata of a table with these rows."""
        return {READING_KEY: json.dumps(asdict(self)).encode()}

    @classmethod
    def of(cls, table: pa.Table) -> Self:
        """What was found when a table was read; nothing for a table that was made otherwise."""
        values = json.loads((table.schema.metadata or {}).get(READING_KEY, b"{}"))
        parts: dict[str, Any] = {
            name: Reasons(**value) if isinstance(value, dict) else value for name, value in values.items()
        }
        return cls(**parts)


def malformed_rows(table: pa.Table) -> int:
    """How many malformed rows `read_problems` dropped when it made this table; 0 for any other table."""
    return Reading.of(table).malformed.total
