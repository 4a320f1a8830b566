"""Servers of a model as processes of this program: started, looked after, started again, and ended together.

Each server runs below `process_guard`, so none outlives this program, however it dies. A thread for each asks until it
answers, puts it to sleep if it is to sleep, and starts it again when it ends.
"""

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from kdrl_core import process_guard
from kdrl_core.errors import EngineError
from kdrl_core.process_guard import how_ended, kill_group

_POLL_S = 0.5
_ANSWER_S = 2.0
_SLEEP_S = 600.0
_GRACE_S = 15.0
_MAX_PAUSE_S = 60.0
_LOG_LINES = 30
_LOG_BYTES = 2**16
_PORT_TRIES = 200
_FIRST_PORT = 15_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One server and how it is started."""

    url: str
    """Ends in `/v1`."""
    command: Sequence[str]
    environment: Mapping[str, str]
    """Added to the environment of this process."""
    log: Path | None = None
    """Where its output goes; None: to that of this program."""


class ReplicaGroup:
    """Servers that were started with the same model. The constructor starts them all and does not wait.

    Args:
        key: the API key that they ask for.
        asleep: they are put to sleep when they first answer, so that others can use their GPUs.
        keeps_resting: also start a server again that ends while it rests; otherwise that waits for `use`.
        starts: a server that has ended this often, before it has ever answered, is given up.
        say: gets a text when a server has ended and starts again.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        *,
        say: Callable[[str], None],
        key: str = "",
        asleep: bool = False,
        keeps_resting: bool = False,
        starts: int = 3,
    ) -> None:
        self.key, self.say, self.starts = key, say, starts
        self.keeps_resting = keeps_resting
        self.is_resting = asleep
        """Whether a server that comes up is put to sleep."""
        self.changed = threading.Condition()
        self._kept: list[_Kept] = []
        self._launch(replicas)

    @property
    def urls(self) -> list[str]:
        """Of the servers, in order."""
        return [each.replica.url for each in self._kept]

    def wait_until_ready(self, limit_s: float | None = None) -> None:
        """Return when every server answers. Raises EngineError, with the end of its log, if one is given up or does not
        answer within `limit_s`; then all are ended."""
        deadline = None if limit_s is None else time.monotonic() + limit_s
        try:
            while not all(each.answers for each in self._kept):
                self._raise_failure()
                self._raise_lost()
                if deadline is not None and time.monotonic() > deadline:
                    late = next(each for each in self._kept if not each.answers)
                    raise EngineError(f"{late.name} does not answer after {limit_s:g} s{late.last_words()}")
                with self.changed:
                    self.changed.wait(_POLL_S)
        except BaseException:
            self.close()
            raise

    def wait_until_failed(self) -> None:
        """Return never. Raises EngineError if a server is given up; KeyboardInterrupt on Ctrl-C."""
        while True:
            self._raise_failure()
            with self.changed:
                self.changed.wait(_POLL_S)

    def rest(self) -> None:
        """Say that the servers sleep. One that is just being started again is ended: others need its GPU now."""
        self.is_resting = True
        for each in self._kept:
            if not each.answers:
                each.stop()

    def use(self) -> None:
        """Say that the servers are used: one that comes up stays awake, and one that has ended is started again."""
        self.is_resting = False
        for each in self._kept:
            with each.falling_asleep:  # it may just be told to sleep
                pass

    def state_of(self, url: str) -> str:
        """What is known of a server that does not answer, to append to a message; empty if it runs."""
        return next((f" ({each.story})" for each in self._kept if each.replica.url == url and each.story), "")

    def last_words(self) -> str:
        """The ends of the logs of the servers that do not answer, to append to a message."""
        return "".join(f"\n{each.name} {each.story}{each.last_words()}" for each in self._kept if each.story)

    def restart(self, limit_s: float | None = None) -> None:
        """End all servers and start them again. Raises as `wait_until_ready`."""
        replicas = [each.replica for each in self._kept]
        self.close()
        self._launch(replicas)
        self.wait_until_ready(limit_s)

    def close(self) -> None:
        """End all servers, with everything that they have started. What they held is free on return."""
        for each in self._kept:
            each.terminate()
        deadline = time.monotonic() + _GRACE_S
        for each in self._kept:
            each.end(deadline)

    def _launch(self, replicas: Sequence[Replica]) -> None:
        self._kept = []
        try:
            for number, replica in enumerate(replicas, start=1):
                self._kept.append(_Kept(replica, self, f"replica {number} ({replica.url})"))
        except BaseException:
            self.close()
            raise

    def _raise_failure(self) -> None:
        for each in self._kept:
            if each.failure is not None:
                raise each.failure

    def _raise_lost(self) -> None:
        """Raise EngineError if a server has ended that nobody starts again: it ended asleep, while others came up."""
        if self.is_resting and not self.keeps_resting:
            for each in self._kept:
                if each.has_ever_answered and each.story:
                    raise EngineError(f"{each.name} {each.story} while others came up{each.last_words()}")


