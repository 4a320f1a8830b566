"""dataset.parquet ─▶ SFT update ─▶ update.parquet, metrics, checkpoint (14).

Step k's batch is a function of the dataset and k: `sft.batch_size` consecutive responses of one seeded pass over all
kept responses after another. A pass is ordered by hashes of (seed, stage, epoch, problem, sample), so it does not
depend on the order or the shards in which the samples were made.
"""

import time

import pyarrow as pa

from kdrl_core.boxes.session import StageSession
from kdrl_core.boxes.step_end import StepRecord, StepSummary, end_step
from kdrl_core.config import StageConfig
from kdrl_core.ledger import manifest_of, prompts_of_step
from kdrl_core.ledger.progress import report_progress
from kdrl_core.tables.columns import score_requests
from kdrl_core.tables.schemas import UPDATE
from kdrl_core.training.protocols import StepStats, UpdateBatch


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
    """One step of maximum likelihood on kept teacher responses; replayed where its update.parquet is published.

    Raises:
        EngineError: loss or gradients are not finite.
        DamagedArtifactError: the dataset, or the step's published update, was altered.
    """
    started = time.perf_counter()
    run, stage, config = session.run, session.stage, session.config
    dataset = session.sft_dataset
    path = run.paths.sft_dataset(stage)
    report_progress(run, stage=stage, step=step, phase="update")
    rows = batch_of_step(dataset, seed=run.recipe.seed, stage=stage, step=step, batch_size=config.sft.batch_size)
    zeros = [0.0] * len(rows)
    stats = session.trainer_at(step).update(
        UpdateBatch(
            sequences=score_requests(rows),
            objective=config.objective_at(step),
            advantages=zeros,
            kd_weights=zeros,
        )
    )
    seconds = time.perf_counter() - started
    return end_step(
        session,
        step,
        _record(rows, stats, config, step, len(dataset), seconds),
        inputs={run.relative(path): manifest_of(path).sha256},
    )


def _record(
    rows: pa.Table, stats: StepStats, config: StageConfig, step: int, num_kept: int, seconds: float
) -> StepRecord:
    lengths = rows["length"].to_numpy()
    names = ("advantage", "kd_weight", "kl_sum", "kl_mean", "log_ratio_sum")
    columns = dict.fromkeys(names, pa.nulls(len(rows), pa.float32()))
    table = pa.Table.from_pydict(
        {
            **columns,
            "prompt_id": rows["prompt_id"],
            "sample": rows["sample"],
            "logprobs": pa.array(stats.logprobs, pa.list_(pa.float32())),
            "entropies": pa.nulls(len(rows), pa.list_(pa.float32())),
        },
        schema=UPDATE,
    )
    return StepRecord(
        table=table,
        metrics={
            **stats.metrics,
            "sft/epoch": (step + 1) * config.sft.batch_size / num_kept,
            "response/length_mean": float(lengths.mean()),
            "response/length_max": float(lengths.max()),
        },
        timings={"time/update_s": seconds, "throughput/update_tokens_per_s": float(lengths.sum()) / max(seconds, 1e-9)},
    )
