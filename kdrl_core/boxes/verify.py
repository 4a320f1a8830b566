"""rollouts.parquet ─▶ verify ─▶ rewards.parquet: the verdict of each response (B.1.2)."""

import time
from pathlib import Path

import pyarrow as pa

from kdrl_core.boxes.rollout import StepArtifact
from kdrl_core.boxes.session import StageSession
from kdrl_core.ledger import find_own, publish_file, required_sha256
from kdrl_core.tables.columns import verdict_columns
from kdrl_core.tables.schemas import REWARDS, read_table, write_table
from kdrl_core.verify.failures import refuse_failures


def verify_step(session: StageSession, step: int) -> StepArtifact:
    """Verify a step's responses and publish the verdicts, or find them published.

    Raises:
        VerificationError: more verdicts are timeouts or errors than `verification.max_failed_share` allows.
    """
    paths, stage = session.run.paths, session.stage
    rewards = paths.rewards(stage, step)
    return verify_file(session, paths.rollouts(stage, step), rewards, where=f"{stage} step {step}")


def verify_file(session: StageSession, source: Path, path: Path, *, where: str) -> StepArtifact:
    """Verify the responses of `source` and publish the verdicts as `path`. `where` names them in errors."""
    started = time.perf_counter()
    run = session.run
    inputs = run.inputs(source)
    if find_own(run, path, inputs):
        return StepArtifact(path=path, reused=True, seconds=0.0)
    rollouts = read_table(source, ["prompt_id", "sample", "prompt", "response", "ground_truth"])
    items = list(zip(rollouts["response"].to_pylist(), rollouts["ground_truth"].to_pylist(), strict=True))
    hidden_s = session.verifier.hidden_seconds()
    verdicts = session.verifier.verify_batch(items, **session.verdict_options(rollouts["prompt"][0].as_py()))
    refuse_failures(verdicts, where, run.recipe.verification.max_failed_share)
    table = pa.Table.from_pydict(
        {"prompt_id": rollouts["prompt_id"], "sample": rollouts["sample"], **verdict_columns(verdicts)},
        schema=REWARDS,
    )
    seconds = time.perf_counter() - started
    metadata = {"seconds": seconds, "hidden_seconds": hidden_s}
    publish_file(
        path,
        lambda file: write_table(table, file),
        inputs=inputs,
        metadata=metadata,
        expected=required_sha256(run, path),
    )
    return StepArtifact(path=path, reused=False, seconds=time.perf_counter() - started)
