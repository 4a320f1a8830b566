"""prompts ─▶ rollout ─▶ rollouts.parquet: G responses to each prompt of a step, from the current policy."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from kdrl_core.boxes.session import StageSession
from kdrl_core.errors import DataError
from kdrl_core.ledger import (
    derive_seed,
    find_own,
    is_published,
    manifest_of,
    prompts_of_step,
    publish_file,
    required_sha256,
)
from kdrl_core.ledger.progress import report_progress
from kdrl_core.tables.responses import repetition_rate
from kdrl_core.tables.schemas import ROLLOUTS, write_table
from kdrl_core.types import Rollout, RolloutRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class StepArtifact:
    """A published file of a step, as tasks hand it on: a path and whether it was there already."""

    path: Path
    reused: bool
    seconds: float


def rollout_step(session: StageSession, step: int) -> StepArtifact:
    """Sample the responses of a step and publish them, or find them published.

    Raises:
        DataError: the pool is smaller than a step.
        EngineError: the engine's logits are not finite.
        DamagedArtifactError: a damaged file was made again and came out otherwise, or is of another step.
    """
    started = time.perf_counter()
    run, stage = session.run, session.stage
    path = run.paths.rollouts(stage, step)
    if find_own(run, path):
        return StepArtifact(path=path, reused=True, seconds=0.0)
    requests = _requests(session, step)
    engine = session.engine_at(step, requests)
    rollouts = engine.generate(requests, on_finished=Finished(session, step, "rollout", len(requests)))
    table = rollouts_table(session, requests, rollouts, policy_version=step, engine=run.recipe.rollout.engine)
    sync = {} if session.last_sync is None else {"sync": asdict(session.last_sync)}
    inputs = _inputs(session, step)
    seconds = time.perf_counter() - started
    publish_file(
        path,
        lambda file: write_table(table, file),
        inputs=inputs,
        metadata={"seconds": seconds, **sync},
        expected=required_sha256(run, path),
    )
    return StepArtifact(path=path, reused=False, seconds=time.perf_counter() - started)


class Finished:
    """What happens to responses while others are still being generated: they are counted, their verification begins,
    and servers of the teacher begin to score them.

    Verdicts and scores do not depend on it, only how long their tasks take.
    """

    def __init__(self, session: StageSession, step: int, phase: str, total: int) -> None:
        self._session = session
        self._step, self._phase = step, phase
        self._done, self._total = 0, total

    def __call__(self, rollouts: Sequence[Rollout]) -> None:
        session = self._session
        self._done += len(rollouts)
        report_progress(
            session.run, stage=session.stage, step=self._step, phase=self._phase, done=self._done, total=self._total
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
        schema=ROLLOUTS,
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


def _inputs(session: StageSession, step: int) -> dict[str, str]:
    """The pool and what the sampling policy is, by the hashes in their manifests: its checkpoint, or, where none is
    published, the update that made it. An initial policy from outside the run has none."""
    run, stage = session.run, session.stage
    policy = run.paths.checkpoint(stage, step) if step > 0 else session.initial_policy
    if step > 0 and not is_published(policy):
        policy = run.paths.update(stage, step - 1)
    sources = [path for path in (run.paths.pool, policy) if path.is_relative_to(run.paths.root)]
    return {run.relative(source): manifest_of(source).sha256 for source in sources}
