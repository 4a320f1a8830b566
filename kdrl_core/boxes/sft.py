"""dataset.parquet ─▶ SFT update ─▶ update.parquet, metrics, checkpoint (14).

Step k's batch is a function of the dataset and k: `sft.batch_size` consecutive responses of one seeded pass over all
kept responses after another. A pass is ordered by hashes of (seed, stage, epoch, problem, sample), so it does not
depend on the order or the shards in which the samples were made.
"""

from typing import Any

import pyarrow as pa

from kdrl_core.boxes.make import Product, box
from kdrl_core.boxes.session import StageSession
from kdrl_core.boxes.step_end import StepSummary, check_replay, end_step, step_facts
from kdrl_core.ledger import prompts_of_step
from kdrl_core.ledger.graph import UPDATE
from kdrl_core.tables import schemas
from kdrl_core.tables.columns import score_requests
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
    batch = UpdateBatch(sequences=score_requests(rows), advantages=zeros, kd_weights=zeros, loss="sft")
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

    return Product(content=_update_table(rows, stats), facts=facts)


def _update_table(rows: pa.Table, stats: StepStats) -> pa.Table:
    unknown = ("advantage", "kd_weight", "kl_sum", "kl_mean", "log_ratio_sum")
    return pa.Table.from_pydict(
        {
            **dict.fromkeys(unknown, pa.nulls(len(rows), pa.float32())),
            "prompt_id": rows["prompt_id"],
            "sample": rows["sample"],
            "logprobs": pa.array(stats.logprobs, pa.list_(pa.float32())),
            "entropies": pa.nulls(len(rows), pa.list_(pa.float32())),
        },
        schema=schemas.UPDATE,
    )
