"""The boxes of an on-policy step:

prompts ─▶ rollout ─▶ rollouts.parquet ─┬▶ teacher-score ─▶ teacher.parquet, reference.parquet ─┐
                                        └▶ verify ─▶ rewards.parquet ───────────────────────────┴▶ update

The step number gives the `Objective` with its β (Sec. 3.3). With it, rewards become advantages (2) and KD weights
(Sec. 3.4). The trainer does the rest; update.parquet ends the step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from kdrl_core.boxes.make import Made, Product, box, make, report_progress, timed
from kdrl_core.boxes.session import StageSession
from kdrl_core.boxes.stage import StepSummary, Told, check_replay, end_step, step_facts, timings, update_table
from kdrl_core.config.answers import RewardConfig
from kdrl_core.engines.http_scorer import HTTPScorer
from kdrl_core.engines.protocols import RolloutEngine
from kdrl_core.errors import DataError
from kdrl_core.ledger import Manifest, prompts_of_step
from kdrl_core.ledger.graph import REFERENCE, REWARDS, ROLLOUTS, TEACHER, UPDATE, Node
from kdrl_core.objectives import Objective, recorded_kl, training_signals
from kdrl_core.sampling.responses import generate, requests_for, response_metrics, rollouts_table
from kdrl_core.tables import schemas
from kdrl_core.tables.files import from_matrices, matrices, ragged, score_requests, verdict_columns
from kdrl_core.training.protocols import Float32s, StepStats, Trainer, UpdateBatch
from kdrl_core.types import Rollout, RolloutRequest
from kdrl_core.verify.screening import refuse_failures

TO_VERIFY = ["prompt_id", "sample", "prompt", "response", "ground_truth", "length", "finish_reason"]
"""Columns of ROLLOUTS that a verdict needs; the last two are for `reward.functions`."""
_TO_SCORE = ["prompt_id", "sample", "prompt_token_ids", "token_ids"]
_TO_TRAIN = [*_TO_SCORE, "rollout_logprobs", "length", "finish_reason", "repetition_rate"]
_ROWS_AT_ONCE = 32
"""Responses that `kl_columns` pads together: few enough for the processor's cache."""


@box(ROLLOUTS, is_kept=True)
def rollout(session: StageSession, at: int) -> Product:
    """Sample the responses of step `at`.

    Raises:
        DataError: the pool is smaller than a step.
        EngineError: the engine's logits are not finite.
    """
    first = _requests(session, at, _problems(session, at))
    sampler = session.sampler_at(at, first)

    def sample(requests: Sequence[RolloutRequest]) -> pa.Table:
        rollouts = generate_for(session, sampler.engine, requests, at=at, phase="rollout")
        engine = session.run.recipe.rollout.engine
        return rollouts_table(requests, rollouts, session.pool, policy_version=at, engine=engine)

    facts: dict[str, Any] = {} if sampler.sync is None else {"sync": asdict(sampler.sync)}
    with session.saving():
        table = sample(first)
        if session.config.dynamic_sampling_rounds:
            from kdrl_core.boxes.resampling import resample_step

            table, facts["resampling"] = resample_step(
                session, at, table, sample=lambda problem_ids: sample(_requests(session, at, problem_ids))
            )
    return Product(content=table, facts=timed(**facts))


@box(TEACHER, phase="teacher-score", rollouts=_TO_SCORE)
def teacher_score(session: StageSession, at: int, rollouts: pa.Table) -> Product:
    """Score the responses of step `at` with the teacher, and for Top-K find its likeliest tokens."""
    scorer, requests, config = session.scorer("teacher"), score_requests(rollouts), session.config
    hidden_s = scorer.hidden_seconds() if isinstance(scorer, HTTPScorer) else 0.0
    ids = rollouts["prompt_id"], rollouts["sample"]
    if config.needs_topk:
        found = scorer.score_topk(requests, config.topk.k)
        logprobs = pa.array([score.logprobs for score in found], pa.list_(pa.float32()))
        topk = from_matrices([s.topk_ids for s in found]), from_matrices([s.topk_logprobs for s in found])
        table = pa.Table.from_arrays([*ids, logprobs, *topk], schema=schemas.TEACHER_TOPK)
    else:
        logprobs = pa.array(scorer.score(requests), pa.list_(pa.float32()))
        table = pa.Table.from_arrays([*ids, logprobs], schema=schemas.TEACHER)
    return Product(content=table, facts=timed(hidden_seconds=hidden_s))


