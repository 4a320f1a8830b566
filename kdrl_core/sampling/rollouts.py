"""Rollouts of a step and SFT's samples: with tokens and logprobs, for training."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from kdrl_core.engines.protocols import OnFinished, RolloutEngine
from kdrl_core.sampling.responses import response_columns, responses_of
from kdrl_core.tables.responses import repetition_rate
from kdrl_core.tables.schemas import ROLLOUTS
from kdrl_core.types import Rollout, RolloutRequest


def generate(
    engine: RolloutEngine,
    requests: Sequence[RolloutRequest],
    *,
    on_finished: OnFinished,
    on_progress: Callable[[int, int], None],
) -> list[Rollout]:
    """One response per request, in order.

    Args:
        on_finished: hears responses while others are still being generated, so that their verification can begin.
        on_progress: hears how many there are by then, and of how many.
    """
    done = 0

    def finished(rollouts: Sequence[Rollout]) -> None:
        nonlocal done
        done += len(rollouts)
        on_progress(done, len(requests))
        on_finished(rollouts)

    return engine.generate(requests, on_finished=finished)


def rollouts_table(
    requests: Sequence[RolloutRequest],
    rollouts: Sequence[Rollout],
    problems: Mapping[str, Mapping[str, Any]],
    *,
    policy_version: int,
    engine: str,
) -> pa.Table:
    """ROLLOUTS, a row per response, in order.

    Args:
        problems: rows of the pool by problem_id.
        policy_version: updates behind the sampling policy; -1: the teacher.
        engine: name of the rollout engine.
    """
    asked = [problems[rollout.prompt_id] for rollout in rollouts]
    truths = {problem["problem_id"]: problem["answer"] for problem in asked}
    return pa.Table.from_pydict(
        {
            **response_columns(responses_of(rollouts, [request.seed for request in requests]), truths),
            "prompt": [problem["prompt"] for problem in asked],
            "prompt_token_ids": [r.prompt_token_ids for r in rollouts],
            "token_ids": [r.token_ids for r in rollouts],
            "rollout_logprobs": [r.logprobs for r in rollouts],
            "repetition_rate": [repetition_rate(r.token_ids) for r in rollouts],
            "policy_version": [policy_version] * len(rollouts),
            "engine": [engine] * len(rollouts),
        },
        schema=ROLLOUTS,
    )
