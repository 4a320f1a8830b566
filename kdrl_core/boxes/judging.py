"""What `reward.functions` add to a step: the judgements on its responses, and metrics of each function. A run without
functions does without this module."""

from typing import Any

import numpy as np
import pyarrow as pa

from kdrl_core.boxes.session import StageSession
from kdrl_core.config.answers import RewardConfig
from kdrl_core.rewards.judge import Judge, Judgement, facts_of
from kdrl_core.rewards.score import Scored
from kdrl_core.tables.schemas import REWARD_VALUES
from kdrl_core.verify import VerdictOptions


def judge_responses(session: StageSession, rollouts: pa.Table, options: VerdictOptions) -> list[Judgement]:
    """Judge the responses of a ROLLOUTS table by the recipe's functions. Raises as `Judge.judge_batch` does."""
    judge: Judge | None = session.judge
    if judge is None:
        recipe, config = session.run.recipe, session.config
        rounds = config.dynamic_sampling_rounds
        judge = session.judge = Judge(
            recipe.reward,
            recipe.verification,
            session.verifier,
            session.code,
            num_kept=config.prompts_per_step * config.group_size * (1 + rounds) if rounds else 0,
        )
    return judge.judge_batch(_scored(session, rollouts, options), **options)


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


def function_metrics(reward: RewardConfig, rewards: pa.Table) -> dict[str, float]:
    """Metrics of a REWARDS_OF_FUNCTIONS table. Of each function `reward/<name>/mean`, over the responses to which it
    applies, 0 if there are none, and `reward/<name>/applies`, their share; of each part that it gave
    `reward/<name>.<part>/mean`, over the responses that have it."""
    values: dict[str, list[float]] = {}
    for row in rewards[REWARD_VALUES].to_pylist():
        for one in row:
            if one["value"] is not None:
                values.setdefault(one["name"], []).append(one["value"])
    metrics: dict[str, Any] = {}
    for function in reward.functions:
        known = values.pop(function.label, [])
        metrics[f"reward/{function.label}/mean"] = float(np.mean(known)) if known else 0.0
        metrics[f"reward/{function.label}/applies"] = len(known) / len(rewards)
    return metrics | {f"reward/{name}/mean": float(np.mean(known)) for name, known in sorted(values.items())}
