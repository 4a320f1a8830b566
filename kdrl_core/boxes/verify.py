"""rollouts.parquet ─▶ verify ─▶ rewards.parquet: the verdict of each response (B.1.2)."""

import pyarrow as pa

from kdrl_core.boxes.make import Product, box, timed
from kdrl_core.boxes.session import StageSession
from kdrl_core.ledger.graph import REWARDS, SAMPLE_REWARDS
from kdrl_core.tables import schemas
from kdrl_core.tables.columns import verdict_columns
from kdrl_core.verify.failures import refuse_failures

_COLUMNS = ["prompt_id", "sample", "prompt", "response", "ground_truth"]


@box(REWARDS, rollouts=_COLUMNS)
def verify(session: StageSession, at: int, rollouts: pa.Table) -> Product:
    """Verify the responses of step `at`. Raises VerificationError as `refuse_failures` does."""
    return _verdicts(session, rollouts, where=f"{session.stage} step {at}")


@box(SAMPLE_REWARDS, sample_rollouts=_COLUMNS)
def verify_samples(session: StageSession, at: int, sample_rollouts: pa.Table) -> Product:
    """Verify the teacher's responses of shard `at`. Raises VerificationError as `refuse_failures` does."""
    return _verdicts(session, sample_rollouts, where=f"{session.stage} sample shard {at}")


def _verdicts(session: StageSession, rollouts: pa.Table, *, where: str) -> Product:
    items = list(zip(rollouts["response"].to_pylist(), rollouts["ground_truth"].to_pylist(), strict=True))
    hidden_s = session.verifier.hidden_seconds()
    verdicts = session.verifier.verify_batch(items, **session.verdict_options(rollouts["prompt"][0].as_py()))
    refuse_failures(verdicts, where, session.run.recipe.verification.max_failed_share)
    table = pa.Table.from_pydict(
        {"prompt_id": rollouts["prompt_id"], "sample": rollouts["sample"], **verdict_columns(verdicts)},
        schema=schemas.REWARDS,
    )
    return Product(content=table, facts=timed(hidden_seconds=hidden_s))
