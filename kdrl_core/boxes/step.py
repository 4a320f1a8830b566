"""The boxes of an on-policy step before its update:

prompts ─▶ rollout ─▶ rollouts.parquet ─┬▶ teacher-score ─▶ teacher.parquet, reference.parquet
                                        └▶ verify ─▶ rewards.parquet
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import pyarrow as pa

from kdrl_core.boxes.make import Made, Product, box, make, timed
from kdrl_core.boxes.session import StageSession
from kdrl_core.engines.http_scorer import HTTPScorer
from kdrl_core.engines.protocols import RolloutEngine
from kdrl_core.errors import DataError
from kdrl_core.ledger import prompts_of_step
from kdrl_core.ledger.graph import REFERENCE, REWARDS, ROLLOUTS, TEACHER
from kdrl_core.ledger.run import report_progress
from kdrl_core.sampling.responses import generate, requests_for, rollouts_table
from kdrl_core.tables import schemas
from kdrl_core.tables.columns import from_matrices, score_requests, verdict_columns
from kdrl_core.types import Rollout, RolloutRequest
from kdrl_core.verify.screening import refuse_failures

TO_VERIFY = ["prompt_id", "sample", "prompt", "response", "ground_truth"]
"""Columns of ROLLOUTS that a verdict needs."""
_TO_SCORE = ["prompt_id", "sample", "prompt_token_ids", "token_ids"]


@box(ROLLOUTS, is_kept=True)
def rollout(session: StageSession, at: int) -> Product:
    """Sample the responses of step `at`.

    Raises:
        DataError: the pool is smaller than a step.
        EngineError: the engine's logits are not finite.
    """
    requests = _requests(session, at)
    sampler = session.sampler_at(at, requests)
    rollouts = generate_for(session, sampler.engine, requests, at=at, phase="rollout")
    engine = session.run.recipe.rollout.engine
    table = rollouts_table(requests, rollouts, session.pool, policy_version=at, engine=engine)
    return Product(content=table, facts=timed(**({} if sampler.sync is None else {"sync": asdict(sampler.sync)})))


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


def score_step(session: StageSession, step: int) -> list[Made]:
    """Score a step's responses with each frozen model that the objective needs; none for plain GRPO."""
    return [make(session, each, step) for each in (teacher_score, reference_score) if each.row.when(session.config)]


@box(REWARDS, rollouts=TO_VERIFY)
def verify(session: StageSession, at: int, rollouts: pa.Table) -> Product:
    """Verify the responses of step `at`. Raises VerificationError as `refuse_failures` does."""
    return verdicts_of(session, rollouts, where=f"{session.stage} step {at}")


def verdicts_of(session: StageSession, rollouts: pa.Table, *, where: str) -> Product:
    """REWARDS of responses. `where` names them in errors."""
    items = list(zip(rollouts["response"].to_pylist(), rollouts["ground_truth"].to_pylist(), strict=True))
    hidden_s = session.verifier.hidden_seconds()
    verdicts = session.verifier.verify_batch(items, **session.verdict_options(rollouts["prompt"][0].as_py()))
    refuse_failures(verdicts, where, session.run.recipe.verification.max_failed_share)
    table = pa.Table.from_pydict(
        {"prompt_id": rollouts["prompt_id"], "sample": rollouts["sample"], **verdict_columns(verdicts)},
        schema=schemas.REWARDS,
    )
    return Product(content=table, facts=timed(hidden_seconds=hidden_s))


def _requests(session: StageSession, step: int) -> list[RolloutRequest]:
    run, stage, config = session.run, session.stage, session.config
    if len(session.pool) < config.prompts_per_step:
        raise DataError(
            f"{stage}: the pool has {len(session.pool)} problems, fewer than "
            f"prompts_per_step={config.prompts_per_step}; "
            f"loosen the filter ({stage}.data) or lower {stage}.prompts_per_step"
        )
    problem_ids = prompts_of_step(
        list(session.pool), seed=run.recipe.seed, stage=stage, step=step, prompts_per_step=config.prompts_per_step
    )
    prompts = {problem_id: session.pool[problem_id]["prompt_token_ids"] for problem_id in problem_ids}
    return requests_for(prompts, config.group_size, run.recipe.seed, stage, step)


def generate_for(
    session: StageSession, engine: RolloutEngine, requests: Sequence[RolloutRequest], *, at: int, phase: str
) -> list[Rollout]:
    """Responses to problems of the pool. Meanwhile finished ones are counted, verified and, by servers, scored."""
    report = partial(report_progress, session.run, stage=session.stage, at=at, phase=phase)
    return generate(
        engine,
        requests,
        on_finished=session.work_ahead,
        on_progress=lambda done, total: report(done=done, total=total),
    )
