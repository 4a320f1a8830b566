"""The end of an optimiser step: update.parquet with metrics and alarms in its manifest, rows, a due checkpoint."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from kdrl_core.alarms import Alarm, raised_at_last, to_metadata
from kdrl_core.boxes.checkpoints import is_checkpoint_due, prune_checkpoints
from kdrl_core.boxes.session import StageSession
from kdrl_core.errors import DamagedArtifactError
from kdrl_core.ledger import Manifest, find_own, publish_directory, publish_file, required_sha256
from kdrl_core.tables.metrics import append_metrics, load_metrics
from kdrl_core.tables.schemas import write_table

_ROUNDING = {"rel_tol": 1e-3, "abs_tol": 1e-5}
_logger = logging.getLogger("kdrl")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What an update leaves behind."""

    table: pa.Table
    """UPDATE."""
    metrics: dict[str, float]
    timings: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSummary:
    """What the flow needs to tell about a finished step."""

    step: int
    metrics: dict[str, float]
    timings: dict[str, float]
    checkpoint: Path | None
    replayed: bool
    alarms: tuple[Alarm, ...] = ()
    """What the step raised; none of a step that was replayed, which told them when it was made."""


def end_step(session: StageSession, step: int, made: StepRecord, *, inputs: Mapping[str, str]) -> StepSummary:
    """Publish what the trainer's update did, which ends the step, and the new policy when one is due.

    Args:
        made: what the trainer has just done. Where the step's update.parquet is published, the step was replayed,
            and both are compared.
        inputs: the files that the update was made from, with their hashes.

    Raises:
        DamagedArtifactError: the step was trained on other files than it has now, or a damaged update.parquet was made
            again and came out otherwise.
    """
    run, stage = session.run, session.stage
    path = run.paths.update(stage, step)
    published = find_own(run, path)
    replayed = published is not None
    raised: list[Alarm] = []
    if published is not None:
        _check_replay(path, published, made.metrics, is_exact=run.recipe.runtime.device == "cpu")
    else:
        raised = _raised(session, step, made.metrics)
        published = publish_file(
            path,
            lambda file: write_table(made.table, file),
            inputs=inputs,
            metadata={"metrics": made.metrics, "timings": made.timings, "alarms": to_metadata(raised)},
            expected=required_sha256(run, path),
        )
    recorded = published.metadata
    append_metrics(run, stage, step)
    checkpoint = None
    if is_checkpoint_due(run, stage, step + 1):
        checkpoint = run.paths.checkpoint(stage, step + 1)
        publish_directory(
            checkpoint,
            session.trainer_at(step + 1).save,
            inputs={run.relative(path): published.sha256},
            expected=required_sha256(run, checkpoint),
        )
        prune_checkpoints(run, stage)
    return StepSummary(
        step=step,
        metrics=recorded["metrics"],
        timings=recorded["timings"],
        checkpoint=checkpoint,
        replayed=replayed,
        alarms=tuple(raised),
    )


def _raised(session: StageSession, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
    """The alarms that the step raises by the recipe's rules, from its metrics and those of the steps before."""
    before = [row for row in load_metrics(session.run, session.stage) if row["step"] < step]
    rows = [*before, {"step": step, **metrics}]
    return raised_at_last(rows, session.run.recipe.alarms.rules, stage=session.stage)


def _check_replay(path: Path, published: Manifest, metrics: Mapping[str, float], *, is_exact: bool) -> None:
    """Refuse a replay that differs by more than the order of additions explains, where the hardware promises to repeat
    itself; warn of one that differs at all."""
    recorded = published.metadata["metrics"]
    differing = [name for name, value in metrics.items() if not _same(value, recorded.get(name))]
    if not differing:
        return
    name = max(differing, key=lambda name: abs(metrics[name] - recorded.get(name, math.inf)))
    told = (
        f"{path}: its replay gives {name} {metrics[name]!r}, recorded is {recorded.get(name)!r} ({len(differing)} "
        "metrics differ)"
    )
    if is_exact and not all(math.isclose(metrics[n], recorded.get(n, math.inf), **_ROUNDING) for n in differing):
        raise DamagedArtifactError(
            f"{told}: the policy is not the one that the step was trained with, or these versions train otherwise",
            f"restore the run from a backup, or delete {path.parent} and the later steps to have them made anew",
        )
    _logger.warning("%s: this machine or these versions do not reproduce the run bit by bit", told)


def _same(value: float, recorded: float | None) -> bool:
    return recorded is not None and (value == recorded or (math.isnan(value) and math.isnan(recorded)))
