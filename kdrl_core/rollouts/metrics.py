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

from kdrl_core.errors import DamagedArtifactError, RunError
from kdrl_core.ledger import Run, manifest_of, replace_file
from kdrl_core.rollouts.schema import read_table, write_table

_logger = logging.getLogger("kdrl")


def append_metrics(run: Run, stage: str, step: int) -> None:
    """Put the row of a published step into the stage's metrics and timings."""
    for kind, path in _files(run, stage).items():
        rows = _rows(path)
        row = _row(run, stage, step, kind)
        if row not in rows:
            _write(path, [*(r for r in rows if r["step"] < step), row, *(r for r in rows if r["step"] > step)])


def rebuild_metrics(run: Run, stage: str, *, num_steps: int) -> None:
    """Write metrics and timings anew where they do not hold what the manifests of the steps' updates say.

    A row whose manifest is lost is kept as it is, up to the last step that left anything; `num_steps` at least are
    behind the stage. If the row is lost as well, the log says so, and the run goes on without.
    """
    for path, rows in _differing(run, stage, num_steps):
        _write(path, rows)


def differing_metrics(run: Run, stage: str, *, num_steps: int) -> list[Path]:
    """The files that `rebuild_metrics` would write anew."""
    return [path for path, _ in _differing(run, stage, num_steps)]


def load_metrics(run: Run, stage: str) -> list[dict[str, Any]]:
    """Rows of a stage with metrics and timings joined, ascending by step; empty if nothing was trained yet."""
    metrics, timings = (_rows(path) for path in _files(run, stage).values())
    by_step = {row["step"]: row for row in timings}
    return [{**row, **by_step.get(row["step"], {})} for row in metrics]


def _files(run: Run, stage: str) -> dict[str, Path]:
    """What update manifests call it → the file that has it."""
    return {"metrics": run.paths.metrics(stage), "timings": run.paths.timings(stage)}


def _differing(run: Run, stage: str, num_steps: int) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """Files that cannot be read or do not hold what the manifests say, with the rows that belong in them."""
    updated = [step for step in run.paths.begun_steps(stage) if run.paths.update(stage, step).is_file()]
    for kind, path in _files(run, stage).items():
        try:
            found = _rows(path)
        except DamagedArtifactError as error:
            _logger.warning("%s", error.problem)
            found = []
        kept = {row["step"]: row for row in found}
        rows = []
        for step in range(max([num_steps, *(step + 1 for step in updated)])):
            row = _row_or_none(run, stage, step, kind) or kept.get(step)
            if row is not None:
                rows.append(row)
            elif step < num_steps:
                _logger.warning("%s step %d: its %s are lost, with the manifest of its update", stage, step, kind)
        if found != rows:
            yield path, rows


def _row_or_none(run: Run, stage: str, step: int, kind: str) -> dict[str, Any] | None:
    with suppress(RunError):
        return _row(run, stage, step, kind)
    return None


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    sink = pa.BufferOutputStream()
    write_table(pa.Table.from_pylist(rows), sink)
    replace_file(path, sink.getvalue().to_pybytes())


def _row(run: Run, stage: str, step: int, kind: str) -> dict[str, Any]:
    return {"step": step, **manifest_of(run.paths.update(stage, step)).metadata[kind]}


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    table = read_table(path)
    if "step" not in table.column_names:
        raise DamagedArtifactError(f"{path} has no column step", "kdrl resume writes it anew")
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows
