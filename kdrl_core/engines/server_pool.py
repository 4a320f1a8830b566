"""Servers of one model that share its work: the least busy is asked, faults that may pass are tried again.

What does not pass within `retry_for_s`, and what never passes, is an EngineError. The first one ends all other requests
of its call.
"""

import json
import logging
import queue
import resource
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import httpx
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    wait_exponential_jitter,
)

from kdrl_core.config import ServersConfig
from kdrl_core.config.secrets import resolve_secret
from kdrl_core.engines.served_answers import TransientError
from kdrl_core.errors import EngineError

WHOLE_DISTRIBUTION = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Of a vLLM server: sample from all of softmax(logits / T). What is not sent it takes from the model's own
generation_config.json."""
_TRANSIENT_STATUS = {408, 409, 425, 429, *range(500, 600)}
_MAX_BODY_SHOWN = 200
_MIN_KEY_CHARS = 8
"""Of a key that is cut out of answers: one such as `EMPTY`, which stands for none, may be a word of theirs."""
_MAX_RETRY_AFTER_S = 60.0
_MAX_OUT_S = 60.0
_MAX_DOUBLINGS = 16
_CONTROL_S = 600.0
"""Of what is no response: loading weights, falling asleep."""
_LAST_S = 10.0
_KEEP_ALIVE_S = 2.0
"""Servers hang up on idle connections, vLLM after 5 s, and a request that meets that fails."""
_TOLD = {
    "kdrl_load": "load weights",
    "kdrl_state": "say which weights they have",
    "kdrl_sleep": "sleep",
    "kdrl_wake": "wake up",
}
_logger = logging.getLogger("kdrl")
_Result = TypeVar("_Result")


@dataclass(slots=True, eq=False)
class Server:
    """One server and how it does."""

    url: str
    """Up to and with `/v1`."""
    in_flight: int = 0
    asked: int = 0
    """Requests so far; of servers with as much to do the one with the fewest is next, so that a probe meets each."""
    faults: int = 0
    """In a row; of requests that were in flight together, one."""
    out_until: float = 0.0
    is_asleep: bool = False
    wakes: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def is_out(self, now: float) -> bool:
        """Whether others go first: after a fault for a while, then while one request tries whether it is back."""
        return self.out_until > now or (self.faults > 0 and self.in_flight > 0)


Attempt = Callable[[Server], _Result]
"""What is asked of a server; TransientError if it may be otherwise the next time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """How the servers of a model are reached. Durations in seconds."""

    urls: Sequence[str]
    """Up to and with `/v1`."""
    model: str | None = None
    """Name that the servers give it; None: the only one that they serve."""
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = 600.0
    """Of one request."""
    retry_for_s: float = 600.0
    """From a request's first fault to the beginning of its last try; one that took longer than this is tried once more.
    """
    first_pause_s: float = 1.0
    """Doubled with each try, up to 30 s, with jitter."""
    concurrency: int = 32
    """Requests in flight, over all servers."""
    sleep: bool = False
    """They give their memory back while others need their GPUs."""


def served_model(config: ServersConfig) -> ServedModel:
    """What a recipe says of servers, with the key that it names. Raises SecretError without that."""
    key = None if config.api_key is None else resolve_secret(config.api_key)
    return ServedModel(**{**config.model_dump(include=set(ServersConfig.model_fields)), "api_key": key})


class _Workers:
    """Threads that nobody waits for, neither here nor at the end of the program, where those of a ThreadPoolExecutor
    would be: a request in flight ends by itself, in minutes perhaps."""

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._threads = 0
        self._waiting: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._over = threading.Event()

    def submit(self, call: Callable[..., _Result], *arguments: Any) -> "Future[_Result]":
        """Begin as soon as a thread is free."""
        future: Future[_Result] = Future()

        def work() -> None:
            if self._over.is_set():
                future.cancel()
            elif future.set_running_or_notify_cancel():
                try:
                    future.set_result(call(*arguments))
                except BaseException as error:  # it is raised to who asks for the result
                    future.set_exception(error)

        self._waiting.put(work)
        if self._threads < self._count:
            self._threads += 1
            threading.Thread(target=self._run, name=f"{self._name}-{self._threads}", daemon=True).start()
        return future

    def stop(self) -> None:
        """Cancel what has not begun."""
        self._over.set()
        for _ in range(self._threads):
            self._waiting.put(None)

    def _run(self) -> None:
        while (work := self._waiting.get()) is not None:
            work()


