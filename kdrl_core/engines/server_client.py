"""JSON over HTTP to the servers of a model. Neither its answers nor its errors hold the API key."""

import json
import resource
import time
from typing import Any

import httpx

from kdrl_core.engines.served_answers import TransientError
from kdrl_core.errors import EngineError

_TRANSIENT_STATUS = {408, 409, 425, 429, *range(500, 600)}
_MAX_BODY_SHOWN = 200
_MIN_KEY_CHARS = 8
"""Shorter keys are not cut out of answers: one such as `EMPTY`, which stands for none, may be a word of theirs."""
_KEEP_ALIVE_S = 2.0
"""Servers hang up on idle connections, vLLM after 5 s; a request on such a connection fails."""


class ServerClient:
    """A pool of connections.

    Args:
        api_key: sent with every request; None: no key.
        connections: most that are open at once.
        timeout_s: of one request.
        field: of the recipe that describes the servers, for messages.
        key_field: of the recipe, or the option, that names the key, for messages.
    """

    def __init__(self, *, api_key: str | None, connections: int, timeout_s: float, field: str, key_field: str) -> None:
        self._key = api_key or ""
        self._timeout_s = timeout_s
        self._field, self._key_field = field, key_field
        _allow_connections(connections)
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
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
        """The JSON of an answer.

        Args:
            where: the server as messages name it.
            timeout_s: less than the client's own.

        Raises:
            TransientError: the server may answer otherwise the next time.
            EngineError: it will not.
        """
        limit_s = min(timeout_s or self._timeout_s, self._timeout_s)
        try:
            response, content = self._exchange(method, url, body, limit_s)
        except httpx.TimeoutException:
            raise TransientError(f"{where} did not answer within {limit_s:g} s") from None
        except httpx.TransportError as error:
            raise TransientError(f"{where} cannot be reached ({type(error).__name__})") from None
        except httpx.DecodingError:
            raise TransientError(f"{where} sent an answer that cannot be decoded") from None
        status = response.status_code
        said = self.without_key(" ".join(content.decode(errors="replace").split()))[:_MAX_BODY_SHOWN]
        if status in _TRANSIENT_STATUS:
            raise TransientError(f"{where} answered {status} ({said})", retry_after_s=_retry_after_s(response))
        if status in (401, 403):
            raise EngineError(f"{where} refuses the key ({status}: {said}); correct what {self._key_field} names")
        if not response.is_success:
            raise EngineError(f"{where} answered {status}: {said}; look at its log and at {self._field}")
        try:
            answer = json.loads(content) if content else None
            return self._scrubbed(answer) if self._holds_key(content) else answer
        except (ValueError, RecursionError):
            raise TransientError(f"{where} sent an answer that is not JSON ({said[:60]!r})") from None

    def without_key(self, text: str) -> str:
        """A text with the key cut out."""
        return text.replace(self._key, "[the key]") if self._key else text

    def _exchange(
        self, method: str, url: str, body: dict[str, Any] | None, limit_s: float
    ) -> tuple[httpx.Response, bytes]:
        """An answer and its body. httpx limits the wait for each piece; the deadline limits the whole body."""
        deadline = time.monotonic() + limit_s
        content = bytearray()
        with self._client.stream(method, url, json=body, timeout=limit_s) as response:
            for piece in response.iter_bytes():
                content += piece
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the body takes too long")
        return response, bytes(content)

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