@box(REFERENCE, phase="reference-score", rollouts=_TO_SCORE)
def reference_score(session: StageSession, at: int, rollouts: pa.Table) -> Product:
    """Score the responses of step `at` with the stage's initial policy."""
    logprobs = pa.array(session.scorer("reference").score(score_requests(rollouts)), pa.list_(pa.float32()))
    table = pa.Table.from_arrays([rollouts["prompt_id"], rollouts["sample"], logprobs], schema=schemas.REFERENCE)
    return Product(content=table, facts=timed(hidden_seconds=0.0))


SCORES = (teacher_score, reference_score)


def score_step(session: StageSession, step: int) -> list[Made]:
    """Score a step's responses with each frozen model that the objective needs; none for plain GRPO."""
    return [make(session, each, step) for each in SCORES if each.row.when(session.config)]


@box(REWARDS, rollouts=TO_VERIFY)
def verify(session: StageSession, at: int, rollouts: pa.Table) -> Product:
    """Verify the responses of step `at`. Raises VerificationError as `refuse_failures` does."""
    return verdicts_of(session, rollouts, where=f"{session.stage} step {at}")


def verdicts_of(session: StageSession, rollouts: pa.Table, *, where: str) -> Product:
    """The REWARDS table of responses; with functions REWARDS_OF_FUNCTIONS. `where` names them in errors."""
    options, recipe = session.verdict_options(rollouts["prompt"][0].as_py()), session.run.recipe
    hidden_s, schema = session.verifier.hidden_seconds(), schemas.REWARDS
    columns: dict[str, Any] = {"prompt_id": rollouts["prompt_id"], "sample": rollouts["sample"]}
    if recipe.reward.functions:
        from kdrl_core.boxes.judging import judge_responses

        judged, schema = judge_responses(session, rollouts, options), schemas.REWARDS_OF_FUNCTIONS
        verdicts = [one.verdict for one in judged]
        columns[schemas.REWARD_VALUES] = [one.named_values for one in judged]
    else:
        items = list(zip(rollouts["response"].to_pylist(), rollouts["ground_truth"].to_pylist(), strict=True))
        verdicts = session.verifier.verify_batch(items, **options)
    refuse_failures(verdicts, where, recipe.verification.max_failed_share)
    table = pa.Table.from_pydict({**columns, **verdict_columns(verdicts)}, schema=schema)
    return Product(content=table, facts=timed(hidden_seconds=hidden_s))


def outcomes_of(rewards: pa.Table) -> pa.ChunkedArray:
    """The column of a REWARDS table that masks go by: 0 where a response failed. With functions a success is a reward
    above `reward.success_above`, which the verdict has settled."""
    return rewards["accuracy_reward" if schemas.REWARD_VALUES in rewards.column_names else "reward"]


def _problems(session: StageSession, step: int) -> list[str]:
    """Ids of the step's problems. Raises DataError if the pool is smaller than a step."""
    run, stage, config = session.run, session.stage, session.config
    if len(session.pool) < config.prompts_per_step:
        raise DataError(
            f"{stage}: the pool has {len(session.pool)} problems, fewer than "
            f"prompts_per_step={config.prompts_per_step}; "
            f"loosen the filter ({stage}.data) or lower {stage}.prompts_per_step"
        )
    return prompts_of_step(
        list(session.pool), seed=run.recipe.seed, stage=stage, step=step, prompts_per_step=config.prompts_per_step
    )


