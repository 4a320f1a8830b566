"""Teacher scoring by servers: the logprobs of given tokens.

Servers of `kdrl serve`, and those that a run starts itself, send them as bytes (`server_routes`). Any other server with
vLLM's OpenAI-compatible `/v1/completions` sends JSON: the prompt of a request is prompt and response together, as token
ids, and `prompt_logprobs` gives the logprob of each. These are logprobs of softmax(logits) at any sampling temperature.
So the temperature must be baked into the served weights (`bake_temperature`), and the recipe names it
(`teacher.server.temperature`). A run tells its own servers the temperature.

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
from kdrl_core.engines.server import Server
from kdrl_core.engines.server_client import ROUTES, ServedModel, TransientError, best_tokens, logprobs_of, positions_of
from kdrl_core.engines.server_pool import ServerPool
from kdrl_core.errors import EngineError
from kdrl_core.types import ScoreRequest
from kdrl_core.verify.workers import Clock

Key = tuple[int, tuple[int, ...], tuple[int, ...]]
Scored = tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]]
"""Logprobs of a response's n tokens [n], then ids and logprobs [n, k] of the likeliest tokens."""
_NOTHING = np.empty((0, 0), np.int32), np.empty((0, 0), np.float32)


class HTTPScorer:
    """`TeacherScorer` over one or more servers of the same model.

    Args:
        num_tokens: ids from this number on are padding of the embedding, never among the top-K; None: no padding.
        max_tokens: prompt and response tokens of the longest request to come, checked against the servers' context.
        temperature: that the servers score at; 1: of the weights as they are served.
        num_padding: ids of padding that the servers may list, so that `score_topk` can ask for as many tokens more.

    Raises:
        EngineError: as `ServerPool`.
    """

    def __init__(
        self,
        served: ServedModel,
        *,
        num_tokens: int | None = None,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        num_padding: int = 0,
    ) -> None:
        self._num_tokens, self._num_padding = num_tokens, num_padding
        self._temperature = temperature
        self._is_own = served.own is not None
        self._ahead: dict[Key, Future[Scored]] = {}
        self._ahead_clock = Clock()
        places = None if max_tokens is None else max_tokens + 1  # vLLM must sample one token
        self._pool = ServerPool(served, role="teacher", field="teacher.server", max_tokens=places)

    def score(self, requests: Sequence[ScoreRequest]) -> list[NDArray[np.float32]]:
        return [logprobs for logprobs, _, _ in self._score_all(requests, 0)]

    def score_topk(self, requests: Sequence[ScoreRequest], k: int) -> list[TopKScore]:
        """Raises EngineError also if a server gives fewer than k tokens (`--max-logprobs`)."""
        return [
            TopKScore(logprobs=logprobs, topk_ids=ids, topk_logprobs=values)
            for logprobs, ids, values in self._score_all(requests, k)
        ]

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
        """What servers that others started say of the model (`ServerPool.says`); of a run's own servers: nothing."""
        return {} if self._is_own else self._pool.says

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
        if self._is_own or self._pool.has_routes(server):
            return self._score_binary(request, k, server)
        ids = [*request.prompt_token_ids, *request.token_ids]
        body = {
            "model": self._pool.model,
            "prompt": ids,
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": k + self._spares(k)[0],
        }
        answer = self._pool.answer(server, "POST", "/completions", body)
        positions = positions_of(answer, len(ids), server.url)[len(request.prompt_token_ids) :]
        logprobs = logprobs_of(positions, request.token_ids, server.url)
        if not k:
            return logprobs, *_NOTHING
        best = [best_tokens(position, k, self._num_tokens, server.url) for position in positions]
        if (fewest := min(map(len, best))) < k:
            raise self._lacking(server, fewest, k)
        token_ids = np.array([[token for token, _ in row] for row in best], np.int32)
        return logprobs, token_ids, np.array([[value for _, value in row] for row in best], np.float32)

    def _score_binary(self, request: ScoreRequest, k: int, server: Server) -> Scored:
        """As `_score_one`, from the addresses of `server_routes`."""
        ids = np.array([*request.prompt_token_ids, *request.token_ids], "<i4").tobytes()
        count = len(request.token_ids)
        for spare in self._spares(k):
            width = 1 + k + spare
            query = f"first={len(request.prompt_token_ids)}&k={width - 1}&temperature={self._temperature!r}"
            length = count * width * (8 if k else 4)
            content, _ = self._pool.binary(server, f"{ROUTES}/score?{query}", ids, most=length)
            if len(content) != length:
                raise TransientError(f"teacher server {server.url} gave {len(content)} bytes for {length}")
            logprobs = np.frombuffer(content, "<f4", count * width).reshape(count, width)
            if not np.isfinite(logprobs).all():
                raise TransientError(f"teacher server {server.url} gave logprobs that are not finite")
            if not k:
                return logprobs[:, 0].copy(), *_NOTHING
            token_ids = np.frombuffer(content, "<i4", offset=count * width * 4).reshape(count, width)
            is_known = token_ids[:, 1:] < (self._num_tokens or np.iinfo(np.int32).max)
            if (fewest := int(is_known.sum(axis=1).min())) >= k:
                first = np.argsort(~is_known, axis=1, kind="stable")[:, :k]
                best = [np.take_along_axis(found[:, 1:], first, axis=1) for found in (token_ids, logprobs)]
                return logprobs[:, 0].copy(), best[0].astype(np.int32), best[1].astype(np.float32)
        raise self._lacking(server, fewest, k)

    def _spares(self, k: int) -> tuple[int, ...]:
        """How many more tokens than k to ask for, since padding may be listed among the likeliest: a few, then all."""
        few = 0 if not k or self._num_tokens is None else 4
        return (few, self._num_padding) if k and self._num_padding > few else (few,)

    def _lacking(self, server: Server, found: int, k: int) -> EngineError:
        return EngineError(
            f"teacher server {server.url} gives {found} tokens a position, {k} are needed; "
            f"start it with --max-logprobs {k + self._spares(k)[0] + 1}"
        )


def _key(request: ScoreRequest, k: int) -> Key:
    return k, tuple(request.prompt_token_ids), tuple(request.token_ids)
