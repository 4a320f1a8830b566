"""Teacher scoring by servers: the logprobs of given tokens from vLLM's OpenAI-compatible `/v1/completions`.

The prompt of a request is prompt and response together, as token ids; `prompt_logprobs` gives the logprob of each.
They are those of softmax(logits) whatever the sampling temperature, so a server has to serve weights in which the
temperature is baked (`bake_temperature`), and the recipe says which (`teacher.server.temperature`).

Faults that may pass are tried again with growing pauses, at the server with the least to do; see `served_answers`.
What does not pass within `retry_for_s`, and what never passes, is an EngineError; nothing was published by then.
The first one ends all other requests of its call.
"""

import json
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_delay,
    stop_any,
    stop_when_event_set,
    wait_exponential_jitter,
)

from kdrl_core.config.recipe import ServerConfig
from kdrl_core.engines.protocols import TopKScore
from kdrl_core.engines.served_answers import TransientError, best_tokens, logprob_of, positions_of
from kdrl_core.errors import EngineError
from kdrl_core.secrets import resolve_secret
from kdrl_core.types import ScoreRequest

_TRANSIENT_STATUS = {408, 409, 425, 429, *range(500, 600)}
_MAX_BODY_SHOWN = 200
_MAX_RETRY_AFTER_S = 60.0
_MAX_OUT_S = 60.0
_MAX_DOUBLINGS = 16
_logger = logging.getLogger("kdrl")


