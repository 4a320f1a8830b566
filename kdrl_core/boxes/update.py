"""{rollouts, teacher, reference, rewards}.parquet ─▶ update ─▶ update.parquet, metrics, checkpoint.

The step number gives the `Objective` with its β (Sec. 3.3). With it, rewards become advantages (2) and KD weights
(Sec. 3.4). The trainer does the rest. `end_step` is the end of every optimiser step, that of SFT as well.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from kdrl_core.alarms import Alarm, raised_at_last, to_metadata
from kdrl_core.boxes.checkpoints import is_checkpoint_due, prune_checkpoints
from kdrl_core.boxes.make import Box, Product, box, make
from kdrl_core.boxes.session import StageSession
from kdrl_core.errors import DamagedArtifactError
from kdrl_core.ledger import Manifest, Run
from kdrl_core.ledger.graph import CHECKPOINT, UPDATE, Node
from kdrl_core.objectives import Objective, recorded_kl, training_signals
from kdrl_core.tables import schemas
from kdrl_core.tables.columns import matrices, ragged, response_metrics, score_requests
from kdrl_core.tables.metrics import append_metrics, load_metrics
from kdrl_core.training.protocols import Float32s, StepStats, UpdateBatch

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
    raised = raised_at_last(rows, session.alarm_rules, stage=session.stage)
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


def update_step(session: StageSession, step: int) -> StepSummary:
    """Train on a step's files and publish what was done. Raises as `update` and `make` do."""
    return end_step(session, update, step)


@box(UPDATE, is_kept=True, replay=check_replay, phase="update")
def update(
    session: StageSession,
    at: int,
    manifests: Mapping[Node, Manifest],
    rollouts: pa.Table,
    rewards: pa.Table,
    teacher: pa.Table | None = None,
    reference: pa.Table | None = None,
) -> Product:
    """Train on the files of step `at`. A step whose `update.parquet` is published is replayed: the trainer makes the
    same update again from the same files.

    Raises:
        EngineError: loss or gradients are not finite.
        DamagedArtifactError: the replay gives other metrics than are recorded.
    """
    batch = _update_batch(session.config.objective_at(at), rollouts, rewards, teacher, reference)
    trainer = session.trainer_at(at)
    session.rest()
    stats = trainer.update(batch)
    told = {node.name: manifest.metadata for node, manifest in manifests.items()}
    metrics = {
        **response_metrics(rollouts, rewards),
        **stats.metrics,
        "beta": batch.objective.beta,
        **_gap(rollouts, stats),
        **_sync(told),
    }
    tokens = int(sum(rollouts["length"].to_pylist()))
    return Product(
        content=update_table(rollouts, stats, **_signals_of(batch, stats)),
        facts=lambda seconds: step_facts(session, at, metrics, _timings(told, seconds, tokens)),
    )


def _update_batch(
    objective: Objective,
    rollouts: pa.Table,
    rewards: pa.Table,
    teacher: pa.Table | None,
    reference: pa.Table | None,
) -> UpdateBatch:
    """What the trainer needs of a step, from the tables of its files. A table is None where no such model scores."""
    teacher_logprobs = None if teacher is None else ragged(teacher["teacher_logprobs"])
    shaping: dict[str, torch.Tensor] = {}
    if objective.variant.advantages == "shaped rewards":
        assert teacher_logprobs is not None  # the recipe has a teacher that scores
        shaping["student_logprobs"], shaping["response_mask"] = _padded(ragged(rollouts["rollout_logprobs"]))
        shaping["teacher_logprobs"] = _padded(teacher_logprobs)[0]
    advantages, kd_weights = training_signals(objective, torch.tensor(rewards["reward"].to_numpy()), **shaping)
    topk: dict[str, Any] = {}
    if teacher is not None and objective.needs_topk:
        topk = {name: matrices(teacher[name]) for name in ("topk_ids", "topk_logprobs")}
    return UpdateBatch(
        sequences=score_requests(rollouts),
        objective=objective,
        advantages=advantages.tolist(),
        kd_weights=kd_weights.tolist(),
        teacher_logprobs=teacher_logprobs,
        ref_logprobs=None if reference is None else ragged(reference["ref_logprobs"]),
        rollout_logprobs=None if objective.tis_cap is None else ragged(rollouts["rollout_logprobs"]),
        **topk,
    )


