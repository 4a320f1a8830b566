"""Servers of a model as children of one command: they start and end together; one that ends early starts again."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import httpx

from flows.guard import guard_children
from kdrl_core.errors import EngineError
from kdrl_core.training.process_guard import kill_group

_POLL_S = 0.5
_ANSWER_S = 2.0
_SLEEP_S = 120.0
_GRACE_S = 15.0
_MAX_PAUSE_S = 60.0
_STARTS = 3
"""A replica that has ended this often without an answer is not started again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One server and how it is started."""

    url: str
    """Ends in `/v1`."""
    command: Sequence[str]
    environment: Mapping[str, str]
    """Added to the environment of this process."""


def serve_replicas(replicas: Sequence[Replica], *, asleep: bool, say: Callable[[str], None]) -> None:
    """Run replicas until this process is interrupted. No replica outlives it, however it ends. If `asleep`, they sleep
    as soon as they answer. `say` gets a text when all answer, and when one has ended and starts again.

    Raises EngineError if one ends three times before it has ever answered; KeyboardInterrupt on Ctrl-C.
    """
    guard_children()
    running = [_Running(replica, asleep=asleep) for replica in replicas]
    try:
        while not all(each.has_answered for each in running):
            _look_after(running, say)
        answer = "the replica answers" if len(running) == 1 else f"all {len(running)} replicas answer"
        say(f"{answer} at {', '.join(each.replica.url for each in running)}; Ctrl-C ends it all")
        while True:
            _look_after(running, say)
    finally:
        for each in running:
            each.process.terminate()
        deadline = time.monotonic() + _GRACE_S
        for each in running:
            each.end(max(0.0, deadline - time.monotonic()))


def _look_after(running: "Sequence[_Running]", say: Callable[[str], None]) -> None:
    for each in running:
        if (code := each.process.poll()) is not None:
            kill_group(each.process.pid)  # its engine and workers outlive a server that is killed, and hold memory
            if time.monotonic() >= each.next_start:
                status = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
                how = f"replica {each.replica.url} ended with {status}"
                if each.starts >= _STARTS and not each.has_ever_answered:
                    raise EngineError(f"{how}, {each.starts} times before it answered; its own messages are above")
                say(f"{how}; it is started again")
                each.restart()
        each.ask()
    time.sleep(_POLL_S)


class _Running:
    """A replica and its process, in a session of its own with the engine and the workers that it starts."""

    def __init__(self, replica: Replica, *, asleep: bool) -> None:
        self.replica = replica
        self.asleep = asleep
        self.starts = 1
        self.next_start = 0.0
        """Earliest time of its next start, if it ends."""
        self.has_answered = self.has_ever_answered = False
        self.process = self._launch()

    def restart(self) -> None:
        """Start it again after it has ended."""
        self.starts = 1 if self.has_answered else self.starts + 1
        self.next_start = time.monotonic() + min(_MAX_PAUSE_S, 2.0**self.starts)
        self.has_answered = False
        self.process = self._launch()

    def _launch(self) -> "subprocess.Popen[bytes]":
        environment = {**os.environ, **self.replica.environment}
        return subprocess.Popen(self.replica.command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)

    def ask(self) -> None:
        """Ask whether it answers, unless it has answered already. If `asleep`, put it to sleep when it answers."""
        if self.has_answered:
            return
        with suppress(httpx.HTTPError), httpx.Client(trust_env=False, timeout=_ANSWER_S) as client:
            with client.stream("GET", f"{self.replica.url}/models") as answer:  # its body is not read
                is_up = answer.is_success
            if is_up:
                if self.asleep:
                    workers = self.replica.url.removesuffix("/v1") + "/collective_rpc"
                    body = {"method": "kdrl_sleep"}
                    with client.stream("POST", workers, json=body, timeout=_SLEEP_S) as answer:
                        answer.raise_for_status()
                self.has_answered = self.has_ever_answered = True

    def end(self, grace_s: float) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(grace_s)
        kill_group(self.process.pid)
        self.process.wait()
