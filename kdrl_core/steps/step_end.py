"""The end of an optimiser step: update.parquet with the step's metrics in its manifest, the row, a due checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from kdrl_core.ledger import is_published, manifest_of, publish_directory, publish_file, verify_published
from kdrl_core.rollouts.metrics import append_metrics
from kdrl_core.rollouts.schema import write_table
from kdrl_core.steps.checkpoints import is_checkpoint_due, prune_checkpoints
from kdrl_core.steps.session import StageSession


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


def end_step(
    session: StageSession, step: int, record: Callable[[], StepRecord], *, inputs: Mapping[str, str]
) -> StepSummary:
    """Publish what the trainer's update did, which ends the step, and the new policy when one is due.

    Args:
        record: made only if the step's update.parquet is not published yet; otherwise the step was replayed.
        inputs: the files that the update was made from, with their hashes.

    Raises:
        DamagedArtifactError: a published update.parquet was altered.
    """
    run, stage = session.run, session.stage
    path = run.paths.update(stage, step)
    replayed = is_published(path)
    if not replayed:
        made = record()
        publish_file(
            path,
            lambda file: write_table(made.table, file),
            inputs=inputs,
            metadata={"metrics": made.metrics, "timings": made.timings},
        )
    recorded = verify_published(path).metadata
    append_metrics(run, stage, step)
    checkpoint = None
    if is_checkpoint_due(run, stage, step + 1):
        checkpoint = run.paths.checkpoint(stage, step + 1)
        publish_directory(
            checkpoint, session.trainer_at(step + 1).save, inputs={run.relative(path): manifest_of(path).sha256}
        )
        prune_checkpoints(run, stage)
    return StepSummary(
        step=step,
        metrics=recorded["metrics"],
        timings=recorded["timings"],
        checkpoint=checkpoint,
        replayed=replayed,
    )
