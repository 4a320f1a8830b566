"""{rollouts, teacher, reference, rewards}.parquet ─▶ update ─▶ update.parquet, metrics, checkpoint.

The step number gives the `Objective` with its β (Sec. 3.3). With it, rewards become advantages (2) and KD weights
(Sec. 3.4). The trainer does the rest.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from kdrl_core.boxes.make import Product, box
from kdrl_core.boxes.session import StageSession
from kdrl_core.boxes.step_end import StepSummary, check_replay, end_step, step_facts
from kdrl_core.ledger import Manifest
from kdrl_core.ledger.graph import UPDATE, Node
from kdrl_core.objectives import Objective, recorded_kl, training_signals
from kdrl_core.tables import schemas
from kdrl_core.tables.columns import matrices, ragged, score_requests
from kdrl_core.tables.responses import response_metrics
from kdrl_core.training.protocols import Float32s, StepStats, UpdateBatch


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
        content=_update_table(rollouts, batch, stats),
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


def _update_table(rollouts: pa.Table, batch: UpdateBatch, stats: StepStats) -> pa.Table:
    kind = pa.list_(pa.float32())
    columns: dict[str, Any] = {
        "prompt_id": rollouts["prompt_id"],
        "sample": rollouts["sample"],
        "advantage": np.asarray(batch.advantages, np.float32),
        "kd_weight": np.asarray(batch.kd_weights, np.float32),
        "logprobs": pa.array(stats.logprobs, kind),
        "entropies": pa.nulls(len(rollouts), kind) if stats.entropies is None else pa.array(stats.entropies, kind),
    }
    if batch.teacher_logprobs is None:
        columns |= dict.fromkeys(("kl_sum", "kl_mean", "log_ratio_sum"), pa.nulls(len(rollouts), pa.float32()))
    else:
        (student, mask), (teacher, _) = _padded(stats.logprobs), _padded(batch.teacher_logprobs)
        kl_sum = (recorded_kl(student, teacher, batch.objective.kl_estimator) * mask).sum(1)
        columns["kl_sum"] = kl_sum.numpy()
        columns["kl_mean"] = (kl_sum / mask.sum(1)).numpy()
        columns["log_ratio_sum"] = (teacher - student).sum(1).numpy()
    return pa.Table.from_pydict(columns, schema=schemas.UPDATE)


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
