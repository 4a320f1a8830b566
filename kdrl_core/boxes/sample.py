"""pool ─▶ teacher samples ─▶ verify ─▶ select ─▶ dataset.parquet: rejection sampling for SFT (B.2).

Every problem of the stage's pool gets `sft.samples` responses of the teacher, at the stage's temperature and response
limit; those with reward 1 are kept. A response's seed is that of (seed, stage, "sft", problem, sample), so that neither
shards nor the other problems matter to it.
"""

import time
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from kdrl_core.boxes.rollout import StepArtifact
from kdrl_core.boxes.session import StageSession
from kdrl_core.boxes.shards import num_shards, shard_problem_ids
from kdrl_core.boxes.verify import verify_file
from kdrl_core.errors import DataError
from kdrl_core.ledger import find_intact, find_own, manifest_of, publish_file, required_sha256
from kdrl_core.ledger.progress import report_progress
from kdrl_core.sampling.responses import requests_for
from kdrl_core.sampling.rollouts import generate, rollouts_table
from kdrl_core.tables.schemas import SFT_DATASET, read_table, write_table

TEACHER_VERSION = -1
"""`policy_version` of samples that no student made."""


def sample_shard(session: StageSession, shard: int) -> StepArtifact:
    """Sample the teacher on a shard's problems and publish the responses, or find them published.

    Raises:
        EngineError: the teacher's logits are not finite.
        DamagedArtifactError: a damaged file was made again and came out otherwise.
    """
    started = time.perf_counter()
    run, stage = session.run, session.stage
    path = run.paths.sample_rollouts(stage, shard)
    if find_intact(path):
        return StepArtifact(path=path, reused=True, seconds=0.0)
    inputs = run.inputs(run.paths.pool)
    ids = shard_problem_ids(run, stage, shard)
    prompts = {problem_id: session.pool[problem_id]["prompt_token_ids"] for problem_id in ids}
    requests = requests_for(prompts, session.config.sft.samples, run.recipe.seed, stage, "sft")
    phase = f"sampling shard {shard + 1}/{num_shards(run, stage)}"
    report = partial(report_progress, run, stage=stage, step=shard, phase=phase)
    report(done=0, total=len(requests))
    teacher = run.recipe.teacher
    assert teacher is not None  # the recipe was validated
    rollouts = generate(
        session.teacher_engine,
        requests,
        on_finished=session.work_ahead,
        on_progress=lambda done, total: report(done=done, total=total),
    )
    table = rollouts_table(requests, rollouts, session.pool, policy_version=TEACHER_VERSION, engine=teacher.engine)
    seconds = time.perf_counter() - started
    publish_file(path, lambda file: write_table(table, file), inputs=inputs, metadata={"seconds": seconds})
    return StepArtifact(path=path, reused=False, seconds=time.perf_counter() - started)


def verify_shard(session: StageSession, shard: int) -> StepArtifact:
    """Verify a shard's responses and publish the verdicts, or find them published. Raises as `verify_step`."""
    paths, stage = session.run.paths, session.stage
    return verify_file(
        session,
        paths.sample_rollouts(stage, shard),
        paths.sample_rewards(stage, shard),
        where=f"{stage} sample shard {shard}",
    )


def select_samples(session: StageSession) -> StepArtifact:
    """Publish the responses with reward 1 as the stage's dataset, or find it published.

    The counts are in its manifest: `sampled`, `kept`, `problems`, `problems_covered`, and seconds of what came before.

    Raises:
        DataError: fewer responses are right than one step takes.
        DamagedArtifactError: a shard was altered.
    """
    started = time.perf_counter()
    run, stage, config = session.run, session.stage, session.config
    path = run.paths.sft_dataset(stage)
    if find_own(run, path):
        return StepArtifact(path=path, reused=True, seconds=0.0)
    report_progress(run, stage=stage, phase="select")
    inputs: dict[str, str] = {}
    tables: list[pa.Table] = []
    sampled, problems, sample_s, verify_s = 0, 0, 0.0, 0.0
    for shard in range(num_shards(run, stage)):
        sources = run.paths.sample_rollouts(stage, shard), run.paths.sample_rewards(stage, shard)
        inputs |= run.inputs(*sources)
        rollouts, rewards = (read_table(source) for source in sources)
        kept = rollouts.filter(pc.equal(rewards["reward"], 1.0))
        kept = kept.append_column("shard", pa.array([shard] * len(kept), pa.int32()))
        tables.append(kept.select(SFT_DATASET.names).cast(SFT_DATASET))
        sampled += len(rollouts)
        problems += len(pc.unique(rollouts["prompt_id"]))
        sample_s += manifest_of(sources[0]).metadata["seconds"]
        verify_s += manifest_of(sources[1]).metadata["seconds"]
    dataset = pa.concat_tables(tables)
    if len(dataset) < config.sft.batch_size:
        raise DataError(
            f"{stage}: {len(dataset)} of {sampled} teacher samples are right, fewer than "
            f"{stage}.sft.batch_size={config.sft.batch_size}; start a new run with a smaller batch_size, more "
            f"{stage}.sft.samples, a better teacher, or a higher {stage}.max_response_tokens if samples are cut"
        )
    metadata = {
        "sampled": sampled,
        "kept": len(dataset),
        "problems": problems,
        "problems_covered": len(pc.unique(dataset["prompt_id"])),
        "sample_s": sample_s,
        "verify_s": verify_s,
    }
    publish_file(
        path,
        lambda file: write_table(dataset, file),
        inputs=inputs,
        metadata=metadata,
        expected=required_sha256(run, path),
    )
    return StepArtifact(path=path, reused=False, seconds=time.perf_counter() - started)
