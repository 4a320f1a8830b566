"""metrics.parquet and timings.parquet: one row per step, derived from the manifests of the steps' updates.

The two are apart because one of them is reproduced bit by bit by a rerun and the other cannot be. Both can be rebuilt
at any time, so they have no manifest of their own; they are replaced atomically.
"""

import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from kdrl_core.errors import DamagedArtifactError
from kdrl_core.ledger import Run, is_published, manifest_of, replace_file
from kdrl_core.rollouts.schema import read_table, write_table

_logger = logging.getLogger("kdrl")


def append_metrics(run: Run, stage: str, step: int) -> None:
    """Add the row of a published step to the stage's metrics and timings, or rebuild them where rows are missing."""
    _append(run, stage, step, "metrics", run.paths.metrics(stage))
    _append(run, stage, step, "timings", run.paths.timings(stage))


def rebuild_metrics(run: Run, stage: str) -> None:
    """Write metrics and timings anew where they do not hold what the manifests of the steps' updates say.

    A row whose manifest is lost is kept as it is, up to the last step that is published.
    """
    for path, rows in _differing(run, stage):
        _write(path, rows)


def differing_metrics(run: Run, stage: str) -> list[Path]:
    """The files that `rebuild_metrics` would write anew."""
    return [path for path, _ in _differing(run, stage)]


def _differing(run: Run, stage: str) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """Files that cannot be read or do not hold what the manifests say, with the rows that belong in them."""
    updates = run.paths.update(stage, 0).parent.parent.glob("step=*/update.parquet")
    end = max((int(path.parent.name.removeprefix("step=")) + 1 for path in updates if is_published(path)), default=0)
    for kind, path in (("metrics", run.paths.metrics(stage)), ("timings", run.paths.timings(stage))):
        try:
            found = _rows(path)
        except DamagedArtifactError as error:
            _logger.warning("%s", error)
            found = []
        kept = {row["step"]: row for row in found}
        rows: list[dict[str, Any]] = []
        while len(rows) < end and (row := _row_or_none(run, stage, len(rows), kind) or kept.get(len(rows))):
            rows.append(row)
        if found != rows:
            yield path, rows


def _row_or_none(run: Run, stage: str, step: int, kind: str) -> dict[str, Any] | None:
    with suppress(DamagedArtifactError):
        return _row(run, stage, step, kind)
    return None


def load_metrics(run: Run, stage: str) -> list[dict[str, Any]]:
    """Rows of a stage with metrics and timings joined, ascending by step; empty if nothing was trained yet."""
    metrics, timings = _rows(run.paths.metrics(stage)), _rows(run.paths.timings(stage))
    by_step = {row["step"]: row for row in timings}
    return [{**row, **by_step.get(row["step"], {})} for row in metrics]


def _append(run: Run, stage: str, step: int, kind: str, path: Path) -> None:
    rows = _rows(path)
    if [row["step"] for row in rows] != list(range(step)):
        if len(rows) > step:  # a replayed step: its row is there
            if rows[step] != (row := _row(run, stage, step, kind)):
                _write(path, [*rows[:step], row, *rows[step + 1 :]])
            return
        rows = [_row(run, stage, earlier, kind) for earlier in range(step)]
    _write(path, [*rows, _row(run, stage, step, kind)])


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    sink = pa.BufferOutputStream()
    write_table(pa.Table.from_pylist(rows), sink)
    replace_file(path, sink.getvalue().to_pybytes())


def _row(run: Run, stage: str, step: int, kind: str) -> dict[str, Any]:
    path = run.paths.update(stage, step)
    if not is_published(path):
        raise DamagedArtifactError(f"{path} is missing, though later steps were trained; restore it from a backup")
    return {"step": step, **manifest_of(path).metadata[kind]}


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = read_table(path).to_pylist()
    return rows
