"""Servers of one model that share its work: each request goes to the least busy one and is tried again after a fault.

A fault that cannot pass, or has not passed within `retry_for_s`, raises EngineError. The first EngineError ends all
other requests of the same call.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from functools import partial
from typing import Any, TypeVar

from kdrl_core.engines.retrying import DaemonThreads, all_at_once, retry_transient
from kdrl_core.engines.server import Server
from kdrl_core.engines.server_client import ROUTES, ServedModel, ServerClient, TransientError, models_of
from kdrl_core.errors import EngineError

WHOLE_DISTRIBUTION = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
"""Sampling parameters of vLLM: sample from all of softmax(logits / T). If a parameter is not sent, a vLLM server takes
it from the model's generation_config.json."""
START_S = 1_800.0
"""Until servers that this program starts have loaded their model and answer."""
_CONTROL_S = 600.0
"""Limit of a request that generates nothing: loading weights, falling asleep."""
_LAST_S = 10.0
_TOLD = {
    "kdrl_load": "load weights",
    "kdrl_state": "say which weights they have",
    "kdrl_sleep": "sleep",
    "kdrl_wake": "wake up",
}
_REQUESTS_EACH = 32
_logger = logging.getLogger("kdrl")
_Result = TypeVar("_Result")


Attempt = Callable[[Server], _Result]
"""A request to a server. Raises TransientError for a fault that may pass."""


