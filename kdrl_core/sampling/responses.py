"""Responses without their tokens, the columns that every table of responses has, and what a job wants of a model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kdrl_core.engines.protocols import RolloutEngine
from kdrl_core.types import FinishReason, Rollout, RolloutRequest


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


class Source(Protocol):
    """Answers requests: an engine in this process, or an endpoint."""

    def answer(self, requests: Sequence[RolloutRequest], on_finished: OnResponses) -> list[Response]:
        """One response per request, in order. `on_finished` hears each once it is finished; what is returned counts."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSource:
    """A rollout engine as `Source`."""

    engine: RolloutEngine
    max_response_tokens: int | None = None
    """Fewer than the engine's own limit; None: that one."""

    def answer(self, requests: Sequence[RolloutRequest], on_finished: OnResponses) -> list[Response]:
        """As `Source.answer`. Raises EngineError as the engine does."""
        seeds = {(request.prompt_id, request.sample): request.seed for request in requests}

        def responses(rollouts: Sequence[Rollout]) -> list[Response]:
            return responses_of(rollouts, [seeds[rollout.prompt_id, rollout.sample] for rollout in rollouts])

        return responses(
            self.engine.generate(
                requests,
                on_finished=lambda rollouts: on_finished(responses(rollouts)),
                max_response_tokens=self.max_response_tokens,
            )
        )


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
    """What every table of responses has: `prompt_id`, `sample`, `response`, `ground_truth`, `length`, `finish_reason`
    and `seed`.

    Args:
        ground_truths: by prompt_id.
    """
    return {
        "prompt_id": [r.prompt_id for r in responses],
        "sample": [r.sample for r in responses],
        "response": [r.text for r in responses],
        "ground_truth": [ground_truths[r.prompt_id] for r in responses],
        "length": [r.length for r in responses],
        "finish_reason": [r.finish_reason.value for r in responses],
        "seed": [r.seed for r in responses],
    }
