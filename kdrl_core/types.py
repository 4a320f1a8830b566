"""Records that travel between the rings: frozen, plain, picklable; no tensors.

P = prompts per step, G = group size (responses per prompt), B = P × G, grouped contiguously.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class FinishReason(StrEnum):
    """Why generation of a response ended."""

    STOP = "stop"
    """The end-of-sequence token was sampled; it is part of the response."""
    LENGTH = "length"
    """The response limit was reached: truncated, counted in ``response/clip_ratio``."""


class VerdictKind(StrEnum):
    """What verification found; only ``CORRECT`` earns reward 1 (B.1.2)."""

    CORRECT = "correct"
    WRONG = "wrong"
    MALFORMED = "malformed"
    NO_ANSWER = "no_answer"
    TIMEOUT = "timeout"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The reward of one response and the reason for it: ``reward = format_reward · accuracy_reward`` (B.1.2)."""

    kind: VerdictKind
    reward: float
    format_reward: float
    accuracy_reward: float
    extracted: str | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """One response to generate. ``seed`` is derived from (seed, stage, step, prompt, sample), so that the
    response does not depend on the order or the batch in which it is generated."""

    prompt_id: str
    sample: int
    prompt_token_ids: Sequence[int]
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One generated response. ``token_ids`` ends with the EOS token exactly when ``finish_reason`` is ``STOP``;
    ``logprobs[t]`` is the engine's log-probability of ``token_ids[t]`` under softmax(logits / temperature)."""

    prompt_id: str
    sample: int
    prompt_token_ids: Sequence[int]
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    text: str
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """A response whose tokens a frozen model is to score."""

    prompt_token_ids: Sequence[int]
    token_ids: Sequence[int]


ThinkOpened = bool | Literal["closed"]
"""How a prompt leaves the thought: True if it ends with ``<think>``, so that the response starts inside the thought;
"closed" if it ends with ``</think>``, so that the response has no thought of its own; False if it does neither."""
