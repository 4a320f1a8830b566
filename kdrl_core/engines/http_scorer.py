"""Teacher scoring by servers: the logprobs of given tokens from vLLM's OpenAI-compatible `/v1/completions`.

The prompt of a request is prompt and response together, as token ids; `prompt_logprobs` gives the logprob of each.
They are those of softmax(logits) whatever the sampling temperature, so a server has to serve weights in which the
temperature is baked (`bake_temperature`), and the recipe says which (`teacher.server.temperature`).

Faults are those of `server_pool`; nothing was published by then.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdrl_core.engines.protocols import TopKScore
from kdrl_core.engines.served_answers import best_tokens, logprob_of, positions_of
from kdrl_core.engines.server_pool import ServedModel, Server, ServerPool
from kdrl_core.errors import EngineError
from kdrl_core.types import ScoreRequest

Scored = tuple[NDArray[np.float32], list[list[tuple[int, float]]]]


class HTTPScorer:
    """`TeacherScorer` over one or more servers of the same model.

    Args:
        served: the servers.
        num_tokens: ids from here on are padding of the embedding, never among the top-K; None: none are.
        max_tokens: prompt and response tokens of the longest request to come, compared with the servers' context.

    Raises:
        EngineError: a server cannot be reached within `retry_for_s`, serves another model or too short a context, or
            refuses the key.
    """

    def __init__(self, served: ServedModel, *, num_tokens: int | None = None, max_tokens: int | None = None) -> None:
        self._num_tokens = num_tokens
        self._pool = ServerPool(served, role="teacher", field="teacher.server", max_tokens=max_tokens)

    def score(self, requests: Sequence[ScoreRequest]) -> list[NDArray[np.float32]]:
        """Logprobs [len(token_ids)] float32 per request, in order. Raises EngineError as the class says."""
        return [logprobs for logprobs, _ in self._score_all(requests, 0)]

    def score_topk(self, requests: Sequence[ScoreRequest], k: int) -> list[TopKScore]:
        """Logprobs and the k likeliest tokens per request, in order; padding ids are left out.

        Raises:
            EngineError: as the class says; also if the server gives fewer than k tokens (`--max-logprobs`).
        """
        found = []
        for logprobs, rows in self._score_all(requests, k):
            ids = np.array([[token for token, _ in row] for row in rows], np.int32).reshape(len(logprobs), k)
            values = np.array([[value for _, value in row] for row in rows], np.float32).reshape(len(logprobs), k)
            found.append(TopKScore(logprobs=logprobs, topk_ids=ids, topk_logprobs=values))
        return found

    def close(self) -> None:
        """Let go of the connections."""
        self._pool.close()

    def _score_all(self, requests: Sequence[ScoreRequest], k: int) -> list[Scored]:
        return self._pool.ask_all(
            [(f"response {row}", partial(self._score_one, request, k)) for row, request in enumerate(requests)]
        )

    def _score_one(self, request: ScoreRequest, k: int, server: Server) -> Scored:
        ids = [*request.prompt_token_ids, *request.token_ids]
        body = {
            "model": self._pool.model,
            "prompt": ids,
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": k + self._num_padding(k),
        }
        answer = self._pool.answer(server, "POST", "/completions", body)
        positions = positions_of(answer, len(ids), server.url)[len(request.prompt_token_ids) :]
        tokens = zip(positions, request.token_ids, strict=True)
        logprobs = np.array([logprob_of(position, token, server.url) for position, token in tokens], np.float32)
        return logprobs, [self._best(position, k, server) for position in positions] if k else []

    def _num_padding(self, k: int) -> int:
        """More tokens than k are asked for where some may be padding, which is never likely but may be listed."""
        return 0 if not k or self._num_tokens is None else 4

    def _best(self, position: dict[str, Any], k: int, server: Server) -> list[tuple[int, float]]:
        kept = best_tokens(position, k, self._num_tokens, server.url)
        if len(kept) < k:
            raise EngineError(
                f"teacher server {server.url} gives {len(kept)} tokens a position, {k} are needed; "
                f"start it with --max-logprobs {k + self._num_padding(k) + 1}"
            )
        return kept
