"""The end of an optimiser step: update.parquet with metrics and alarms in its manifest, rows, a due checkpoint."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdrl_core.alarms import Alarm, raised_at_last, to_metadata
from kdrl_core.boxes.checkpoints import is_checkpoint_due, prune_checkpoints
from kdrl_core.boxes.make import Box, Product, box, make
from kdrl_core.boxes.session import StageSession
from kdrl_core.errors import DamagedArtifactError
from kdrl_core.ledger import Manifest, Run
from kdrl_core.ledger.graph import CHECKPOINT
from kdrl_core.tables.metrics import append_metrics, load_metrics

_ROUNDING = {"rel_tol": 1e-3, "abs_tol": 1e-5}
_logger = logging.getLogger("kdrl")


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


@box(CHECKPOINT)
def checkpoint(session: StageSession, at: int) -> Product:
    """Save the policy after `at` updates, with the state of its trainer."""
    return Product(content=session.trainer_at(at).save)


def end_step(session: StageSession, update: Box, step: int) -> StepSummary:
    """Make a step's update, which ends it, add its metrics to those of the stage, and save the new policy when one is
    due. Raises as the box `update` does."""
    run, stage = session.run, session.stage
    made = make(session, update, step)
    recorded = made.manifest.metadata
    append_metrics(run, stage, step)
    saved = None
    if is_checkpoint_due(run, stage, step + 1):
        saved = make(session, checkpoint, step + 1).path
        prune_checkpoints(run, stage)
    alarms = [] if made.reused else recorded["alarms"]
    return StepSummary(
        step=step,
        metrics=recorded["metrics"],
        timings=recorded["timings"],
        checkpoint=saved,
        replayed=made.reused,
        alarms=tuple(Alarm(stage=stage, step=step, **alarm) for alarm in alarms),
    )


def step_facts(
    session: StageSession, step: int, metrics: Mapping[str, float], timings: Mapping[str, float]
) -> dict[str, Any]:
    """What an update's manifest says: metrics, timings, and the alarms that the step raises by the recipe's rules, from
    its metrics and those of the steps before."""
    before = [row for row in load_metrics(session.run, session.stage) if row["step"] < step]
    rows = [*before, {"step": step, **metrics}]
    raised = raised_at_last(rows, session.run.recipe.alarms.rules, stage=session.stage)
    return {"metrics": metrics, "timings": timings, "alarms": to_metadata(raised)}


def check_replay(run: Run, path: Path, published: Manifest, facts: Mapping[str, Any]) -> None:
    """Compare the metrics of a replayed update with those that are recorded. They are equal on the machine that made
    them; elsewhere, the order of additions may differ, of which the log warns.

    Raises:
        DamagedArtifactError: on a CPU, which repeats itself, they differ by more than that.
    """
    metrics = facts["metrics"]
    recorded = published.metadata["metrics"]
    differing = [name for name, value in metrics.items() if not _same(value, recorded.get(name))]
    if not differing:
        return
    name = max(differing, key=lambda name: abs(metrics[name] - recorded.get(name, math.inf)))
    told = (
        f"{path}: its replay gives {name} {metrics[name]!r}, recorded is {recorded.get(name)!r} ({len(differing)} "
        "metrics differ)"
    )
    if run.recipe.runtime.device == "cpu" and not all(
        math.isclose(metrics[n], recorded.get(n, math.inf), **_ROUNDING) for n in differing
    ):
        raise DamagedArtifactError(
            f"{told}: the policy is not the one that the step was trained with, or these versions train otherwise",
            f"restore the run from a backup, or delete {path.parent} and the later steps to have them made anew",
        )
    _logger.warning("%s: this machine or these versions do not reproduce the run bit by bit", told)


def _same(value: float, recorded: float | None) -> bool:
    return recorded is not None and (value == recorded or (math.isnan(value) and math.isnan(recorded)))
