"""prompts ─▶ rollout ─▶ rollouts.parquet: G responses to each prompt of a step, from the current policy."""

import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from kdrl_core.boxes.session import StageSession
from kdrl_core.errors import DataError
from kdrl_core.ledger import (
    find_own,
    is_published,
    manifest_of,
    prompts_of_step,
    publish_file,
    required_sha256,
)
from kdrl_core.ledger.progress import report_progress
from kdrl_core.sampling.responses import requests_for
from kdrl_core.sampling.rollouts import generate, rollouts_table
from kdrl_core.tables.schemas import write_table
from kdrl_core.types import RolloutRequest


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
    report = partial(report_progress, run, stage=stage, step=step, phase="rollout")
    rollouts = generate(
        engine,
        requests,
        on_finished=session.work_ahead,
        on_progress=lambda done, total: report(done=done, total=total),
    )
    table = rollouts_table(requests, rollouts, session.pool, policy_version=step, engine=run.recipe.rollout.engine)
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


def _inputs(session: StageSession, step: int) -> dict[str, str]:
    """The pool and what the sampling policy is, by the hashes in their manifests: its checkpoint, or, where none is
    published, the update that made it. An initial policy from outside the run has none."""
    run, stage = session.run, session.stage
    policy = run.paths.checkpoint(stage, step) if step > 0 else session.initial_policy
    if step > 0 and not is_published(policy):
        policy = run.paths.update(stage, step - 1)
    sources = [path for path in (run.paths.pool, policy) if path.is_relative_to(run.paths.root)]
    return {run.relative(source): manifest_of(source).sha256 for source in sources}
