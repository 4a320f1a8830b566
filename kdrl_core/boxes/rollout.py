"""prompts ─▶ rollout ─▶ rollouts.parquet: G responses to each prompt of a step, from the current policy."""

from collections.abc import Sequence
from dataclasses import asdict

import pyarrow as pa

from kdrl_core.boxes.make import Product, box, timed
from kdrl_core.boxes.session import StageSession
from kdrl_core.errors import DataError
from kdrl_core.ledger import derive_seed, prompts_of_step
from kdrl_core.ledger.graph import ROLLOUTS
from kdrl_core.ledger.progress import report_progress
from kdrl_core.tables import schemas
from kdrl_core.tables.responses import repetition_rate
from kdrl_core.types import Rollout, RolloutRequest


@box(ROLLOUTS, is_kept=True)
def rollout(session: StageSession, at: int) -> Product:
    """Sample the responses of step `at`.

    Raises:
        DataError: the pool is smaller than a step.
        EngineError: the engine's logits are not finite.
    """
    requests = _requests(session, at)
    sampler = session.sampler_at(at, requests)
    rollouts = sampler.engine.generate(requests, on_finished=Finished(session, at, "rollout", len(requests)))
    engine = session.run.recipe.rollout.engine
    table = rollouts_table(session, requests, rollouts, policy_version=at, engine=engine)
    return Product(content=table, facts=timed(**({} if sampler.sync is None else {"sync": asdict(sampler.sync)})))


class Finished:
    """What happens to responses while others are still being generated: they are counted, their verification begins,
    and servers of the teacher begin to score them.

    Verdicts and scores do not depend on it, only how long their tasks take.
    """

    def __init__(self, session: StageSession, at: int, phase: str, total: int) -> None:
        self._session = session
        self._at, self._phase = at, phase
        self._done, self._total = 0, total

    def __call__(self, rollouts: Sequence[Rollout]) -> None:
        session = self._session
        self._done += len(rollouts)
        report_progress(
            session.run, stage=session.stage, at=self._at, phase=self._phase, done=self._done, total=self._total
        )
        session.work_ahead(rollouts)


def rollouts_table(
    session: StageSession,
    requests: Sequence[RolloutRequest],
    rollouts: Sequence[Rollout],
    *,
    policy_version: int,
    engine: str,
) -> pa.Table:
    """Responses to problems of the stage's pool as ROLLOUTS."""
    problems = [session.pool[rollout.prompt_id] for rollout in rollouts]
    return pa.Table.from_pydict(
        {
            "prompt_id": [r.prompt_id for r in rollouts],
            "sample": [r.sample for r in rollouts],
            "prompt": [p["prompt"] for p in problems],
            "response": [r.text for r in rollouts],
            "ground_truth": [p["answer"] for p in problems],
            "prompt_token_ids": [r.prompt_token_ids for r in rollouts],
            "token_ids": [r.token_ids for r in rollouts],
            "rollout_logprobs": [r.logprobs for r in rollouts],
            "length": [len(r.token_ids) for r in rollouts],
            "finish_reason": [r.finish_reason.value for r in rollouts],
            "repetition_rate": [repetition_rate(r.token_ids) for r in rollouts],
            "seed": [request.seed for request in requests],
            "policy_version": [policy_version] * len(rollouts),
            "engine": [engine] * len(rollouts),
        },
        schema=schemas.ROLLOUTS,
    )


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
    return [
        RolloutRequest(
            prompt_id=problem_id,
            sample=sample,
            prompt_token_ids=session.pool[problem_id]["prompt_token_ids"],
            seed=derive_seed(run.recipe.seed, stage, step, problem_id, sample),
        )
        for problem_id in problem_ids
        for sample in range(config.group_size)
    ]