@dataclass(slots=True)
class _Server:
    url: str
    in_flight: int = 0
    faults: int = 0
    """In a row; of requests that were in flight together, one."""
    out_until: float = 0.0

    def is_out(self, now: float) -> bool:
        """Whether others go first: after a fault for a while, then while one request tries whether it is back."""
        return self.out_until > now or (self.faults > 0 and self.in_flight > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """How a served teacher is reached. Durations in seconds."""

    urls: Sequence[str]
    """Up to and with `/v1`."""
    model: str | None = None
    """Name that the servers give it; None: the only one that they serve."""
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 600.0
    """Of one request."""
    retry_for_s: float = 600.0
    """From a request's first try to the beginning of its last."""
    first_pause_s: float = 1.0
    """Doubled with each try, up to 30 s, with jitter."""
    concurrency: int = 32
    """Requests in flight, over all servers."""


def served_model(config: ServerConfig) -> ServedModel:
    """What a recipe says of its teacher's servers, with the key that it names. Raises SecretError without that."""
    key = None if config.api_key is None else resolve_secret(config.api_key)
    return ServedModel(**{**config.model_dump(exclude={"temperature"}), "api_key": key})


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
        self._served = served
        self._num_tokens = num_tokens
        self._lock = threading.Lock()
        self._servers = [_Server(url.rstrip("/")) for url in served.urls]
        headers = {"Authorization": f"Bearer {served.api_key}"} if served.api_key else {}
        self._client = httpx.Client(
            headers=headers,
            timeout=served.timeout_s,
            follow_redirects=False,  # the key is for these servers alone
            trust_env=False,
            limits=httpx.Limits(max_connections=served.concurrency),
        )
        self._model = self._check_servers(max_tokens)

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
        self._client.close()

    def _score_all(self, requests: Sequence[ScoreRequest], k: int) -> list[tuple[NDArray[np.float32], list[Any]]]:
        over = threading.Event()
        pool = ThreadPoolExecutor(self._served.concurrency, thread_name_prefix="kdrl-score")
        try:
            pending = [pool.submit(self._score_one, row, request, k, over) for row, request in enumerate(requests)]
            for future in wait(pending, return_when=FIRST_EXCEPTION).done:
                future.result()  # the first that failed, whichever it is, and not the first in the order of requests
            return [future.result() for future in pending]
        finally:
            over.set()
            pool.shutdown(wait=False, cancel_futures=True)  # a request in flight ends by itself, nobody waits for it

    def _score_one(
        self, row: int, request: ScoreRequest, k: int, over: threading.Event
    ) -> tuple[NDArray[np.float32], list[Any]]:
        ids = [*request.prompt_token_ids, *request.token_ids]
        first = len(request.prompt_token_ids)
        body = {
            "model": self._model,
            "prompt": ids,
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": k + self._num_padding(k),
        }

        def attempt(server: _Server) -> tuple[NDArray[np.float32], list[Any]]:
            answer = self._answer(server, "POST", "/completions", body)
            positions = positions_of(answer, len(ids), server.url)[first:]
            tokens = zip(positions, request.token_ids, strict=True)
            logprobs = np.array([logprob_of(position, token, server.url) for position, token in tokens], np.float32)
            return logprobs, [self._best(position, k, server) for position in positions] if k else []

        return self._with_retries(f"response {row}", attempt, over)

    def _num_padding(self, k: int) -> int:
        """More tokens than k are asked for where some may be padding, which is never likely but may be listed."""
        return 0 if not k or self._num_tokens is None else 4

    def _best(self, position: dict[str, Any], k: int, server: _Server) -> list[tuple[int, float]]:
        kept = best_tokens(position, k, self._num_tokens, server.url)
        if len(kept) < k:
            raise EngineError(
                f"teacher server {server.url} gives {len(kept)} tokens a position, {k} are needed; "
                f"start it with --max-logprobs {k + self._num_padding(k) + 1}"
            )
        return kept

    def _with_retries(self, what: str, attempt: Any, over: threading.Event) -> Any:
        served = self._served
        started = time.monotonic()
        pauses = wait_exponential_jitter(initial=served.first_pause_s, max=30.0, jitter=served.first_pause_s)

        def pause(state: RetryCallState) -> float:
            fault = state.outcome.exception() if state.outcome else None
            asked = fault.retry_after_s if isinstance(fault, TransientError) else 0.0
            left = served.retry_for_s - (state.seconds_since_start or 0.0)
            return max(0.0, min(max(min(asked, _MAX_RETRY_AFTER_S), pauses(state)), left))

        def tell(state: RetryCallState) -> None:
            fault = state.outcome.exception() if state.outcome else None
            _logger.warning("%s: %s; tried again in %.1f s", what, fault, state.upcoming_sleep)

        retrying = Retrying(
            stop=stop_any(stop_after_delay(served.retry_for_s), stop_when_event_set(over)),
            sleep=sleep_using_event(over),
            wait=pause,
            retry=retry_if_exception_type(TransientError),
            before_sleep=tell,
            reraise=True,
        )
        try:
            return retrying(self._at_a_server, attempt)
        except TransientError as fault:
            tries = retrying.statistics.get("attempt_number", 1)
            raise EngineError(
                f"{what}: {fault}; given up after {tries} tries in {time.monotonic() - started:.0f} s "
                f"(teacher.server.retry_for_s). Start the server, then resume the run: nothing is lost"
            ) from None

    def _at_a_server(self, attempt: Any) -> Any:
        with self._lock:
            now = time.monotonic()
            server = min(self._servers, key=lambda s: (s.is_out(now), s.in_flight, s.faults))
            server.in_flight += 1
        try:
            result = attempt(server)
        except TransientError:
            with self._lock:
                self._leave_out(server)
            raise
        else:
            with self._lock:
                server.faults, server.out_until = 0, 0.0
            return result
        finally:
            with self._lock:
                server.in_flight -= 1

    def _leave_out(self, server: _Server) -> None:
        now = time.monotonic()
        if now >= server.out_until:  # else it is out already, by a request that was in flight together with this one
            server.faults += 1
            pause = 2.0 ** min(server.faults, _MAX_DOUBLINGS) * self._served.first_pause_s
            server.out_until = now + min(pause, _MAX_OUT_S)

    def _answer(self, server: _Server, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON of an answer. Raises TransientError or EngineError, neither of which ever holds the key."""
        where = f"teacher server {server.url}"
        try:
            response, content = self._exchange(method, server.url + path, body)
        except httpx.TimeoutException:
            raise TransientError(f"{where} did not answer within {self._served.timeout_s:g} s") from None
        except httpx.TransportError as error:
            raise TransientError(f"{where} cannot be reached ({type(error).__name__})") from None
        except httpx.DecodingError:
            raise TransientError(f"{where} sent an answer that cannot be decoded") from None
        status = response.status_code
        said = self._without_key(" ".join(content.decode(errors="replace").split()))[:_MAX_BODY_SHOWN]
        if status in _TRANSIENT_STATUS:
            raise TransientError(f"{where} answered {status} ({said})", retry_after_s=_retry_after_s(response))
        if status in (401, 403):
            raise EngineError(f"{where} refuses the key ({status}: {said}); correct what teacher.server.api_key names")
        if not response.is_success:
            raise EngineError(f"{where} answered {status}: {said}; look at its log and at teacher.server")
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise TransientError(f"{where} sent what is no JSON ({said[:60]!r})") from None

    def _exchange(self, method: str, url: str, body: dict[str, Any] | None) -> tuple[httpx.Response, bytes]:
        """An answer and its body. httpx limits the wait for each piece, `timeout_s` the whole of a body in pieces."""
        deadline = time.monotonic() + self._served.timeout_s
        content = bytearray()
        with self._client.stream(method, url, json=body) as response:
            for piece in response.iter_bytes():
                content += piece
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the body takes too long")
        return response, bytes(content)

    def _without_key(self, text: str) -> str:
        key = self._served.api_key
        return text.replace(key, "[the key]") if key else text

    def _check_servers(self, max_tokens: int | None) -> str:
        """The served model's name, the same at every server that can be reached; at least one has to be."""
        names: list[str] = []

        def attempt(server: _Server) -> str:
            answer = self._answer(server, "GET", "/models")
            try:
                models = {self._without_key(str(model["id"])): dict(model) for model in answer["data"]}
            except (KeyError, TypeError, ValueError):
                raise TransientError(f"teacher server {server.url} does not say which models it serves") from None
            name = self._served.model or (next(iter(models)) if len(models) == 1 else None)
            if name not in models:
                raise EngineError(
                    f"teacher server {server.url} serves {', '.join(sorted(models))}, not "
                    f"{self._served.model or 'one model alone'}; set teacher.server.model to one of them"
                )
            context = models[name].get("max_model_len")
            if max_tokens is not None and isinstance(context, int) and context < max_tokens + 1:
                raise EngineError(
                    f"teacher server {server.url}: its context of {context} tokens is too short for the prompt and "
                    f"response limits and one token more; start it with --max-model-len {max_tokens + 1}"
                )
            return name

        names.append(self._with_retries("the teacher", attempt, threading.Event()))
        for server in self._servers:  # those that are down now are tried again when they are needed
            try:
                names.append(attempt(server))
            except TransientError as fault:
                self._leave_out(server)
                _logger.warning("%s; the others are used until it answers", fault)
        if len(set(names)) > 1:
            raise EngineError(f"the teacher servers serve different models: {', '.join(sorted(set(names)))}")
        return names[0]


def _retry_after_s(response: httpx.Response) -> float:
    try:
        return max(0.0, float(response.headers.get("Retry-After", 0)))
    except ValueError:  # a date
        return 0.0
