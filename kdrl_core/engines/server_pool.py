"""Servers of one model that share its work: each request goes to the least busy one and is tried again after a fault.

A fault that cannot pass, or has not passed within `retry_for_s`, raises EngineError. The first EngineError ends all
other requests of the same call.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from kdrl_core.config import ServersConfig
from kdrl_core.config.secrets import resolve_secret
from kdrl_core.engines.retrying import DaemonThreads, retry_transient
from kdrl_core.engines.server_client import ServerClient, TransientError
from kdrl_core.errors import EngineError

WHOLE_DISTRIBUTION = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Sampling parameters of vLLM: sample from all of softmax(logits / T). If a parameter is not sent, a vLLM server takes
it from the model's generation_config.json."""
_MAX_OUT_S = 60.0
_MAX_DOUBLINGS = 16
_CONTROL_S = 600.0
"""Limit of a request that generates nothing: loading weights, falling asleep."""
_LAST_S = 10.0
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
    """One server and its state."""

    url: str
    """Up to and with `/v1`."""
    in_flight: int = 0
    asked: int = 0
    """Requests so far. Among equally busy servers the one with the fewest goes first, so that a probe reaches each."""
    faults: int = 0
    """Faults in a row. Faults of requests that were in flight together count once."""
    out_until: float = 0.0
    is_asleep: bool = False
    wakes: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def is_out(self, now: float) -> bool:
        """Whether other servers go first: for a while after a fault, then while one request tests if it is back."""
        return self.out_until > now or (self.faults > 0 and self.in_flight > 0)


Attempt = Callable[[Server], _Result]
"""A request to a server. Raises TransientError for a fault that may pass."""


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
    concurrency: int = 32
    sleep: bool = False


def served_model(config: ServersConfig) -> ServedModel:
    """The servers of a recipe, with the key that it names. Raises SecretError if there is no such key."""
    key = None if config.api_key is None else resolve_secret(config.api_key)
    return ServedModel(**{**config.model_dump(include=set(ServersConfig.model_fields)), "api_key": key})


