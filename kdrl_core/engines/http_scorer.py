"""Teacher scoring by servers: the logprobs of given tokens from vLLM's OpenAI-compatible `/v1/completions`.

The prompt of a request is prompt and response together, as token ids; `prompt_logprobs` gives the logprob of each.
These are logprobs of softmax(logits) at any sampling temperature. So the temperature must be baked into the served
weights (`bake_temperature`), and the recipe names it (`teacher.server.temperature`).

Errors are those of `server_pool`; nothing has been published when they are raised.
"""

from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdrl_core.engines.protocols import TopKScore
from kdrl_core.engines.server_client import best_tokens, logprob_of, positions_of
from kdrl_core.engines.server_pool import ServedModel, Server, ServerPool
from kdrl_core.errors import EngineError
from kdrl_core.types import ScoreRequest
from kdrl_core.verify.workers import Clock

Key = tuple[int, tuple[int, ...], tuple[int, ...]]
Scored = tuple[NDArray[np.float32], list[list[tuple[int, float]]]]


class HTTPScorer:
    """`TeacherScorer` over one or more servers of the same model.

    Args:
        num_tokens: ids from this number on are padding of the embedding, never among the top-K; None: no padding.
        max_tokens: prompt and response tokens of the longest request to come, checked against the servers' context.

    Raises:
        EngineError: as `ServerPool`.
    """

    def __init__(self, served: ServedModel, *, num_tokens: int | None = None, max_tokens: int | None = None) -> None:
        self._num_tokens = num_tokens
        self._ahead: dict[Key, Future[Scored]] = {}
        self._ahead_clock = Clock()
        self._pool = ServerPool(served, role="teacher", field="teacher.server", max_tokens=max_tokens)

    def score(self, requests: Sequence[ScoreRequest]) -> list[NDArray[np.float32]]:
        return [logprobs for logprobs, _ in self._score_all(requests, 0)]

    def score_topk(self, requests: Sequence[ScoreRequest], k: int) -> list[TopKScore]:
        """Raises EngineError also if a server gives fewer than k tokens (`--max-logprobs`)."""
        found = []
        for logprobs, rows in self._score_all(requests, k):
            ids = np.array([[token for token, _ in row] for row in rows], np.int32).reshape(len(logprobs), k)
            values = np.array([[value for _, value in row] for row in rows], np.float32).reshape(len(logprobs), k)
            found.append(TopKScore(logprobs=logprobs, topk_ids=ids, topk_logprobs=values))
        return found

    def score_ahead(self, requests: Sequence[ScoreRequest], k: int = 0) -> None:
        """Let the servers start on requests of `score`, or of `score_topk` with this k, and return at once.

        The next call takes the finished results, waits for the others, and drops results that it does not ask for.
        """
        for request in requests:
            if (key := _key(request, k)) not in self._ahead:
                self._ahead_clock.start()
                self._ahead[key] = self._pool.begin("a response, ahead", partial(self._score_one, request, k))
                self._ahead[key].add_done_callback(self._ahead_clock.stop)

    def hidden_seconds(self) -> float:
        """Seconds in which servers scored responses of `score_ahead`, since the last call of this method."""
        return self._ahead_clock.read()

    @property
    def says(self) -> dict[str, Any]:
        """What its servers say of the model: `ServerPool.says`."""
        return self._pool.says

    @property
    def sleeps(self) -> bool:
        """Whether its servers share GPUs with the rollout engine, so that the two take turns."""
        return self._pool.sleeps

    def sleep(self) -> None:
        self._pool.sleep()

    def close(self) -> None:
        self._pool.close()

    def _score_all(self, requests: Sequence[ScoreRequest], k: int) -> list[Scored]:
        ahead, self._ahead = self._ahead, {}
        found: dict[int, Scored] = {}
        for row, request in enumerate(requests):
            if (future := ahead.get(_key(request, k))) is not None:
                with suppress(EngineError, CancelledError):  # it is asked for again, and that call raises
                    found[row] = future.result()
        missing = [row for row in range(len(requests)) if row not in found]
        asked = [(f"response {row}", partial(self._score_one, requests[row], k)) for row in missing]
        found.update(zip(missing, self._pool.ask_all(asked), strict=True))
        return [found[row] for row in range(len(requests))]

    def _score_one(self, request: ScoreRequest, k: int, server: Server) -> Scored:
        self._pool.wake(server)
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
        """How many more tokens than k to ask for, since padding may be listed among the likeliest."""
        return 0 if not k or self._num_tokens is None else 4

    def _best(self, position: dict[str, Any], k: int, server: Server) -> list[tuple[int, float]]:
        kept = best_tokens(position, k, self._num_tokens, server.url)
        if len(kept) < k:
            raise EngineError(
                f"teacher server {server.url} gives {len(kept)} tokens a position, {k} are needed; "
                f"start it with --max-logprobs {k + self._num_padding(k) + 1}"
            )
        return kept


def _key(request: ScoreRequest, k: int) -> Key:
    return k, tuple(request.prompt_token_ids), tuple(request.token_ids)
