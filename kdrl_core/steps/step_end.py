"""The end of an optimiser step: update.parquet with the step's metrics in its manifest, the row, a due checkpoint."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from kdrl_core.errors import DamagedArtifactError
from kdrl_core.ledger import Manifest, Run, find_intact, publish_directory, publish_file
from kdrl_core.rollouts.metrics import append_metrics
from kdrl_core.rollouts.schema import write_table
from kdrl_core.steps.checkpoints import is_checkpoint_due, prune_checkpoints
from kdrl_core.steps.session import StageSession

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
    published = find_intact(path)
    replayed = published is not None
    if published is not None:
        _check_replay(path, published, inputs, made.metrics)
    else:
        published = publish_file(
            path,
            lambda file: write_table(made.table, file),
            inputs=inputs,
            metadata={"metrics": made.metrics, "timings": made.timings},
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
            expected=_sampled_from(run, stage, step + 1),
        )
        prune_checkpoints(run, stage)
    return StepSummary(
        step=step,
        metrics=recorded["metrics"],
        timings=recorded["timings"],
        checkpoint=checkpoint,
        replayed=replayed,
    )


def _check_replay(path: Path, published: Manifest, inputs: Mapping[str, str], metrics: Mapping[str, float]) -> None:
    """Refuse a step whose files are not those that it was trained on; warn if its update comes out otherwise."""
    changed = sorted(name for name in {*inputs, *published.inputs} if inputs.get(name) != published.inputs.get(name))
    if changed:
        raise DamagedArtifactError(
            f"{path} was made from other files than are there now: {', '.join(changed)}; "
            "restore them from a backup, or start a new run"
        )
    recorded = published.metadata["metrics"]
    differing = [name for name, value in metrics.items() if not _same(value, recorded.get(name))]
    if differing:
        name = max(differing, key=lambda name: abs(metrics[name] - recorded.get(name, math.inf)))
        _logger.warning(
            "%s: its replay gives %s %r, recorded is %r (%d metrics differ): this machine or these versions do not "
            "reproduce the run bit by bit",
            *(path, name, metrics[name], recorded.get(name), len(differing)),
        )


def _same(value: float, recorded: float | None) -> bool:
    return recorded is not None and (value == recorded or (math.isnan(value) and math.isnan(recorded)))


def _sampled_from(run: Run, stage: str, step: int) -> str | None:
    """The sha256 of the checkpoint at `step` that rollouts were sampled from since, of this stage or of the next."""
    stages: tuple[str, ...] = run.recipe.stages
    following = [(stage, step), *((later, 0) for later in stages[stages.index(stage) + 1 :][:1])]
    checkpoint = run.paths.checkpoint(stage, step)
    found = (run.used_by(run.paths.rollouts(*where), checkpoint) for where in following)
    return next((sha256 for sha256 in found if sha256 is not None), None)
