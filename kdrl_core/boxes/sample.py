"""pool ─▶ teacher samples ─▶ verify ─▶ select ─▶ dataset.parquet: rejection sampling for SFT (B.2).

Every problem of the stage's pool gets `sft.samples` responses of the teacher, at the stage's temperature and response
limit; those with reward 1 are kept. A response's seed is that of (seed, stage, "sft", problem, sample), so that neither
shards nor the other problems matter to it.
"""

from collections.abc import Iterator, Mapping

import pyarrow as pa
import pyarrow.compute as pc

from kdrl_core.boxes.make import Product, box, timed
from kdrl_core.boxes.rollout import Finished, rollouts_table
from kdrl_core.boxes.session import StageSession
from kdrl_core.boxes.shards import num_shards, shard_problem_ids
from kdrl_core.errors import DataError
from kdrl_core.ledger import Manifest, derive_seed
from kdrl_core.ledger.graph import SAMPLE_REWARDS, SAMPLE_ROLLOUTS, SFT_DATASET, Node
from kdrl_core.ledger.progress import report_progress
from kdrl_core.tables import schemas
from kdrl_core.types import RolloutRequest

TEACHER_VERSION = -1
"""`policy_version` of samples that no student made."""


@box(SAMPLE_ROLLOUTS, is_kept=True)
def teacher_sample(session: StageSession, at: int) -> Product:
    """Sample the teacher on the problems of shard `at`. Raises EngineError if its logits are not finite."""
    run, stage, samples = session.run, session.stage, session.config.sft.samples
    requests = [
        RolloutRequest(
            prompt_id=problem_id,
            sample=sample,
            prompt_token_ids=session.pool[problem_id]["prompt_token_ids"],
            seed=derive_seed(run.recipe.seed, stage, "sft", problem_id, sample),
        )
        for problem_id in shard_problem_ids(run, stage, at)
        for sample in range(samples)
    ]
    phase = f"sampling shard {at + 1}/{num_shards(run, stage)}"
    report_progress(run, stage=stage, at=at, phase=phase, done=0, total=len(requests))
    teacher = run.recipe.teacher
    assert teacher is not None  # the recipe was validated
    rollouts = session.teacher_engine.generate(requests, on_finished=Finished(session, at, phase, len(requests)))
    table = rollouts_table(session, requests, rollouts, policy_version=TEACHER_VERSION, engine=teacher.engine)
    return Product(content=table, facts=timed())


@box(
    SFT_DATASET,
    is_kept=True,
    phase="select",
    sample_rollouts=[name for name in schemas.SFT_DATASET.names if name != "shard"],
    sample_rewards=["reward"],
)
def select(
    session: StageSession,
    sample_rollouts: Iterator[pa.Table],
    sample_rewards: Iterator[pa.Table],
    manifests: Mapping[Node, Manifest],
) -> Product:
    """Keep the responses with reward 1 of all shards.

    The manifest counts: `sampled`, `kept`, `problems`, `problems_covered`, and the seconds of what came before.

    Raises:
        DataError: fewer responses are right than one step takes.
    """
    stage, config = session.stage, session.config
    tables: list[pa.Table] = []
    sampled, problems = 0, 0
    for shard, (rollouts, rewards) in enumerate(zip(sample_rollouts, sample_rewards, strict=True)):
        kept = rollouts.filter(pc.equal(rewards["reward"], 1.0))
        kept = kept.append_column("shard", pa.array([shard] * len(kept), pa.int32()))
        tables.append(kept.select(schemas.SFT_DATASET.names).cast(schemas.SFT_DATASET))
        sampled += len(rollouts)
        problems += len(pc.unique(rollouts["prompt_id"]))
    dataset = pa.concat_tables(tables)
    if len(dataset) < config.sft.batch_size:
        raise DataError(
            f"{stage}: {len(dataset)} of {sampled} teacher samples are right, fewer than "
            f"{stage}.sft.batch_size={config.sft.batch_size}; start a new run with a smaller batch_size, more "
            f"{stage}.sft.samples, a better teacher, or a higher {stage}.max_response_tokens if samples are cut"
        )
    facts = {
        "sampled": sampled,
        "kept": len(dataset),
        "problems": problems,
        "problems_covered": len(pc.unique(dataset["prompt_id"])),
        "sample_s": _seconds(manifests, SAMPLE_ROLLOUTS.name),
        "verify_s": _seconds(manifests, SAMPLE_REWARDS.name),
    }
    return Product(content=dataset, facts=lambda _: facts)


def _seconds(manifests: Mapping[Node, Manifest], row: str) -> float:
    return sum((manifest.metadata["seconds"] for node, manifest in manifests.items() if node.name == row), 0.0)