class _Kept:
    """A server, its process, and the thread that looks after it."""

    def __init__(self, replica: Replica, group: ReplicaGroup, name: str) -> None:
        self.replica, self.name = replica, name
        self.answers = False
        self.story = ""
        """How it ended, until it answers again."""
        self.failure: EngineError | None = None
        self.has_ever_answered = False
        self._group = group
        self._starts = 0
        self._next_start = 0.0
        self._is_gone = False
        """Whether its process has ended and the rest of its group was killed. The system may use its id again then."""
        self.falling_asleep = threading.Lock()
        self._over = threading.Event()
        self._starting = threading.Lock()
        self._process = self._launched()
        threading.Thread(target=self._look_after, name=f"kdrl-{name}", daemon=True).start()

    def terminate(self) -> None:
        """Ask every process of the server to end."""
        self._over.set()
        with self._starting, suppress(ProcessLookupError):
            if not self._is_gone:
                os.killpg(self._process.pid, signal.SIGTERM)

    def stop(self) -> None:
        """End it until it is started again."""
        with self._starting:
            if not self._is_gone:
                kill_group(self._process.pid)

    def end(self, deadline: float) -> None:
        """Wait for its end, and at the deadline (by `time.monotonic`) kill it."""
        with self._starting:
            if not self._is_gone:
                self._await_end(deadline)
                kill_group(self._process.pid)
                self._process.wait()
                self._is_gone = True

    def _await_end(self, deadline: float) -> None:
        """Return when no process of the server is left, or at the deadline."""
        with suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                self._process.poll()  # reaps it
                os.killpg(self._process.pid, 0)
                time.sleep(0.02)

    def last_words(self) -> str:
        """The end of its log, to append to a message."""
        if self.replica.log is None:
            return "; its own messages are above"
        with suppress(OSError), self.replica.log.open("rb") as file:
            file.seek(max(0, self.replica.log.stat().st_size - _LOG_BYTES))
            lines = file.read().decode(errors="replace").strip().splitlines()[-_LOG_LINES:]
            if lines:
                return ". The end of its log:\n" + "\n".join(lines)
        return ""

    def _launched(self) -> "subprocess.Popen[bytes]":
        self._starts += 1
        self._next_start = time.monotonic() + min(_MAX_PAUSE_S, 2.0**self._starts)
        command = [sys.executable, "-I", process_guard.__file__, str(os.getpid()), *self.replica.command]
        with ExitStack() as stack:
            log = None if self.replica.log is None else stack.enter_context(self.replica.log.open("ab"))
            process = subprocess.Popen(
                command,
                env={**os.environ, **self.replica.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._is_gone = False
        return process

    def _look_after(self) -> None:
        while not self._over.wait(_POLL_S) and self.failure is None:
            if (code := self._process.poll()) is not None:
                self._ended(code)
            elif not self.answers:
                self._ask()

    def _ended(self, code: int) -> None:
        """Say how it has ended, and start it again when its time has come."""
        with self._starting:
            if not self._is_gone:
                kill_group(self._process.pid)  # its engine and workers outlive a server that is killed, and hold memory
                self._await_end(time.monotonic() + _GRACE_S)
                self._is_gone = True
        self.answers = False
        if not self.story and not self._over.is_set():
            self.story = f"ended with {how_ended(code)}"
            self._group.say(f"{self.name} {self.story}")
        if not self.has_ever_answered and self._starts >= self._group.starts:
            times = f", {self._starts} times before it answered" if self._starts > 1 else " before it answered"
            self.failure = EngineError(f"{self.name} {self.story}{times}{self.last_words()}")
            with self._group.changed:
                self._group.changed.notify_all()
        elif time.monotonic() >= self._next_start and (self._group.keeps_resting or not self._group.is_resting):
            with self._starting:
                if not self._over.is_set():
                    try:
                        self._process = self._launched()
                    except OSError as error:  # no process or file can be had now
                        self._group.say(f"{self.name} cannot be started again now: {error}")

    def _ask(self) -> None:
        """Ask whether it answers. If the group rests, put it to sleep when it does."""
        headers = {"Authorization": f"Bearer {self._group.key}"} if self._group.key else {}
        with suppress(httpx.HTTPError), httpx.Client(trust_env=False, timeout=_ANSWER_S, headers=headers) as client:
            with client.stream("GET", f"{self.replica.url}/models") as answer:  # its body is not read
                answer.raise_for_status()
            with self.falling_asleep:
                if self._group.is_resting:
                    workers = self.replica.url.removesuffix("/v1") + "/collective_rpc"
                    body = {"method": "kdrl_sleep"}
                    with client.stream("POST", workers, json=body, timeout=_SLEEP_S) as answer:
                        answer.raise_for_status()
                self.answers = self.has_ever_answered = True
            self.story, self._starts = "", 0
            with self._group.changed:
                self._group.changed.notify_all()


def new_key() -> str:
    """A random API key."""
    return secrets.token_urlsafe(32)


def free_ports(count: int) -> list[int]:
    """So many TCP ports of this machine that nobody listens on now.

    They are below those that the system gives to outgoing connections. Such a port can be connected with itself, if it
    is asked again and again until a server answers, and the server cannot have it then.
    """
    found: list[int] = []
    first = _FIRST_PORT + secrets.randbelow(10_000)
    with ExitStack() as taken:
        for port in range(first, first + _PORT_TRIES + count):
            with suppress(OSError):
                taken.enter_context(socket.create_server(("127.0.0.1", port)))
                found.append(port)
            if len(found) == count:
                return found
    raise EngineError(f"no {count} free ports from {first} on at 127.0.0.1")