def _requests(session: StageSession, step: int, problem_ids: Sequence[str]) -> list[RolloutRequest]:
    prompts = {problem_id: session.pool[problem_id]["prompt_token_ids"] for problem_id in problem_ids}
    return requests_for(prompts, session.config.group_size, session.run.recipe.seed, session.stage, step)


def generate_for(
    session: StageSession, engine: RolloutEngine, requests: Sequence[RolloutRequest], *, at: int, phase: str
) -> list[Rollout]:
    """Sample responses to problems of the pool. Finished ones are counted, verified and (on servers) scored early."""
    report = partial(report_progress, session.run, stage=session.stage, at=at, phase=phase)
    return generate(
        engine,
        requests,
        on_finished=session.work_ahead,
        on_progress=lambda done, total: report(done=done, total=total),
    )


# --- update -----------------------------------------------------------------------------------------------------------


def update_step(session: StageSession, step: int) -> StepSummary:
    """Train on a step's files and publish what was done. Raises as `update` and `make` do."""
    return end_step(session, update, step)


@box(UPDATE, is_kept=True, replay=check_replay, phase="update", rollouts=_TO_TRAIN)
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
    batch = batch_of(session, at, rollouts, rewards, teacher, reference)
    trainer = session.trainer_at(at)
    session.rest()
    stats = _trained(trainer, batch, session.config.updates_per_step)
    told = {node.name: manifest.metadata for node, manifest in manifests.items()}
    metrics = {
        **response_metrics(rollouts, rewards),
        **_metrics_of_functions(session.run.recipe.reward, rewards),
        **stats.metrics,
        "beta": batch.objective.beta,
        **_gap(rollouts, stats),
        **_sync(told),
        **_resampling(told),
    }
    tokens = int(sum(rollouts["length"].to_pylist()))
    return Product(
        content=update_table(rollouts, stats, **_signals_of(batch, stats)),
        facts=lambda seconds: step_facts(session, at, metrics, timings(told, seconds, tokens)),
    )


def batch_of(
    session: StageSession,
    at: int,
    rollouts: pa.Table,
    rewards: pa.Table,
    teacher: pa.Table | None = None,
    reference: pa.Table | None = None,
) -> UpdateBatch:
    """The trainer's input for step `at`, from the step's tables. A table is None if no such model scores."""
    batch = _update_batch(session.config.objective_at(at), rollouts, rewards, teacher, reference)
    if not session.config.overlong_filtering:
        return batch
    return _without(batch, [reason == "length" for reason in rollouts["finish_reason"].to_pylist()])


def _update_batch(
    objective: Objective,
    rollouts: pa.Table,
    rewards: pa.Table,
    teacher: pa.Table | None,
    reference: pa.Table | None,
) -> UpdateBatch:
    teacher_logprobs = None if teacher is None else ragged(teacher["teacher_logprobs"])
    shaping: dict[str, torch.Tensor] = {}
    if objective.variant.advantages == "shaped rewards":
        assert teacher_logprobs is not None  # the recipe has a teacher that scores
        shaping["student_logprobs"], shaping["response_mask"] = _padded(ragged(rollouts["rollout_logprobs"]))
        shaping["teacher_logprobs"] = _padded(teacher_logprobs)[0]
    outcomes = torch.tensor(outcomes_of(rewards).to_numpy())
    advantages, kd_weights = training_signals(
        objective, torch.tensor(rewards["reward"].to_numpy()), outcomes=outcomes, **shaping
    )
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


def _without(batch: UpdateBatch, is_out: Sequence[bool]) -> UpdateBatch:
    """The batch with these responses left out of the loss: of its sums and of their denominators. Their rewards stay in
    the mean and standard deviation of their group. No advantage and no KD weight is recorded for them."""
    keep = [0.0 if out else 1.0 for out in is_out]
    advantages, kd_weights = (
        [value * kept for value, kept in zip(values, keep, strict=True)]
        for values in (batch.advantages, batch.kd_weights)
    )
    return replace(batch, advantages=advantages, kd_weights=kd_weights, loss_mask=keep)