class ServerPool:
    """The servers of one model.

    Args:
        served: the servers.
        role: the name of the servers in messages, `teacher` or `rollout`.
        field: the recipe's field that describes the servers.
        max_tokens: places in the context that the longest request to come takes, compared with the servers' context.
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
        self._served, self._own = served, served.own
        self.sleeps = served.sleep
        """Whether the servers are put to sleep while others need their GPUs."""
        self._concurrency = served.concurrency or _REQUESTS_EACH * len(served.urls)
        self._role = role
        self._options = {
            **{name: f"{field}.{name}" for name in ("model", "api_key", "retry_for_s")},
            "remedy": "Start the server, then resume the run: nothing is lost",
            **(options or {}),
        }
        self._lock = threading.Lock()
        self._client = ServerClient(
            api_key=served.api_key,
            connections=max(self._concurrency, len(served.urls)),
            timeout_s=served.timeout_s,
            field=field,
            key_field=self._options["api_key"],
        )
        self.are_vllm = True
        """Whether all servers that were reached call themselves vLLM."""
        self.says: dict[str, Any] = {}
        """What the first server, if it can be reached, says of the model: its name, and from where it was loaded."""
        self._over = threading.Event()
        self._ahead = DaemonThreads(self._concurrency, f"kdrl-{role}-ahead")
        try:
            self.model = self._check_servers(max_tokens)
            """Name under which the servers serve the model."""
        except BaseException:
            if self._own is not None:
                self._own.close()
            self._ahead.stop()
            self._client.close()
            raise

    def close(self) -> None:
        """Close the connections and drop requests in flight. Servers that this program has started are ended; others
        that share their GPUs are put to sleep, if they answer now."""
        self._over.set()
        if self._own is not None:
            self._own.close()
        elif self.sleeps:
            self._at_every_server(partial(self.ask_workers, method="kdrl_sleep", timeout_s=_LAST_S))
        self._ahead.stop()
        self._client.close()

    def restart(self) -> None:
        """Start the servers again, if this program has started them. Raises as `ReplicaGroup.wait_until_ready`."""
        if self._own is not None:
            self._own.restart(START_S)
            for server in self.servers:
                server.is_asleep = self.sleeps
                server.take_back()

    def begin(self, what: str, attempt: Attempt[_Result]) -> "Future[_Result]":
        """Begin an attempt; the future gives its result, or raises EngineError."""
        return self._ahead.submit(self._asked, what, attempt, self._over)

    def ask_all(self, attempts: Sequence[tuple[str, Attempt[_Result]]]) -> list[_Result]:
        """The results of named attempts, in order, at most `concurrency` at a time, each at the least busy server.

        Raises the EngineError of the first attempt that failed; the others are dropped.
        """
        over = threading.Event()
        workers = DaemonThreads(self._concurrency, f"kdrl-{self._role}")
        try:
            pending = [workers.submit(self._asked, what, attempt, over) for what, attempt in attempts]
            for future in wait(pending, return_when=FIRST_EXCEPTION).done:
                future.result()  # raises the error that came first in time
            return [future.result() for future in pending]
        finally:
            over.set()
            workers.stop()

    def each(self, what: str, attempt: Attempt[_Result]) -> dict[str, _Result]:
        """URL → result of every server that answers now, asked all at once. At least one must answer within
        `retry_for_s`.

        Servers that do not answer are not used for a while, and the log says so. Raises the EngineError of a server.
        """

        def round_() -> dict[str, _Result]:
            found, faults = self._at_every_server(attempt)
            if fatal := next((fault for fault in faults.values() if isinstance(fault, EngineError)), None):
                raise fatal
            with self._lock:
                for server in self.servers:
                    if server.url in faults:
                        server.leave_out(self._served.first_pause_s)
                    else:
                        server.take_back()
            if not found:
                raise next(iter(faults.values()))
            for fault in faults.values():
                _logger.warning("%s; the others are used until it answers", fault)
            return found

        return self._retried(what, round_, threading.Event())

    def _at_every_server(
        self, attempt: Attempt[_Result]
    ) -> tuple[dict[str, _Result], dict[str, TransientError | EngineError]]:
        """URL → result, and URL → fault, of one attempt at each server, all at once."""
        found: dict[str, _Result] = {}
        faults: dict[str, TransientError | EngineError] = {}
        futures = all_at_once([partial(attempt, server) for server in self.servers], f"kdrl-{self._role}-each")
        for server, future in zip(self.servers, futures, strict=True):
            try:
                found[server.url] = future.result()
            except TransientError as fault:
                faults[server.url] = self._explained(server, fault)
            except EngineError as fault:
                faults[server.url] = fault
        return found, faults

    def sleep(self) -> None:
        """Have every server that answers free its memory, if the recipe says so."""
        if self.sleeps:  # also those known to be asleep: an evaluation may have woken them
            sleep = partial(self.ask_workers, method="kdrl_sleep")
            asleep = self.each("sleep", sleep)
            if self._own is not None:
                self._own.rest()
                if len(asleep) < len(self.servers):  # one that came up between the two is still awake
                    self._at_every_server(sleep)
            for server in self.servers:
                server.is_asleep = True  # also one that did not answer: it may be back by then

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
        if self._own is not None and method in ("kdrl_load", "kdrl_wake"):
            self._own.use()
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
        server.is_asleep = server.is_asleep if method == "kdrl_state" else method == "kdrl_sleep"  # loading wakes it
        return state

    def where(self, server: Server) -> str:
        """A server as messages name it."""
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

    def binary(self, server: Server, path: str, content: bytes, *, most: int) -> tuple[bytes, str]:
        """As `ServerClient.binary`, at a `path` beside `/v1`."""
        return self._client.binary(self.where(server), server.url.removesuffix("/v1") + path, content, most=most)

    def has_routes(self, server: Server) -> bool:
        """Whether a server has the addresses of `server_routes`; it is asked once. Raises TransientError."""
        if server.has_routes is None:
            try:
                answer = self.answer(server, "GET", f"/..{ROUTES}", timeout_s=_CONTROL_S)
                server.has_routes = isinstance(answer, dict) and "kdrl" in answer
            except EngineError:
                server.has_routes = False
        return server.has_routes

    def _asked(self, what: str, attempt: Attempt[_Result], over: threading.Event) -> _Result:
        """The result of an attempt at the least busy server, retried as `retry_transient` does."""
        return self._retried(what, partial(self._at_a_server, attempt), over)

    def _retried(self, what: str, call: Callable[[], _Result], over: threading.Event) -> _Result:
        advice = f"({self._options['retry_for_s']}). {self._options['remedy']}"
        if self._own is not None:
            advice = "(the run started these servers). Mend what their logs say, then resume the run: nothing is lost"
        try:
            return retry_transient(
                what,
                call,
                retry_for_s=self._served.retry_for_s,
                first_pause_s=self._served.first_pause_s,
                over=over,
                advice=advice,
            )
        except EngineError as error:
            if self._own is not None and (words := self._own.last_words()):
                raise EngineError(f"{error}{words}") from None
            raise

    def _explained(self, server: Server, fault: TransientError) -> TransientError:
        """The fault, with how the server has ended if this program started it."""
        state = "" if self._own is None else self._own.state_of(server.url)
        return TransientError(f"{fault}{state}", retry_after_s=fault.retry_after_s) if state else fault

    def _at_a_server(self, attempt: Attempt[_Result]) -> _Result:
        with self._lock:
            now = time.monotonic()
            server = min(self.servers, key=lambda s: (s.is_out(now), s.in_flight, s.faults, s.asked))
            server.in_flight += 1
            server.asked += 1
        try:
            result = attempt(server)
        except TransientError as fault:
            with self._lock:
                server.leave_out(self._served.first_pause_s)
            raise self._explained(server, fault) from None
        else:
            with self._lock:
                server.take_back()
            return result
        finally:
            with self._lock:
                server.in_flight -= 1

    def _check_servers(self, max_tokens: int | None) -> str:
        """The name of the served model, which must be the same at every server that can be reached."""

        one_more = " and one token more" if self._role == "teacher" else ""

        def attempt(server: Server) -> str:
            answer = self.answer(server, "GET", "/models", timeout_s=_CONTROL_S)
            where = self.where(server)
            models = {self._client.without_key(name): each for name, each in models_of(answer, where).items()}
            name = self._served.model or (next(iter(models)) if len(models) == 1 else None)
            if name not in models:
                raise EngineError(
                    f"{where} serves {', '.join(sorted(models))}, not "
                    f"{self._served.model or 'one model alone'}; set {self._options['model']} to one of them"
                )
            root = models[name].get("root")
            with self._lock:
                if server is self.servers[0] or not self.says:
                    self.says = {"model": name, "root": root and self._client.without_key(str(root))}
                self.are_vllm = self.are_vllm and models[name].get("owned_by") == "vllm"
            context = models[name].get("max_model_len")
            if max_tokens is not None and isinstance(context, int) and context < max_tokens:
                raise EngineError(
                    f"{where}: its context of {context} tokens is too short for the prompt and response limits"
                    f"{one_more}; start it with --max-model-len {max_tokens}"
                )
            return name

        names = sorted(set(self.each(f"the {self._role}", attempt).values()))
        if len(names) > 1:
            raise EngineError(f"the {self._role} servers serve different models: {', '.join(names)}")
        return names[0]
