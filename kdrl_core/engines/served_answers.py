"""Reading the answers of vLLM's `/v1/completions`.

An answer that makes no sense is a TransientError: a server that is restarting, or a proxy, may answer anything.
"""

from typing import Any

import numpy as np


class TransientError(Exception):
    """A fault that may pass: no answer, an answer of a server in trouble, or one that makes no sense."""

    def __init__(self, message: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def positions_of(answer: Any, length: int, url: str) -> list[dict[str, Any]]:
    """`prompt_logprobs` of the only choice: token id → logprob for each position; None for the first position."""
    try:
        positions = answer["choices"][0]["prompt_logprobs"]
        if len(positions) != length or not all(isinstance(position, dict) for position in positions[1:]):
            raise TransientError(f"teacher server {url} gave {len(positions)} positions for {length} tokens")
        return list(positions)
    except (KeyError, IndexError, TypeError, AttributeError):
        raise TransientError(f"teacher server {url} sent an answer without prompt_logprobs") from None


def logprob_of(position: dict[str, Any], token: int, url: str) -> float:
    """The finite logprob of a token at a position."""
    try:
        value = position[str(token)]["logprob"]
    except (KeyError, TypeError):
        raise TransientError(f"teacher server {url} gave no logprob for token {token}") from None
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        raise TransientError(f"teacher server {url} gave logprob {value} to token {token}")
    if not isinstance(value, int | float):  # not shown: it may be anything, even a key that was sent back
        raise TransientError(f"teacher server {url} gave token {token} a logprob that is not a number")
    return float(value)


def best_tokens(position: dict[str, Any], k: int, size: int | None, url: str) -> list[tuple[int, float]]:
    """At most k likeliest (id, logprob) of a position, best first, without ids from `size` on."""
    try:
        ids = [int(token) for token in position]
    except ValueError:
        raise TransientError(f"teacher server {url} names tokens by something else than their ids") from None
    found = [(token, logprob_of(position, token, url)) for token in ids if size is None or token < size]
    return sorted(found, key=lambda each: (-each[1], each[0]))[:k]


def completion_of(answer: Any, url: str) -> tuple[list[int], list[float], str]:
    """Token ids, their finite logprobs and the finish reason (`stop`, `length`) of the only choice."""
    try:
        choice = answer["choices"][0]
        token_ids, values = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        reason = choice["finish_reason"]
    except (KeyError, IndexError, TypeError):
        raise TransientError(f"rollout server {url} sent an answer without token ids and logprobs") from None
    if reason not in ("stop", "length"):
        raise TransientError(f"rollout server {url} ended a response for {reason!r}")
    fine = isinstance(token_ids, list) and all(isinstance(token, int) for token in token_ids) and bool(token_ids)
    if not fine or not isinstance(values, list) or len(values) != len(token_ids):
        raise TransientError(f"rollout server {url} sent a response without tokens, or without a logprob for each")
    if not all(isinstance(value, int | float) and np.isfinite(value) for value in values):
        raise TransientError(f"rollout server {url} sent a logprob that is not a finite number")
    return token_ids, [float(value) for value in values], reason
