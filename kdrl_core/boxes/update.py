"""{rollouts, teacher, reference, rewards}.parquet ─▶ update ─▶ update.parquet, metrics, checkpoint.

The objective of the stage is put together here from its parts: rewards or shaped rewards (Sec. 3.1) become advantages
(2), rewards become KD weights (Sec. 3.4), the step number becomes β (Sec. 3.3). The trainer does the rest.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from kdrl_core.boxes.make import Product, box
from kdrl_core.boxes.session import StageSession
from kdrl_core.boxes.step_end import StepSummary, check_replay, end_step, step_facts
from kdrl_core.config import StageConfig
from kdrl_core.ledger import Manifest
from kdrl_core.ledger.graph import UPDATE, Node
from kdrl_core.objectives import BetaSchedule, group_advantages, kd_mask, kl_estimate, shape_rewards
from kdrl_core.tables import schemas
from kdrl_core.tables.columns import matrices, ragged, score_requests
from kdrl_core.tables.responses import response_metrics
from kdrl_core.training.protocols import Float32s, StepStats, TopKTeacher, UpdateBatch

_RECORDED_AS = {"k3_k2grad": "k3", "topk": "k2"}
"""update.parquet holds estimates from the sampled tokens: of estimators that differ in their gradient, or that need the
vocabulary, the nearest that does not."""


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
    config = session.config
    beta = BetaSchedule(config.beta.init, config.beta.decay, config.beta.minimum)(at) if config.beta else 0.0
    batch = _update_batch(session, rollouts, rewards, teacher, reference, beta)
    trainer = session.trainer_at(at)
    session.rest()
    stats = trainer.update(batch)
    told = {node.name: manifest.metadata for node, manifest in manifests.items()}
    metrics = {
        **response_metrics(rollouts, rewards),
        **stats.metrics,
        "beta": beta,
        **_gap(rollouts, stats),
        **_sync(told),
    }
    tokens = int(sum(rollouts["length"].to_pylist()))
    return Product(
        content=_update_table(rollouts, batch, stats, config),
        facts=lambda seconds: step_facts(session, at, metrics, _timings(told, seconds, tokens)),
    )


def _update_batch(
    session: StageSession,
    rollouts: pa.Table,
    rewards: pa.Table,
    scored: pa.Table | None,
    reference: pa.Table | None,
    beta: float,
) -> UpdateBatch:
    config = session.config
    reward = torch.tensor(rewards["reward"].to_numpy())
    teacher = topk = ref = None
    if scored is not None:
        teacher = ragged(scored["teacher_logprobs"])
        if config.needs_topk:
            topk = TopKTeacher(
                token_ids=matrices(scored["topk_ids"]),
                logprobs=matrices(scored["topk_logprobs"]),
                floor=config.topk.floor,
            )
    if reference is not None:
        ref = ragged(reference["ref_logprobs"])
    kd_weights = torch.zeros_like(reward)
    if config.objective == "kd_rkl":
        advantages = torch.zeros_like(reward)
        kd_weights = torch.ones_like(reward)
    elif config.objective == "reward_shaping":
        assert teacher is not None  # scores_teacher
        student, mask = _padded(ragged(rollouts["rollout_logprobs"]))
        shaped = shape_rewards(reward, student, _padded(teacher)[0], mask, beta)
        advantages = group_advantages(shaped, config.group_size, normalize_std=config.normalize_std)
    else:
        advantages = group_advantages(reward, config.group_size, normalize_std=config.normalize_std)
        if config.objective == "kdrl":
            kd_weights = kd_mask(reward, config.group_size, config.kd_masking)
    distils = config.objective in ("kdrl", "kd_rkl")
    return UpdateBatch(
        sequences=score_requests(rollouts),
        advantages=advantages.tolist(),
        kd_weights=kd_weights.tolist(),
        teacher_logprobs=teacher,
        topk=topk,
        ref_logprobs=ref,
        rollout_logprobs=None if config.tis_cap is None else ragged(rollouts["rollout_logprobs"]),
        tis_cap=config.tis_cap,
        beta=beta if distils else 0.0,
        kl_estimator=config.kl_estimator if distils else "k2",
        ref_beta=config.ref_beta,
        ref_kl_estimator=config.ref_kl_estimator,
        entropy_coef=config.entropy_coef,
        aggregation=config.aggregation,
        group_size=config.group_size,
    )


def _update_table(rollouts: pa.Table, batch: UpdateBatch, stats: StepStats, config: StageConfig) -> pa.Table:
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
        estimator = _RECORDED_AS.get(config.kl_estimator, config.kl_estimator)
        kl_sum = (kl_estimate(student, teacher, estimator) * mask).sum(1)
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