class ServerPool:
    """The servers of one model.

    Args:
        served: the servers.
        role: what they are called in messages, `teacher` or `rollout`.
        field: of the recipe, which says all this.
        max_tokens: prompt and response tokens of the longest request to come, compared with the servers' context.
        options: how messages name `model`, `api_key` and `retry_for_s` where they are no fields of the recipe, and the
            `remedy` of what was given up.

    Raises:
        EngineError: no server can be reached within `retry_for_s`, or one serves another model or too short a context,
            or refuses the key.
    """

    def __init__(
        self,
        served: ServedModel,
        *,
        role: str,
        field: str,
        max_tokens: int | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        self.servers = [Server(url.rstrip("/"), is_asleep=served.sleep) for url in served.urls]  # kdrl serve --asleep
        self._served = served
        self._role = role
        self._field = field
        self._options = {
            **{name: f"{field}.{name}" for name in ("model", "api_key", "retry_for_s")},
            "remedy": "Start the server, then resume the run: nothing is lost",
            **(options or {}),
        }
        self._lock = threading.Lock()
        _allow_connections(served.concurrency)
        headers = {"Authorization": f"Bearer {served.api_key}"} if served.api_key else {}
        self._client = httpx.Client(
            headers=headers,
            follow_redirects=False,  # the key is for these servers alone
            trust_env=False,
            limits=httpx.Limits(max_connections=served.concurrency, keepalive_expiry=_KEEP_ALIVE_S),
        )
        self.are_vllm = True
        """Whether all servers that were reached say so."""
        self._over = threading.Event()
        self._ahead = _Workers(served.concurrency, f"kdrl-{role}-ahead")
        self.model = self._check_servers(max_tokens)
        """Name under which they serve it."""

    def close(self) -> None:
        """Let go of the connections, and of what was begun. Servers that share their GPUs are left asleep, if they
        answer now."""
        self._over.set()
        for server in self.servers if self.sleeps else []:
            with suppress(TransientError, EngineError):
                self.ask_workers(server, "kdrl_sleep", timeout_s=_LAST_S)
        self._ahead.stop()
        self._client.close()

    def begin(self, what: str, attempt: Attempt[_Result]) -> "Future[_Result]":
        """Begin with an attempt and return at once; its result, or the EngineError, is in the future."""
        return self._ahead.submit(self._with_retries, what, attempt, self._over)

    def ask_all(self, attempts: Sequence[tuple[str, Attempt[_Result]]]) -> list[_Result]:
        """The results of attempts with their names, in order, `concurrency` at a time, each at the server that is next.

        Raises:
            EngineError: the first that failed; the others are left.
        """
        over = threading.Event()
        workers = _Workers(self._served.concurrency, f"kdrl-{self._role}")
        try:
            pending = [workers.submit(self._with_retries, what, attempt, over) for what, attempt in attempts]
            for future in wait(pending, return_when=FIRST_EXCEPTION).done:
                future.result()  # the first that failed, whichever it is, and not the first in the order of requests
            return [future.result() for future in pending]
        finally:
            over.set()
            workers.stop()

    def each(self, what: str, attempt: Attempt[_Result]) -> dict[str, _Result]:
        """URL → result, of every server that answers now; at least one has to, within `retry_for_s`.

        The others are left out for a while, and the log says so.
        """
        first: list[Server] = []

        def remembered(server: Server) -> _Result:
            result = attempt(server)
            first.append(server)
            return result

        result = self._with_retries(what, remembered, threading.Event())
        results = {first[0].url: result}
        for server in self.servers:
            if server is first[0]:
                continue
            try:
                results[server.url] = attempt(server)
            except TransientError as fault:
                with self._lock:
                    self._leave_out(server)
                _logger.warning("%s; the others are used until it answers", fault)
        return results

    @property
    def sleeps(self) -> bool:
        """Whether the servers are put to sleep while others need their GPUs."""
        return self._served.sleep

    def sleep(self) -> None:
        """Have every server that answers give its memory back, if they are to.

        Raises:
            EngineError: none answers within `retry_for_s`, or one cannot sleep.
        """
        if self.sleeps:  # also those that are known to: an evaluation may have woken them
            self.each("sleep", partial(self.ask_workers, method="kdrl_sleep"))

    def wake(self, server: Server) -> None:
        """Before it is asked for anything. Raises TransientError, EngineError as `answer`."""
        with server.wakes:
            if server.is_asleep:
                self.ask_workers(server, "kdrl_wake")

    def ask_workers(
        self, server: Server, method: str, arguments: Sequence[str] = (), *, timeout_s: float = _CONTROL_S
    ) -> dict[str, str]:
        """What `KdrlWorker.method` answers, the same from every worker of the server: its weights and incarnation.
        The server is then known to be asleep, or awake, as the method leaves it.

        Raises:
            TransientError, EngineError: as `answer`.
        """
        body = {"method": method, "args": list(arguments)}
        try:
            answer = self.answer(server, "POST", "/../collective_rpc", body, timeout_s=timeout_s)
        except EngineError as error:
            raise EngineError(f"{error} (kdrl serve starts servers that can be told to {_TOLD[method]})") from None
        try:
            states = [(str(state["weights"]), str(state["incarnation"])) for state in answer["results"]]
            weights = {weights for weights, _ in states}
            state = {"weights": weights.pop(), "incarnation": " ".join(sorted(each for _, each in states))}
        except (KeyError, TypeError):
            raise TransientError(f"{self.where(server)} does not say which weights it has") from None
        if method != "kdrl_state":  # loading wakes it
            server.is_asleep = method == "kdrl_sleep"
        return state

    def where(self, server: Server) -> str:
        """The server as messages name it."""
        return f"{self._role} server {server.url}"

    def answer(
        self,
        server: Server,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Any:
        """The JSON of an answer; `path` starts below `/v1`, or with `/..` beside it.

        Args:
            timeout_s: less than the servers' own, which is that of a response.

        Raises:
            TransientError, EngineError: the fault, which never holds the key.
        """
        where = self.where(server)
        limit_s = min(timeout_s or self._served.timeout_s, self._served.timeout_s)
        base = server.url.removesuffix("/v1") if path.startswith("/../") else server.url
        try:
            response, content = self._exchange(method, base + path.removeprefix("/.."), body, limit_s)
        except httpx.TimeoutException:
            raise TransientError(f"{where} did not answer within {limit_s:g} s") from None
        except httpx.TransportError as error:
            raise TransientError(f"{where} cannot be reached ({type(error).__name__})") from None
        except httpx.DecodingError:
            raise TransientError(f"{where} sent an answer that cannot be decoded") from None
        status = response.status_code
        said = self._without_key(" ".join(content.decode(errors="replace").split()))[:_MAX_BODY_SHOWN]
        if status in _TRANSIENT_STATUS:
            raise TransientError(f"{where} answered {status} ({said})", retry_after_s=_retry_after_s(response))
        if status in (401, 403):
            raise EngineError(
                f"{where} refuses the key ({status}: {said}); correct what {self._options['api_key']} names"
            )
        if not response.is_success:
            raise EngineError(f"{where} answered {status}: {said}; look at its log and at {self._field}")
        try:
            answer = json.loads(content) if content else None
            return self._scrubbed(answer) if self._holds_key(content) else answer
        except (ValueError, RecursionError):
            raise TransientError(f"{where} sent what is no JSON ({said[:60]!r})") from None

    def _with_retries(self, what: str, attempt: Attempt[_Result], over: threading.Event) -> _Result:
        served = self._served
        started = time.monotonic()
        pauses = wait_exponential_jitter(initial=served.first_pause_s, max=30.0, jitter=served.first_pause_s)

        first: list[float] = []

        def since_first_fault(state: RetryCallState) -> float:
            if not first:
                first.append(time.monotonic())
            return time.monotonic() - first[0]

        def pause(state: RetryCallState) -> float:
            fault = state.outcome.exception() if state.outcome else None
            asked = fault.retry_after_s if isinstance(fault, TransientError) else 0.0
            left = served.retry_for_s - since_first_fault(state)
            return max(0.0, min(max(min(asked, _MAX_RETRY_AFTER_S), pauses(state)), left))

        def tell(state: RetryCallState) -> None:
            fault = state.outcome.exception() if state.outcome else None
            _logger.warning("%s: %s; tried again in %.1f s", what, fault, state.upcoming_sleep)

        retrying = Retrying(
            stop=lambda state: since_first_fault(state) >= served.retry_for_s or over.is_set(),
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
                f"({self._options['retry_for_s']}). {self._options['remedy']}"
            ) from None

    def _at_a_server(self, attempt: Attempt[_Result]) -> _Result:
        with self._lock:
            now = time.monotonic()
            server = min(self.servers, key=lambda s: (s.is_out(now), s.in_flight, s.faults, s.asked))
            server.in_flight += 1
            server.asked += 1
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

    def _leave_out(self, server: Server) -> None:
        now = time.monotonic()
        if now >= server.out_until:  # else it is out already, by a request that was in flight together with this one
            server.faults += 1
            pause = 2.0 ** min(server.faults, _MAX_DOUBLINGS) * self._served.first_pause_s
            server.out_until = now + min(pause, _MAX_OUT_S)

    def _exchange(
        self, method: str, url: str, body: dict[str, Any] | None, limit_s: float
    ) -> tuple[httpx.Response, bytes]:
        """An answer and its body. httpx limits the wait for each piece, the deadline the whole of a body in pieces."""
        deadline = time.monotonic() + limit_s
        content = bytearray()
        with self._client.stream(method, url, json=body, timeout=limit_s) as response:
            for piece in response.iter_bytes():
                content += piece
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the body takes too long")
        return response, bytes(content)

    def _without_key(self, text: str) -> str:
        key = self._served.api_key
        return text.replace(key, "[the key]") if key else text

    def _holds_key(self, content: bytes) -> bool:
        """Whether a server has sent the key back, so that its answer has to be gone through."""
        key = self._served.api_key or ""
        return len(key) >= _MIN_KEY_CHARS and any(form in content for form in _written(key))

    def _scrubbed(self, answer: Any) -> Any:
        """An answer without the key in its texts."""
        if isinstance(answer, str):
            return self._without_key(answer)
        if isinstance(answer, list):
            return [self._scrubbed(each) for each in answer]
        if isinstance(answer, dict):
            return {self._without_key(name): self._scrubbed(each) for name, each in answer.items()}
        return answer

    def _check_servers(self, max_tokens: int | None) -> str:
        """The served model's name, the same at every server that can be reached."""

        def attempt(server: Server) -> str:
            answer = self.answer(server, "GET", "/models", timeout_s=_CONTROL_S)
            where = self.where(server)
            try:
                models = {self._without_key(str(model["id"])): dict(model) for model in answer["data"]}
            except (KeyError, TypeError, ValueError):
                raise TransientError(f"{where} does not say which models it serves") from None
            name = self._served.model or (next(iter(models)) if len(models) == 1 else None)
            if name not in models:
                raise EngineError(
                    f"{where} serves {', '.join(sorted(models))}, not "
                    f"{self._served.model or 'one model alone'}; set {self._options['model']} to one of them"
                )
            self.are_vllm = self.are_vllm and models[name].get("owned_by") == "vllm"
            context = models[name].get("max_model_len")
            if max_tokens is not None and isinstance(context, int) and context < max_tokens + 1:
                raise EngineError(
                    f"{where}: its context of {context} tokens is too short for the prompt and "
                    f"response limits and one token more; start it with --max-model-len {max_tokens + 1}"
                )
            return name

        names = sorted(set(self.each(f"the {self._role}", attempt).values()))
        if len(names) > 1:
            raise EngineError(f"the {self._role} servers serve different models: {', '.join(names)}")
        return names[0]


def _allow_connections(count: int) -> None:
    """Raise this process's limit of open files, often 1,024, as far as the system lets it."""
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


def _written(key: str) -> list[bytes]:
    """How JSON may write a key."""
    text = json.dumps(key)[1:-1]
    return [key.encode(), text.encode(), text.replace("/", "\\/").encode()]