def update_table(rows: pa.Table, stats: StepStats, **signals: Any) -> pa.Table:
    """UPDATE of a step that trained on these rows. Columns that are not given are null."""
    kind = pa.list_(pa.float32())
    columns = {field.name: pa.nulls(len(rows), field.type) for field in schemas.UPDATE} | signals
    columns |= {"prompt_id": rows["prompt_id"], "sample": rows["sample"], "logprobs": pa.array(stats.logprobs, kind)}
    if stats.entropies is not None:
        columns["entropies"] = pa.array(stats.entropies, kind)
    return pa.Table.from_pydict(columns, schema=schemas.UPDATE)


def _signals_of(batch: UpdateBatch, stats: StepStats) -> dict[str, Any]:
    """The columns of UPDATE that tell what the step's signals were."""
    columns: dict[str, Any] = {"advantage": batch.advantages, "kd_weight": batch.kd_weights}
    columns = {name: np.asarray(values, np.float32) for name, values in columns.items()}
    if batch.teacher_logprobs is not None:
        (student, mask), (teacher, _) = _padded(stats.logprobs), _padded(batch.teacher_logprobs)
        kl_sum = (recorded_kl(student, teacher, batch.objective.kl_estimator) * mask).sum(1)
        columns["kl_sum"] = kl_sum.numpy()
        columns["kl_mean"] = (kl_sum / mask.sum(1)).numpy()
        columns["log_ratio_sum"] = (teacher - student).sum(1).numpy()
    return columns


def _gap(rollouts: pa.Table, stats: StepStats) -> dict[str, float]:
    """How far the engine's logprobs are from the trainer's, over all sampled tokens."""
    engine = rollouts["rollout_logprobs"].combine_chunks().flatten().to_numpy()
    difference = np.abs(engine - np.concatenate(stats.logprobs))
    return {"engine/logprob_gap_mean": float(difference.mean()), "engine/logprob_gap_max": float(difference.max())}


Told = Mapping[str, Mapping[str, Any]]
"""What the manifests of a step's files say, by their rows."""


def _sync(told: Told) -> dict[str, float]:
    """What the weight sync before the step's rollouts showed; nothing of an engine that has none."""
    sync = told["rollouts"].get("sync")
    return {f"sync/{name}": float(sync[name]) for name in ("gap_mean", "gap_max", "rebuilt")} if sync else {}


def _timings(told: Told, update_s: float, tokens: int) -> dict[str, float]:
    rows = {
        "time/rollout_s": "rollouts",
        "time/teacher_score_s": "teacher",
        "time/reference_score_s": "reference",
        "time/verify_s": "rewards",
    }
    timings = {name: float(told[row]["seconds"]) if row in told else 0.0 for name, row in rows.items()}
    timings["time/verify_hidden_s"] = float(told["rewards"].get("hidden_seconds", 0.0))
    if scored := told.get("teacher"):
        timings["time/teacher_score_hidden_s"] = float(scored.get("hidden_seconds", 0.0))
    timings["time/update_s"] = update_s
    if sync := told["rollouts"].get("sync"):
        timings["sync/seconds"] = float(sync["seconds"])
    timings["throughput/rollout_tokens_per_s"] = tokens / max(timings["time/rollout_s"], 1e-9)
    return timings


def _padded(rows: Sequence[Float32s]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged rows as [B, T] values, 0 on padding, and their mask."""
    width = max(len(row) for row in rows)
    values, mask = torch.zeros(len(rows), width), torch.zeros(len(rows), width)
    for index, row in enumerate(rows):
        values[index, : len(row)] = torch.from_numpy(row)
        mask[index, : len(row)] = 1.0
    return values, mask
