"""What was found while problems were read, beside the problems: malformed rows, notes, and the place of each row.

It travels with a table in the metadata of its schema, so that the filter can name rows of files.
"""

import json
import logging
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import pyarrow as pa

from kdrl_core.config import DataConfig
from kdrl_core.data.normalize import Normalized
from kdrl_core.errors import DataError
from kdrl_core.verify.faults import Dropped

MALFORMED_KEY = b"kdrl.malformed_rows"
"""Key in the metadata of a table's schema: the number of rows that were dropped when it was read."""
READING_KEY = b"kdrl.reading"
"""Key beside it: the rest, as JSON."""

_log = logging.getLogger(__name__)


class Reading:
    """The rows that have been read so far, of one or several files."""

    def __init__(self) -> None:
        self.num_rows = 0
        """Rows that can be used."""
        self.dropped = Dropped()
        self.notes: dict[str, tuple[int, str]] = {}
        """What is to be told → of how many rows, and the first of them."""
        self._runs: list[tuple[int, str, int]] = []
        """Position, file and number of the first row of each run of consecutive rows."""

    def add(self, batch: Normalized, data: DataConfig) -> None:
        """Take in a batch. Raises DataError with its first fault, unless data.on_error=drop."""
        if batch.faults and data.on_error == "fail":
            raise DataError(str(batch.faults[0]))
        for fault in batch.faults:
            self.dropped.add(fault.field, fault.problem, fault.what)
        for what, rows in batch.notes.items():
            if rows:
                count, first = self.notes.get(what, (0, f"{batch.origin} row {rows[0]}"))
                self.notes[what] = count + len(rows), first
        breaks = np.flatnonzero(np.diff(batch.rows) != 1) + 1
        for start in [0, *breaks.tolist()] if len(batch.rows) else []:
            self._runs.append((self.num_rows + start, batch.origin, int(batch.rows[start])))
        self.num_rows += len(batch.rows)

    def finish(self, data: DataConfig) -> None:
        """Log what was found, once. Raises DataError if too many rows are malformed."""
        total = self.num_rows + self.dropped.total
        self.dropped.refuse_above(
            data.max_malformed_share,
            total,
            where="problems",
            remedy="correct the rows, name the right columns in <stage>.data.columns, or raise "
            "<stage>.data.max_malformed_share",
        )
        for line in self.told():
            _log.warning("%s", line)

    def told(self) -> list[str]:
        """What was found, in words."""
        dropped = self.dropped
        lines = [f"malformed: {_rows(dropped.total)}: {dropped.commonest()}"] if dropped.reasons else []
        return [*lines, *(f"{what}: {_rows(count)}, the first: {first}" for what, (count, first) in self.notes.items())]

    def place(self, position: int) -> str:
        """File and row of the usable row at a position; empty if it is not known."""
        run = bisect_right(self._runs, position, key=lambda one: one[0]) - 1
        if run < 0:
            return ""
        first, origin, row = self._runs[run]
        return f"{origin} row {row + position - first}"

    def metadata(self) -> dict[bytes, bytes]:
        """Metadata of a table with these rows."""
        rest = {"rows": self.num_rows, "dropped": self.dropped.to_json(), "notes": self.notes, "runs": self._runs}
        return {MALFORMED_KEY: str(self.dropped.total).encode(), READING_KEY: json.dumps(rest).encode()}

    @classmethod
    def of(cls, table: pa.Table) -> Self:
        """What was found when a table was read; nothing for a table that was made otherwise."""
        found = cls()
        metadata: Mapping[bytes, bytes] = table.schema.metadata or {}
        if READING_KEY in metadata:
            rest: dict[str, Any] = json.loads(metadata[READING_KEY])
            found.num_rows = rest["rows"]
            found.dropped = Dropped.from_json(rest["dropped"])
            found.notes = {what: (count, first) for what, (count, first) in rest["notes"].items()}
            found._runs = [(position, origin, row) for position, origin, row in rest["runs"]]
        elif MALFORMED_KEY in metadata:
            found.dropped.total = int(metadata[MALFORMED_KEY])
        return found


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"


def malformed_rows(table: pa.Table) -> int:
    """How many rows `read_problems` dropped when it made this table; 0 for any other table."""
    return Reading.of(table).dropped.total
