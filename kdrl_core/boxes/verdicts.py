"""Responses ─▶ verdicts: the REWARDS table of a step or of a shard of samples, and what is made of it.

Without `reward.functions` the verifier judges. With them the `Judge` does, and the table says what each returned.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from kdrl_core.boxes.make import Product, timed
from kdrl_core.boxes.session import StageSession
from kdrl_core.config.answers import RewardConfig
from kdrl_core.rewards.judge import facts_of
from kdrl_core.rewards.score import Scored
from kdrl_core.tables import schemas
from kdrl_core.tables.files import verdict_columns
from kdrl_core.verify import VerdictOptions
from kdrl_core.verify.screening import refuse_failures

TO_VERIFY = ["prompt_id", "sample", "prompt", "response", "ground_truth", "length", "finish_reason"]
"""Columns of ROLLOUTS that a verdict needs."""
VALUES = "reward_values"
"""The column of REWARDS_OF_FUNCTIONS that REWARDS lacks."""


def verdicts_of(session: StageSession, rollouts: pa.Table, *, where: str) -> Product:
    """The REWARDS table of responses. `where` names them in errors."""
    options = session.verdict_options(rollouts["prompt"][0].as_py())
    hidden_s = session.verifier.hidden_seconds()
    columns: dict[str, Any] = {"prompt_id": rollouts["prompt_id"], "sample": rollouts["sample"]}
    if session.judge is None:
        items = list(zip(rollouts["response"].to_pylist(), rollouts["ground_truth"].to_pylist(), strict=True))
        verdicts, schema = session.verifier.verify_batch(items, **options), schemas.REWARDS
    else:
        judged = session.judge.judge_batch(_scored(session, rollouts, options), **options)
        verdicts, schema = [one.verdict for one in judged], schemas.REWARDS_OF_FUNCTIONS
        columns[VALUES] = [[{"name": name, "value": value} for name, value in one.values.items()] for one in judged]
    refuse_failures(verdicts, where, session.run.recipe.verification.max_failed_share)
    table = pa.Table.from_pydict({**columns, **verdict_columns(verdicts)}, schema=schema)
    return Product(content=table, facts=timed(hidden_seconds=hidden_s))


def _scored(session: StageSession, rollouts: pa.Table, options: VerdictOptions) -> list[Scored]:
    names = ("prompt_id", "sample", "response", "ground_truth", "length", "finish_reason")
    columns = (rollouts[name].to_pylist() for name in names)
    return [
        (
            response,
            answer,
            facts_of(
                problem_id=problem_id,
                question=session.pool[problem_id]["question"],
                source=session.pool[problem_id]["source"],
                sample=sample,
                length=length,
                finish_reason=finish_reason,
                think_opened=options["think_opened"],
            ),
        )
        for problem_id, sample, response, answer, length, finish_reason in zip(*columns, strict=True)
    ]


def outcomes_of(rewards: pa.Table) -> pa.ChunkedArray:
    """The column of a REWARDS table that masks and rejection go by: 0 where a response failed. With functions a success
    is a reward above `reward.success_above`, which the verdict has settled."""
    return rewards["accuracy_reward" if VALUES in rewards.column_names else "reward"]


def function_metrics(reward: RewardConfig, rewards: pa.Table) -> dict[str, float]:
    """Of each function `reward/<name>/mean` over the responses to which it applies, 0 if there are none, and
    `reward/<name>/applies`, their share."""
    if not reward.functions:
        return {}
    rows = [{one["name"]: one["value"] for one in row} for row in rewards[VALUES].to_pylist()]
    metrics = {}
    for function in reward.functions:
        known = [row[function.label] for row in rows if row.get(function.label) is not None]
        metrics[f"reward/{function.label}/mean"] = float(np.mean(known)) if known else 0.0
        metrics[f"reward/{function.label}/applies"] = len(known) / len(rows)
    return metrics
