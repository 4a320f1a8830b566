"""Requests, sources that answer them, and responses; for training, these keep tokens and logprobs. And two figures of
responses: the repetition rate, and the metrics of a step (Figures 2–5)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdrl_core.engines.protocols import OnFinished, RolloutEngine
from kdrl_core.ledger import derive_seed
from kdrl_core.tables.files import views
from kdrl_core.tables.schemas import ROLLOUTS
from kdrl_core.types import FinishReason, Rollout, RolloutRequest, VerdictKind

REPETITION_NGRAM = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One response to a request."""

    prompt_id: str
    sample: int
    text: str
    length: int
    """Tokens, EOS included."""
    finish_reason: FinishReason
    seed: int


OnResponses = Callable[[Sequence[Response]], None]
"""Called with responses that have just been finished, in any order, while others are still to come."""


Source = Callable[[Sequence[RolloutRequest], OnResponses], list[Response]]
"""Answers requests: an engine in this process, or an endpoint. It reports each response once it is finished, and
returns all in the order of the requests; the returned ones count."""


def requests_for(prompts: Mapping[str, Sequence[int]], samples: int, *seed_names: object) -> list[RolloutRequest]:
    """`samples` requests per prompt (prompt_id → prompt_token_ids), those of a prompt together, in order.

    A response's seed is `derive_seed(*seed_names, prompt_id, sample)`. So it does not depend on other prompts or
    the shard.
    """
    return [
        RolloutRequest(
            prompt_id=prompt_id,
            sample=sample,
            prompt_token_ids=token_ids,
            seed=derive_seed(*seed_names, prompt_id, sample),
        )
        for prompt_id, token_ids in prompts.items()
        for sample in range(samples)
    ]


def engine_source(engine: RolloutEngine, max_response_tokens: int | None = None) -> Source:
    """A rollout engine as `Source`; `max_response_tokens` is a limit below its own."""

    def answer(requests: Sequence[RolloutRequest], on_finished: OnResponses) -> list[Response]:
        seeds = {(request.prompt_id, request.sample): request.seed for request in requests}

        def responses(rollouts: Sequence[Rollout]) -> list[Response]:
            return responses_of(rollouts, [seeds[rollout.prompt_id, rollout.sample] for rollout in rollouts])

        rollouts = engine.generate(
            requests,
            on_finished=lambda finished: on_finished(responses(finished)),
            max_response_tokens=max_response_tokens,
        )
        return responses(rollouts)

    return answer


def responses_of(rollouts: Sequence[Rollout], seeds: Sequence[int]) -> list[Response]:
    """The rollouts without their tokens and logprobs, with their seeds."""
    return [
        Response(
            prompt_id=rollout.prompt_id,
            sample=rollout.sample,
            text=rollout.text,
            length=len(rollout.token_ids),
            finish_reason=rollout.finish_reason,
            seed=seed,
        )
        for rollout, seed in zip(rollouts, seeds, strict=True)
    ]


def response_columns(responses: Sequence[Response], ground_truths: Mapping[str, str]) -> dict[str, list[Any]]:
    """The columns of every table of responses. `ground_truths` by prompt_id."""
    return {
        "prompt_id": [r.prompt_id for r in responses],
        "sample": [r.sample for r in responses],
        "response": [r.text for r in responses],
        "ground_truth": [ground_truths[r.prompt_id] for r in responses],
        "length": [r.length for r in responses],
        "finish_reason": [r.finish_reason.value for r in responses],
        "seed": [r.seed for r in responses],
    }


def generate(
    engine: RolloutEngine,
    requests: Sequence[RolloutRequest],
    *,
    on_finished: OnFinished,
    on_progress: Callable[[int, int], None],
) -> list[Rollout]:
    """One response per request, in order. `on_finished` gets responses while others are still being generated, so that
    their verification can begin; `on_progress` gets the number of finished responses and of all.
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
    """ROLLOUTS, a row per response, in order. `problems` are rows of the pool by problem_id; `policy_version` is
    the number of updates behind the sampling policy, -1 for the teacher.
    """
    asked = [problems[rollout.prompt_id] for rollout in rollouts]
    truths = {problem["problem_id"]: problem["answer"] for problem in asked}
    token_ids = pa.array([r.token_ids for r in rollouts], pa.list_(pa.int32()))
    return pa.Table.from_pydict(
        {
            **response_columns(responses_of(rollouts, [request.seed for request in requests]), truths),
            "prompt": [problem["prompt"] for problem in asked],
            "prompt_token_ids": [r.prompt_token_ids for r in rollouts],
            "token_ids": token_ids,
            "rollout_logprobs": [np.asarray(r.logprobs, np.float32) for r in rollouts],
            "repetition_rate": [repetition_rate(row) for row in views(token_ids)],
            "policy_version": [policy_version] * len(rollouts),
            "engine": [engine] * len(rollouts),
        },
        schema=ROLLOUTS,
    )


def repetition_rate(token_ids: Sequence[int] | NDArray[np.int32], *, n: int = REPETITION_NGRAM) -> float:
    """Share of the response's n-grams that occurred before in it; 0 for responses shorter than n + 1 tokens.

    The paper does not say how it measures repetition; n-grams, and n = 8, are kdrl's choice."""
    total = len(token_ids) - n + 1
    if total < 2:
        return 0.0
    ngrams = np.lib.stride_tricks.sliding_window_view(np.asarray(token_ids, np.int32), n)
    buffers = [None, pa.py_buffer(np.ascontiguousarray(ngrams))]
    distinct = len(pa.Array.from_buffers(pa.binary(4 * n), total, buffers).unique())
    return 1.0 - distinct / total


def response_metrics(rollouts: pa.Table, rewards: pa.Table) -> dict[str, float]:
    """Metrics of a step's responses and verdicts.

    `response/clip_ratio` is the share cut at the limit, `response/repetition_overlong` the mean repetition rate among
    those, 0 if there are none; `verdict/<kind>` are shares.
    """
    length = rollouts["length"].to_numpy()
    clipped = np.asarray(rollouts["finish_reason"].to_pylist()) == "length"
    repetition = rollouts["repetition_rate"].to_numpy()
    verdicts = np.asarray(rewards["verdict"].to_pylist())
    metrics = {
        "reward/mean": float(rewards["reward"].to_numpy().mean()),
        "reward/format": float(rewards["format_reward"].to_numpy().mean()),
        "reward/accuracy": float(rewards["accuracy_reward"].to_numpy().mean()),
        "response/length_mean": float(length.mean()),
        "response/length_max": float(length.max()),
        "response/clip_ratio": float(clipped.mean()),
        "response/repetition_overlong": float(repetition[clipped].mean()) if clipped.any() else 0.0,
    }
    return metrics | {f"verdict/{kind}": float((verdicts == kind.value).mean()) for kind in VerdictKind}
