"""HTTP to the servers of a model, and reading the answers of vLLM's `/v1/completions`.

Neither answers nor errors hold the API key. An answer that makes no sense is a TransientError: a server that is
restarting, or a proxy, may answer anything.
"""

import json
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import orjson
from numpy.typing import NDArray

from kdrl_core.config import ServersConfig
from kdrl_core.config.secrets import resolve_secret
from kdrl_core.engines.answer_body import ACCEPTED, BodyTooLargeError, most_bytes, read_body
from kdrl_core.errors import EngineError

if TYPE_CHECKING:
    from kdrl_core.engines.server_processes import ReplicaGroup

ROUTES = "/kdrl"
"""Where a server of kdrl has the addresses of `server_routes`."""
_TRANSIENT_STATUS = {408, 409, 425, 429, *range(500, 600)}
_MAX_BODY_SHOWN = 200
_MAX_ERROR_BYTES = 2**16
_MIN_KEY_CHARS = 8
"""Shorter keys are not cut out of answers: a placeholder such as `EMPTY` may be an ordinary word there."""
_KEEP_ALIVE_S = 2.0
"""Servers hang up on idle connections, vLLM after 5 s; a request on such a connection fails."""


class TransientError(Exception):
    """A fault that may pass: no answer, an answer of a server in trouble, or one that makes no sense."""

    def __init__(self, message: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """How to reach the servers of a model: the fields of `ServersConfig`, and the key itself."""

    urls: Sequence[str]
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 600.0
    retry_for_s: float = 600.0
    """From a request's first fault to the start of its last try. Even a request that takes longer is tried twice."""
    first_pause_s: float = 1.0
    """Doubled with each try, up to 30 s, with jitter."""
    concurrency: int | None = None
    """Requests in flight, over all servers; None: 32 for each."""
    sleep: bool = False
    own: "ReplicaGroup | None" = None
    """The servers, if this program has started them; then it also ends them."""


def served_model(config: ServersConfig) -> ServedModel:
    """The servers of a recipe, with the key that it names. Raises SecretError if there is no such key."""
    key = None if config.api_key is None else resolve_secret(config.api_key)
    return ServedModel(**{**config.model_dump(include=set(ServersConfig.model_fields)), "api_key": key})


class ServerClient:
    """A pool of connections; without `api_key` no key is sent.

    Args:
        timeout_s: of one request.
        field: the recipe's field that describes the servers, for messages.
        key_field: the recipe's field, or the option, that names the key, for messages.
    """

    def __init__(self, *, api_key: str | None, connections: int, timeout_s: float, field: str, key_field: str) -> None:
        self._key = api_key or ""
        self._timeout_s = timeout_s
        self._field, self._key_field = field, key_field
        _allow_connections(connections)
        self._client = httpx.Client(
            headers={"Accept-Encoding": ACCEPTED, **({"Authorization": f"Bearer {api_key}"} if api_key else {})},
            follow_redirects=False,  # the key is for these servers alone
            trust_env=False,
            limits=httpx.Limits(max_connections=connections, keepalive_expiry=_KEEP_ALIVE_S),
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def answer(
        self, where: str, method: str, url: str, body: dict[str, Any] | None, timeout_s: float | None = None
    ) -> Any:
        """The JSON that a server answers; messages call it `where`. `timeout_s` may be below the client's own.

        Raises:
            TransientError: another try may succeed.
            EngineError: another try cannot succeed.
        """
        content = self._content(where, method, url, {"json": body}, most_bytes(body), timeout_s)
        try:
            answer = _parsed(content) if content else None
            return self._scrubbed(answer) if self._holds_key(content) else answer
        except (ValueError, RecursionError):
            raise TransientError(f"{where} sent an answer that is not JSON ({self._shown(content)[:60]!r})") from None

    def binary(self, where: str, url: str, content: bytes, *, most: int) -> tuple[bytes, str]:
        """The body, of at most `most` bytes, that answers a POST of bytes, and the header `finish-reason`. Raises as
        `answer`."""
        sent = {"content": content, "headers": {"Accept-Encoding": "identity"}}
        headers = httpx.Headers()
        answer = self._content(where, "POST", url, sent, max(most, _MAX_ERROR_BYTES), None, headers)
        return answer, headers.get("finish-reason", "")

    def _content(
        self,
        where: str,
        method: str,
        url: str,
        sent: dict[str, Any],
        most: int,
        timeout_s: float | None,
        headers: httpx.Headers | None = None,
    ) -> bytes:
        """The body of an answer that is a success; its headers are added to `headers`."""
        limit_s = min(timeout_s or self._timeout_s, self._timeout_s)
        try:
            response, content = self._exchange(method, url, sent, most, limit_s)
        except httpx.TimeoutException:
            raise TransientError(f"{where} did not answer within {limit_s:g} s") from None
        except httpx.TransportError as error:
            raise TransientError(f"{where} cannot be reached ({type(error).__name__})") from None
        except BodyTooLargeError as error:
            raise TransientError(f"{where} sent {error}, more than was asked for") from None
        except httpx.DecodingError:
            raise TransientError(f"{where} sent an answer that cannot be decoded") from None
        if headers is not None:
            headers.update(response.headers)
        status = response.status_code
        if response.is_success:
            return content
        said = self._shown(content)
        if status in _TRANSIENT_STATUS:
            raise TransientError(f"{where} answered {status} ({said})", retry_after_s=_retry_after_s(response))
        if status in (401, 403):
            raise EngineError(f"{where} refuses the key ({status}: {said}); correct what {self._key_field} names")
        raise EngineError(f"{where} answered {status}: {said}; look at its log and at {self._field}")

    def _shown(self, content: bytes) -> str:
        """The beginning of a body, for a message."""
        return self.without_key(" ".join(content.decode(errors="replace").split()))[:_MAX_BODY_SHOWN]

    def without_key(self, text: str) -> str:
        """A text in which the key is not shown."""
        return text.replace(self._key, "[the key]") if self._key else text

    def _exchange(
        self, method: str, url: str, sent: dict[str, Any], most: int, limit_s: float
    ) -> tuple[httpx.Response, bytes]:
        """An answer and its body. httpx limits the wait for each piece; the deadline limits the whole body."""
        deadline = time.monotonic() + limit_s
        with self._client.stream(method, url, timeout=limit_s, **sent) as response:
            return response, read_body(response, most=most, deadline=deadline)

    def _holds_key(self, content: bytes) -> bool:
        """Whether a server has sent the key back, in any way that JSON may write it."""
        text = json.dumps(self._key)[1:-1]
        forms = (self._key, text, text.replace("/", "\\/"))
        return len(self._key) >= _MIN_KEY_CHARS and any(form.encode() in content for form in forms)

    def _scrubbed(self, answer: Any) -> Any:
        """An answer without the key in its texts."""
        if isinstance(answer, str):
            return self.without_key(answer)
        if isinstance(answer, list):
            return [self._scrubbed(each) for each in answer]
        if isinstance(answer, dict):
            return {self.without_key(name): self._scrubbed(each) for name, each in answer.items()}
        return answer


def _parsed(content: bytes) -> Any:
    """The content of JSON; also of JSON with NaN, which orjson refuses."""
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        return json.loads(content)


def _allow_connections(count: int) -> None:
    """Raise this process's limit of open files, often 1,024, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def _retry_after_s(response: httpx.Response) -> float:
    try:
        return max(0.0, float(response.headers.get("Retry-After", 0)))
    except ValueError:  # a date
        return 0.0


def models_of(answer: Any, where: str) -> dict[str, dict[str, Any]]:
    """What `/v1/models` says of each model, by name."""
    try:
        return {str(model["id"]): dict(model) for model in answer["data"]}
    except (KeyError, TypeError, ValueError):
        raise TransientError(f"{where} does not say which models it serves") from None


def positions_of(answer: Any, length: int, url: str) -> list[dict[str, Any]]:
    """`prompt_logprobs` of the only choice: token id → logprob for each position; None for the first position."""
    try:
        positions = answer["choices"][0]["prompt_logprobs"]
        if len(positions) != length or not all(isinstance(position, dict) for position in positions[1:]):
            raise TransientError(f"teacher server {url} gave {len(positions)} positions for {length} tokens")
        return list(positions)
    except (KeyError, IndexError, TypeError, AttributeError):
        raise TransientError(f"teacher server {url} sent an answer without prompt_logprobs") from None


def logprobs_of(positions: Sequence[dict[str, Any]], token_ids: Sequence[int], url: str) -> NDArray[np.float32]:
    """The finite logprobs of the tokens at their positions, [n]."""
    try:
        values = np.array([at[str(token)]["logprob"] for at, token in zip(positions, token_ids, strict=True)])
    except (KeyError, TypeError):
        values = np.empty(0, object)
    if values.dtype.kind == "f" and np.isfinite(values).all():
        return values.astype(np.float32)
    checked = [logprob_of(at, token, url) for at, token in zip(positions, token_ids, strict=True)]
    return np.array(checked, np.float32)  # integers, or nothing at all


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