class ServerPool:
    """The servers of one model.

    Args:
        served: the servers.
        role: the name of the servers in messages, `teacher` or `rollout`.
        field: the recipe's field that describes the servers.
        max_tokens: prompt and response tokens of the longest request to come, checked against the servers' context.
        options: how messages name `model`, `api_key` and `retry_for_s` if these are not fields of the recipe, and the
            `remedy` when a request is given up.

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
        self._options = {
            **{name: f"{field}.{name}" for name in ("model", "api_key", "retry_for_s")},
            "remedy": "Start the server, then resume the run: nothing is lost",
            **(options or {}),
        }
        self._lock = threading.Lock()
        self._client = ServerClient(
            api_key=served.api_key,
            connections=served.concurrency,
            timeout_s=served.timeout_s,
            field=field,
            key_field=self._options["api_key"],
        )
        self.are_vllm = True
        """Whether all servers that were reached call themselves vLLM."""
        self.says: dict[str, Any] = {}
        """What the first server, if it can be reached, says of the model: its name, and from where it was loaded."""
        self._over = threading.Event()
        self._ahead = DaemonThreads(served.concurrency, f"kdrl-{role}-ahead")
        self.model = self._check_servers(max_tokens)
        """Name under which the servers serve the model."""

    def close(self) -> None:
        """Close the connections and drop requests in flight. Servers that share their GPUs are put to sleep, if they
        answer now."""
        self._over.set()
        for server in self.servers if self.sleeps else []:
            with suppress(TransientError, EngineError):
                self.ask_workers(server, "kdrl_sleep", timeout_s=_LAST_S)
        self._ahead.stop()
        self._client.close()

    def begin(self, what: str, attempt: Attempt[_Result]) -> "Future[_Result]":
        """Begin an attempt and return at once. The future gives its result, or raises EngineError."""
        return self._ahead.submit(self._asked, what, attempt, self._over)

    def ask_all(self, attempts: Sequence[tuple[str, Attempt[_Result]]]) -> list[_Result]:
        """The results of named attempts, in order, at most `concurrency` at a time, each at the least busy server.

        Raises the EngineError of the first attempt that failed; the others are dropped.
        """
        over = threading.Event()
        workers = DaemonThreads(self._served.concurrency, f"kdrl-{self._role}")
        try:
            pending = [workers.submit(self._asked, what, attempt, over) for what, attempt in attempts]
            for future in wait(pending, return_when=FIRST_EXCEPTION).done:
                future.result()  # raises the error that came first in time
            return [future.result() for future in pending]
        finally:
            over.set()
            workers.stop()

    def each(self, what: str, attempt: Attempt[_Result]) -> dict[str, _Result]:
        """URL → result of every server that answers now. At least one must answer within `retry_for_s`.

        Servers that do not answer are not used for a while, and the log says so.
        """
        first: list[Server] = []

        def remembered(server: Server) -> _Result:
            result = attempt(server)
            first.append(server)
            return result

        result = self._asked(what, remembered, threading.Event())
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
        """Have every server that answers free its memory, if the recipe says so."""
        if self.sleeps:  # also those known to be asleep: an evaluation may have woken them
            self.each("sleep", partial(self.ask_workers, method="kdrl_sleep"))

    def wake(self, server: Server) -> None:
        """Wake a server before a request. Raises TransientError, EngineError as `answer`."""
        with server.wakes:
            if server.is_asleep:
                self.ask_workers(server, "kdrl_wake")

    def ask_workers(
        self, server: Server, method: str, arguments: Sequence[str | int] = (), *, timeout_s: float = _CONTROL_S
    ) -> dict[str, str]:
        """Call a method of `KdrlWorker` in every worker of the server. Returns their weights, incarnations and digest.

        Afterwards the server is known to be asleep or awake. Raises as `answer`.
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
            state["digest"] = " ".join(sorted({str(each.get("digest", "")) for each in answer["results"]}))
        except (KeyError, TypeError, AttributeError):
            raise TransientError(f"{self.where(server)} does not say which weights it has") from None
        if method != "kdrl_state":  # loading wakes it
            server.is_asleep = method == "kdrl_sleep"
        return state

    def where(self, server: Server) -> str:
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
        """The JSON of an answer. `path` is below `/v1`, or with `/..` beside it. Raises as `ServerClient.answer`."""
        base = server.url.removesuffix("/v1") if path.startswith("/../") else server.url
        return self._client.answer(self.where(server), method, base + path.removeprefix("/.."), body, timeout_s)

    def _asked(self, what: str, attempt: Attempt[_Result], over: threading.Event) -> _Result:
        """The result of an attempt at the least busy server, retried as `retry_transient` does."""
        return retry_transient(
            what,
            partial(self._at_a_server, attempt),
            retry_for_s=self._served.retry_for_s,
            first_pause_s=self._served.first_pause_s,
            over=over,
            advice=f"({self._options['retry_for_s']}). {self._options['remedy']}",
        )

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
        if now >= server.out_until:  # else another request in flight has left it out already
            server.faults += 1
            pause = 2.0 ** min(server.faults, _MAX_DOUBLINGS) * self._served.first_pause_s
            server.out_until = now + min(pause, _MAX_OUT_S)

    def _check_servers(self, max_tokens: int | None) -> str:
        """The name of the served model, which must be the same at every server that can be reached."""

        def attempt(server: Server) -> str:
            answer = self.answer(server, "GET", "/models", timeout_s=_CONTROL_S)
            where = self.where(server)
            try:
                models = {self._client.without_key(str(model["id"])): dict(model) for model in answer["data"]}
            except (KeyError, TypeError, ValueError):
                raise TransientError(f"{where} does not say which models it serves") from None
            name = self._served.model or (next(iter(models)) if len(models) == 1 else None)
            if name not in models:
                raise EngineError(
                    f"{where} serves {', '.join(sorted(models))}, not "
                    f"{self._served.model or 'one model alone'}; set {self._options['model']} to one of them"
                )
            root = models[name].get("root")
            if server is self.servers[0] or not self.says:
                self.says = {"model": name, "root": root and self._client.without_key(str(root))}
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
