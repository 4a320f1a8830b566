"""A step in numbers, from its rows in the index: for `kdrl rollouts stats` and the view `steps`."""

import math
from typing import Any

import duckdb
import pyarrow as pa

from kdrl_core.types import VerdictKind

_VERDICTS = ", ".join(
    f"(count(*) filter (verdict = '{kind.value}') / nullif(count(verdict), 0))::float as verdict_{kind.value}"
    for kind in VerdictKind
)

SUMMARY_SQL = f"""
    with groups as (
        select stage, step, prompt_id, max(reward) as best, min(reward) as worst from rows group by all
    ), counted as (
        select stage, step, count(*) as num_groups,
            count(*) filter (best <= 0) as num_groups_all_wrong, count(*) filter (worst >= 1) as num_groups_all_right
        from groups group by all
    ), steps as (
        select stage, step,
            count(*) as num_rollouts,
            avg(reward) as reward_mean,
            stddev_samp(reward) as reward_std,
            avg(length) as length_mean,
            quantile_cont(length, 0.05) as length_p05,
            quantile_cont(length, 0.5) as length_p50,
            quantile_cont(length, 0.95) as length_p95,
            max(length)::double as length_max,
            avg((finish_reason = 'length')::int) as clip_ratio,
            avg(repetition_rate) as repetition_mean,
            avg(repetition_rate) filter (finish_reason = 'length') as repetition_overlong,
            sum(kl_sum) / nullif(sum(length) filter (kl_sum is not null), 0) as kl_mean,
            avg(entropy_mean) as entropy,
            stddev_samp(advantage) as advantage_std,
            {_VERDICTS}
        from rows group by all
    )
    select * from steps join counted using (stage, step) order by stage, step
"""

SUMMARY: dict[str, str] = {
    "num_rollouts": "responses of the step",
    "reward_mean": "mean reward",
    "reward_std": "standard deviation of the rewards (N - 1)",
    "length_mean": "mean length in tokens",
    "length_p05": "length that 5 % of the responses do not exceed",
    "length_p50": "median length",
    "length_p95": "length that 95 % of the responses do not exceed",
    "length_max": "greatest length",
    "clip_ratio": "share of responses cut at the limit",
    "repetition_mean": "mean repetition rate",
    "repetition_overlong": "mean repetition rate of those cut at the limit; null if there are none",
    "kl_mean": "KL estimate to the teacher: mean over all tokens of the step",
    "entropy": "the trainer's entropy: the stage's metric, or the mean of entropy_mean",
    "advantage_std": "standard deviation of the advantages; 0 if every group agrees",
    **{f"verdict_{kind.value}": f"share of responses with the verdict {kind.value}" for kind in VerdictKind},
    "num_groups": "prompts of the step",
    "num_groups_all_wrong": "prompts of which no response earned more than 0",
    "num_groups_all_right": "prompts of which every response earned 1",
}
"""Columns of a step's summary and what they are."""


def summarize_steps(rows: pa.Table) -> dict[tuple[str, int], dict[str, Any]]:
    """The summary of every step in `rows` (columns of the index), by stage and step. NaN and infinity become None."""
    with duckdb.connect(":memory:", config={"threads": 1}) as connection:
        connection.register("rows", rows)
        found = connection.sql(SUMMARY_SQL).to_arrow_table().to_pylist()
    return {(row.pop("stage"), row.pop("step")): {name: finite(value) for name, value in row.items()} for row in found}


def finite(value: Any) -> Any:
    """`value`, or None for NaN and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
