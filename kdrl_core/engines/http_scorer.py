"""Teacher scoring by servers: the logprobs of given tokens from vLLM's OpenAI-compatible `/v1/completions`.

The prompt of a request is prompt and response together, as token ids; `prompt_logprobs` gives the logprob of each.
They are those of softmax(logits) whatever the sampling temperature, so a server has to serve weights in which the
temperature is baked (`bake_temperature`), and the recipe says which (`teacher.server.temperature`).

Faults that may pass are tried again with growing pauses, at the server with the least to do; see `_is_transient`.
What does not pass within `retry_for_s`, and what never passes, is an EngineError; nothing was published by then.
"""

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_exponential_jitter

from kdrl_core.config.recipe import ServerConfig
from kdrl_core.engines.protocols import TopKScore
from kdrl_core.errors import EngineError
from kdrl_core.secrets import resolve_secret
from kdrl_core.types import ScoreRequest

_TRANSIENT_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}
_MAX_BODY_SHOWN = 200
_MAX_RETRY_AFTER_S = 60.0
_logger = logging.getLogger("kdrl")


class TransientError(Exception):
    """What may be otherwise the next time: no answer, an answer of a server in trouble, or one that makes no sense."""

    def __init__(self, message: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class _Server:
    url: str
    in_flight: int = 0
    faults: int = 0
    """In a row."""
    out_until: float = 0.0


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
    """From a request's first try to its last."""
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
        with ThreadPoolExecutor(self._served.concurrency, thread_name_prefix="kdrl-score") as pool:
            pending = [pool.submit(self._score_one, row, request, k) for row, request in enumerate(requests)]
            try:
                return [future.result() for future in pending]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _score_one(self, row: int, request: ScoreRequest, k: int) -> tuple[NDArray[np.float32], list[Any]]:
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
            answer = self._post(server, "/completions", body)
            positions = _positions(answer, len(ids), server.url)[first:]
            tokens = zip(positions, request.token_ids, strict=True)
            logprobs = np.array([_logprob_of(position, token, server.url) for position, token in tokens], np.float32)
            return logprobs, [self._best(position, k) for position in positions] if k else []

        return self._with_retries(f"response {row}", attempt)

    def _num_padding(self, k: int) -> int:
        """More tokens than k are asked for where some may be padding, which is never likely but may be listed."""
        return 0 if not k or self._num_tokens is None else 4

    def _best(self, position: dict[str, Any], k: int) -> list[tuple[int, float]]:
        size = self._num_tokens
        tokens = [(int(token), float(entry["logprob"])) for token, entry in position.items()]
        kept = sorted((t for t in tokens if size is None or t[0] < size), key=lambda t: (-t[1], t[0]))[:k]
        if len(kept) < k:
            raise EngineError(
                f"the teacher server gives {len(kept)} tokens a position, {k} are needed; "
                f"start it with --max-logprobs {k + self._num_padding(k) + 1}"
            )
        return kept

    def _with_retries(self, what: str, attempt: Any) -> Any:
        served = self._served
        started = time.monotonic()
        pauses = wait_exponential_jitter(initial=served.first_pause_s, max=30.0, jitter=served.first_pause_s)

        def pause(state: RetryCallState) -> float:
            fault = state.outcome.exception() if state.outcome else None
            asked = fault.retry_after_s if isinstance(fault, TransientError) else 0.0
            return max(min(asked, _MAX_RETRY_AFTER_S), pauses(state))

        def tell(state: RetryCallState) -> None:
            fault = state.outcome.exception() if state.outcome else None
            _logger.warning("%s: %s; tried again in %.1f s", what, fault, state.upcoming_sleep)

        retrying = Retrying(
            stop=stop_after_delay(served.retry_for_s),
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
            server = min(self._servers, key=lambda s: (s.out_until > now, s.in_flight, s.faults))
            server.in_flight += 1
        try:
            result = attempt(server)
        except TransientError:
            with self._lock:
                server.faults += 1
                server.out_until = time.monotonic() + min(2.0**server.faults * self._served.first_pause_s, 60.0)
            raise
        else:
            server.faults, server.out_until = 0, 0.0
            return result
        finally:
            with self._lock:
                server.in_flight -= 1

    def _post(self, server: _Server, path: str, body: dict[str, Any]) -> Any:
        return self._answer(server, lambda: self._client.post(server.url + path, json=body))

    def _answer(self, server: _Server, ask: Any) -> Any:
        """The JSON of an answer. Raises TransientError or EngineError, neither of which ever holds the key."""
        where = f"teacher server {server.url}"
        try:
            response: httpx.Response = ask()
        except httpx.TimeoutException:
            raise TransientError(f"{where} did not answer within {self._served.timeout_s:g} s") from None
        except httpx.TransportError as error:
            raise TransientError(f"{where} cannot be reached ({type(error).__name__})") from None
        except httpx.DecodingError:
            raise TransientError(f"{where} sent an answer that cannot be decoded") from None
        status = response.status_code
        said = self._without_key(" ".join(response.text.split()))[:_MAX_BODY_SHOWN]
        if status in _TRANSIENT_STATUS:
            raise TransientError(f"{where} answered {status} ({said})", retry_after_s=_retry_after_s(response))
        if status in (401, 403):
            raise EngineError(f"{where} refuses the key ({status}: {said}); correct what teacher.server.api_key names")
        if not response.is_success:
            raise EngineError(f"{where} answered {status}: {said}; look at its log and at teacher.server")
        try:
            return response.json()
        except ValueError:
            raise TransientError(f"{where} sent what is no JSON ({said[:60]!r})") from None

    def _without_key(self, text: str) -> str:
        key = self._served.api_key
        return text.replace(key, "[the key]") if key else text

    def _check_servers(self, max_tokens: int | None) -> str:
        """The served model's name, the same at every server that can be reached; at least one has to be."""
        names: list[str] = []

        def attempt(server: _Server) -> str:
            answer = self._answer(server, lambda: self._client.get(server.url + "/models"))
            try:
                models = {str(model["id"]): model for model in answer["data"]}
            except (KeyError, TypeError):
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

        names.append(self._with_retries("the teacher", attempt))
        for server in self._servers:  # those that are down now are tried again when they are needed
            try:
                names.append(attempt(server))
            except TransientError as fault:
                server.faults, server.out_until = 1, time.monotonic() + self._served.first_pause_s
                _logger.warning("%s; the others are used until it answers", fault)
        if len(set(names)) > 1:
            raise EngineError(f"the teacher servers serve different models: {', '.join(sorted(set(names)))}")
        return names[0]


def _positions(answer: Any, length: int, url: str) -> list[dict[str, Any]]:
    """`prompt_logprobs` of the only choice: token id → logprob for each position, None for the first."""
    try:
        positions = answer["choices"][0]["prompt_logprobs"]
        if len(positions) != length or not all(isinstance(position, dict) for position in positions[1:]):
            raise TransientError(f"teacher server {url} gave {len(positions)} positions for {length} tokens")
        return list(positions)
    except (KeyError, IndexError, TypeError, AttributeError):
        raise TransientError(f"teacher server {url} sent an answer without prompt_logprobs") from None


def _logprob_of(position: dict[str, Any], token: int, url: str) -> float:
    try:
        value = position[str(token)]["logprob"]
    except (KeyError, TypeError):
        raise TransientError(f"teacher server {url} gave no logprob for token {token}") from None
    if not isinstance(value, int | float) or not np.isfinite(value):
        raise TransientError(f"teacher server {url} gave logprob {value} to token {token}")
    return float(value)


def _retry_after_s(response: httpx.Response) -> float:
    try:
        return max(0.0, float(response.headers.get("Retry-After", 0)))
    except ValueError:  # a date
        return 0.0
