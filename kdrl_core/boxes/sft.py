"""Supervised fine-tuning on the teacher's right responses: rejection sampling (B.2), then the likelihood (14).

    pool ─▶ teacher-sample ─▶ verify ─▶ select ─▶ dataset.parquet ─▶ sft-update ─▶ update.parquet, metrics, checkpoint

Every problem of the stage's pool gets `sft.samples` responses of the teacher, at the stage's temperature and response
limit. Those with the right answer are kept (B.2), or those with reward 1 (`sft.keep`). The seed of a response comes
from (seed, stage, "sft", problem, sample), so it depends neither on the shards nor on the other problems.

The batch of step k is a function of the dataset and k: seeded passes over all kept responses follow one another, and
each batch takes the next `sft.batch_size` responses. A pass is ordered by hashes of (seed, stage, epoch, problem,
sample), so it does not depend on the order or the shards in which the samples were made.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from kdrl_core.boxes.make import Product, box, report_progress, timed
from kdrl_core.boxes.session import StageSession
from kdrl_core.boxes.shards import num_shards, shard_problem_ids
from kdrl_core.boxes.stage import StepSummary, check_replay, end_step, step_facts, update_table
from kdrl_core.boxes.step import TO_VERIFY, generate_for, verdicts_of
from kdrl_core.errors import DataError
from kdrl_core.ledger import Manifest, prompts_of_step
from kdrl_core.ledger.graph import SAMPLE_REWARDS, SAMPLE_ROLLOUTS, SFT_DATASET, UPDATE, Node
from kdrl_core.sampling.responses import requests_for, rollouts_table
from kdrl_core.tables import schemas
from kdrl_core.tables.files import score_requests
from kdrl_core.training.protocols import UpdateBatch

TEACHER_VERSION = -1
"""`policy_version` of the teacher's samples."""

_KEEPS = {"accuracy": "accuracy_reward", "reward": "reward"}
"""`sft.keep` → the column of REWARDS that is 1 where a response is kept. With functions a success is kept."""


@box(SAMPLE_ROLLOUTS, is_kept=True)
def teacher_sample(session: StageSession, at: int) -> Product:
    """Sample the teacher on the problems of shard `at`. Raises EngineError if its logits are not finite."""
    run, stage = session.run, session.stage
    ids = shard_problem_ids(run, stage, at)
    prompts = {problem_id: session.pool[problem_id]["prompt_token_ids"] for problem_id in ids}
    requests = requests_for(prompts, session.config.sft.samples, run.recipe.seed, stage, "sft")
    phase = f"sampling shard {at + 1}/{num_shards(run, stage)}"
    report_progress(run, stage=stage, at=at, phase=phase, done=0, total=len(requests))
    teacher = run.recipe.teacher
    assert teacher is not None  # the recipe was validated
    rollouts = generate_for(session, session.teacher_engine, requests, at=at, phase=phase)
    table = rollouts_table(requests, rollouts, session.pool, policy_version=TEACHER_VERSION, engine=teacher.engine)
    return Product(content=table, facts=timed())


@box(SAMPLE_REWARDS, sample_rollouts=TO_VERIFY)
def verify_samples(session: StageSession, at: int, sample_rollouts: pa.Table) -> Product:
    """Verify the teacher's responses of shard `at`. Raises VerificationError as `refuse_failures` does."""
    return verdicts_of(session, sample_rollouts, where=f"{session.stage} sample shard {at}")


@box(
    SFT_DATASET,
    is_kept=True,
    phase="select",
    sample_rollouts=[name for name in schemas.SFT_DATASET.names if name != "shard"],
    sample_rewards=[*_KEEPS.values(), schemas.REWARD_VALUES],
)
def select(
    session: StageSession,
    sample_rollouts: Iterator[pa.Table],
    sample_rewards: Iterator[pa.Table],
    manifests: Mapping[Node, Manifest],
) -> Product:
    """Keep the right responses of all shards, by `sft.keep`.

    The manifest counts: `sampled`, `kept`, `problems`, `problems_covered`, and the seconds of sampling and verifying.

    Raises:
        DataError: fewer responses are right than a batch needs.
    """
    stage, config = session.stage, session.config
    tables: list[pa.Table] = []
    sampled, problems = 0, 0
    for shard, (rollouts, rewards) in enumerate(zip(sample_rollouts, sample_rewards, strict=True)):
        keep = "accuracy" if schemas.REWARD_VALUES in rewards.column_names else config.sft.keep
        kept = rollouts.filter(pc.equal(rewards[_KEEPS[keep]], 1.0))
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


def batch_of_step(dataset: pa.Table, *, seed: int, stage: str, step: int, batch_size: int) -> pa.Table:
    """The rows of `dataset` that a step trains on, in order; none twice, though a batch may span two passes.

    Raises:
        ValueError: the dataset is smaller than a batch.
    """
    prompt_ids, samples = dataset["prompt_id"].to_pylist(), dataset["sample"].to_pylist()
    keys = [f"{prompt_id}\x1f{sample}" for prompt_id, sample in zip(prompt_ids, samples, strict=True)]
    chosen = prompts_of_step(keys, seed=seed, stage=f"{stage}/sft-order", step=step, prompts_per_step=batch_size)
    row_of = {key: row for row, key in enumerate(keys)}
    return dataset.take(pa.array([row_of[key] for key in chosen], pa.int64()))


def sft_step(session: StageSession, step: int) -> StepSummary:
    """Train on a step's responses and publish what was done. Raises as `sft_update` and `make` do."""
    return end_step(session, sft_update, step)


@box(UPDATE, is_kept=True, replay=check_replay, phase="update")
def sft_update(session: StageSession, at: int) -> Product:
    """Step `at` of maximum likelihood on kept teacher responses; replayed where its update.parquet is published.

    Raises:
        EngineError: loss or gradients are not finite.
        DamagedArtifactError: the dataset was altered, or the replay gives other metrics than are recorded.
    """
    run, stage, config, dataset = session.run, session.stage, session.config, session.sft_dataset
    rows = batch_of_step(dataset, seed=run.recipe.seed, stage=stage, step=at, batch_size=config.sft.batch_size)
    zeros = [0.0] * len(rows)
    objective = config.objective_at(at)
    batch = UpdateBatch(sequences=score_requests(rows), objective=objective, advantages=zeros, kd_weights=zeros)
    stats = session.trainer_at(at).update(batch)
    lengths = rows["length"].to_numpy()
    metrics = {
        **stats.metrics,
        "sft/epoch": (at + 1) * config.sft.batch_size / len(dataset),
        "response/length_mean": float(lengths.mean()),
        "response/length_max": float(lengths.max()),
    }

    def facts(seconds: float) -> dict[str, Any]:
        throughput = float(lengths.sum()) / max(seconds, 1e-9)
        return step_facts(
            session, at, metrics, {"time/update_s": seconds, "throughput/update_tokens_per_s": throughput}
        )

    return Product(content=update_table(rows, stats), facts=facts)