def _trained(trainer: Trainer, batch: UpdateBatch, num_updates: int) -> StepStats:
    if num_updates == 1:
        stats = trainer.update(batch)
    else:
        from kdrl_core.training.mini_batches import update_in_turn

        stats = update_in_turn(trainer, batch, num_updates)
    if batch.loss_mask is None or any(batch.loss_mask):
        return stats
    # No token takes part in the loss: a mean of the loss, the KL or the entropy would be one of nothing.
    return replace(stats, metrics={name: v for name, v in stats.metrics.items() if name.startswith(_OF_NO_TOKEN)})


_OF_NO_TOKEN = ("optim/", "memory/")
"""Metrics of an update that are no mean over tokens."""


def _signals_of(batch: UpdateBatch, stats: StepStats) -> dict[str, Any]:
    """The columns of UPDATE that record the step's training signals."""
    columns: dict[str, Any] = {"advantage": batch.advantages, "kd_weight": batch.kd_weights}
    columns = {name: np.asarray(values, np.float32) for name, values in columns.items()}
    if batch.teacher_logprobs is not None:
        columns |= kl_columns(stats.logprobs, batch.teacher_logprobs, batch.objective.kl_estimator)
    return columns


def kl_columns(student: Sequence[Float32s], teacher: Sequence[Float32s], estimator: str) -> dict[str, Float32s]:
    """The columns [B] of UPDATE that compare the student's logprobs with the teacher's, [T_i] each.

    Rows are summed as padded to the longest of all, so the sums do not depend on how many are padded at once.
    """
    width = max(len(row) for row in student)
    parts = []
    for start in range(0, len(student), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        (own, mask), (theirs, _) = _padded(student[rows], width), _padded(teacher[rows], width)
        kl_sum = (recorded_kl(own, theirs, estimator) * mask).sum(1)
        parts.append(torch.stack([kl_sum, kl_sum / mask.sum(1), (theirs - own).sum(1)]))
    return dict(zip(("kl_sum", "kl_mean", "log_ratio_sum"), torch.cat(parts, 1).numpy(), strict=True))


def _metrics_of_functions(reward: RewardConfig, rewards: pa.Table) -> dict[str, float]:
    if not reward.functions:
        return {}
    from kdrl_core.boxes.judging import function_metrics

    return function_metrics(reward, rewards)


def _gap(rollouts: pa.Table, stats: StepStats) -> dict[str, float]:
    """How far the engine's logprobs are from the trainer's, over all sampled tokens."""
    engine = rollouts["rollout_logprobs"].combine_chunks().flatten().to_numpy()
    difference = np.abs(engine - np.concatenate(stats.logprobs))
    return {"engine/logprob_gap_mean": float(difference.mean()), "engine/logprob_gap_max": float(difference.max())}


def _sync(told: Told) -> dict[str, float]:
    """Metrics of the weight sync before the step's rollouts; empty for an engine without weight sync."""
    sync = told["rollouts"].get("sync")
    return {f"sync/{name}": float(sync[name]) for name in ("gap_mean", "gap_max", "rebuilt")} if sync else {}


def _resampling(told: Told) -> dict[str, float]:
    if (found := told["rollouts"].get("resampling")) is None:
        return {}
    from kdrl_core.boxes.resampling import metrics_of

    return metrics_of(found)


def _padded(rows: Sequence[Float32s], width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged rows as [B, T] values, 0 on padding, and their mask. T is `width`, or that of the longest row."""
    width = width or max(len(row) for row in rows)
    values, mask = torch.zeros(len(rows), width), torch.zeros(len(rows), width)
    for index, row in enumerate(rows):
        values[index, : len(row)] = torch.from_numpy(row)
        mask[index, : len(row)] = 1.0
    return values, mask
