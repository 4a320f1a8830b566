"""Processes that train together: started by DeepSpeed's launcher, commanded over a socket, ended together.

Every rank first calls back on a socket and proves that it knows the group's secret key. From then on it is watched: a
rank whose connection closes is dead. If one rank fails, all of them end, with one error that names this rank and the
reason. Messages are those of `kdrl_core.training.messages`.

The program and its ranks may be on several hosts (a DeepSpeed hostfile); they share the folder of the group.
"""

import base64
import json
import os
import secrets
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge, wait
from pathlib import Path
from typing import Any

import kdrl_core
from kdrl_core import process_guard
from kdrl_core.errors import EngineError
from kdrl_core.models.devices import devices_of_ranks
from kdrl_core.process_guard import how_ended, kill_group
from kdrl_core.training.messages import Arrays, pack, unpack

WORKER = "kdrl_core.training.deepspeed_worker"
SPEC = "ranks.json"

_HANDSHAKE_S = 10.0
_LAST_WORDS_S = 5.0
"""How long the launcher may take to notice a dead rank and say by what signal it ended."""
_KILLED_S = 5.0
_LOG_LINES = 30
_TIME_OUT_LOG_LINES = 90
"""A longer part of the log, since the ranks print there what they are doing."""
_ROOT = Path(kdrl_core.__file__).parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What one rank answered."""

    header: dict[str, Any]
    arrays: Arrays


class RankGroup:
    """`num_ranks` processes running the worker module.

    Args:
        folder: an empty folder of the group's own, visible to every rank.
        settings: given to the workers at their start, as JSON.
        hostfile: DeepSpeed's; None starts all ranks here.
        master_port: for the ranks' rendezvous; None takes a free one.
        start_timeout_s: until every rank has called back and is ready.

    Raises:
        EngineError: a rank failed to start, to join, or to be ready in time; all processes have ended.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        *,
        num_ranks: int,
        hostfile: str | None,
        master_port: int | None,
        environment: dict[str, str],
        start_timeout_s: float,
    ) -> None:
        self._num_ranks = num_ranks
        self._log = folder / "ranks.log"
        self._connections: list[Connection] = []
        self._places: list[str] = []
        self._guard: subprocess.Popen[bytes] | None = None
        key = secrets.token_hex(32)
        host = socket.gethostname() if hostfile else "127.0.0.1"
        with socket.create_server(("" if hostfile else host, 0), backlog=num_ranks) as server:
            spec = {"address": [host, server.getsockname()[1]], "key": key, "settings": settings}
            _write_private(folder / SPEC, json.dumps(spec))
            command = launch_command(
                folder / SPEC,
                num_ranks=num_ranks,
                hostfile=hostfile,
                master_port=free_port() if master_port is None else master_port,
                device=settings.get("device", "cpu"),
            )
            deadline = time.monotonic() + start_timeout_s
            try:
                self._launch(command, environment)
                self._accept(server, key.encode(), deadline)
                self._collect("start", deadline, start_timeout_s, "trainer.start_timeout_s")
            except BaseException:
                self.close()
                raise

    def ask(self, messages: Sequence[bytes], *, doing: str, timeout_s: float) -> list[Reply]:
        """Send each rank its message and return their answers, by rank. Errors say what was `doing`.

        Raises:
            EngineError: a rank died, raised an error, or did not answer in time; the group is closed.
        """
        if self._guard is None:
            raise EngineError(
                "the training ranks are closed, after an error or at the end of the stage; start them anew"
            )
        deadline = time.monotonic() + timeout_s
        try:
            for rank, (connection, message) in enumerate(zip(self._connections, messages, strict=True)):
                try:
                    connection.send_bytes(message)
                except OSError:
                    raise self._death(rank, doing) from None
            return self._collect(doing, deadline, timeout_s, "trainer.step_timeout_s")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End every process of the group."""
        for connection in self._connections:
            hang_up(connection)  # this ends ranks on other hosts
        guard, self._guard = self._guard, None
        if guard is not None:
            kill_group(guard.pid)
            guard.wait()
            _wait_for_group(guard.pid)  # what they held (ports, GPU memory) is free on return

    def _launch(self, command: Sequence[str], environment: dict[str, str]) -> None:
        guarded = [sys.executable, "-I", process_guard.__file__, str(os.getpid()), *command]
        paths = (str(_ROOT), os.environ.get("PYTHONPATH", ""))
        binaries = (str(Path(sys.executable).parent), os.environ.get("PATH", ""))  # ninja is beside Python
        with self._log.open("wb") as log:
            self._guard = subprocess.Popen(
                guarded,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(path for path in paths if path),
                    "PYTHONWARNINGS": "ignore::FutureWarning",  # DeepSpeed's, hundreds of lines
                    "PATH": os.pathsep.join(path for path in binaries if path),
                    **environment,
                },
            )

    def _accept(self, server: socket.socket, key: bytes, deadline: float) -> None:
        """Wait for every rank to call back. Raises EngineError if one does not; closes the other connections then."""
        found: dict[int, tuple[Connection, str]] = {}
        try:
            self._accept_into(found, server, key, deadline)
        except BaseException:
            for connection, _ in found.values():
                connection.close()
            raise
        self._connections = [found[rank][0] for rank in range(self._num_ranks)]
        self._places = [found[rank][1] for rank in range(self._num_ranks)]

    def _accept_into(
        self, found: dict[int, tuple[Connection, str]], server: socket.socket, key: bytes, deadline: float
    ) -> None:
        """Fill `found`: rank → its connection and its place."""
        server.settimeout(0.2)
        while len(found) < self._num_ranks:
            assert self._guard is not None
            if (code := self._guard.poll()) is not None:
                raise EngineError(f"the launcher of the training ranks ended with {how_ended(code)}{self._log_tail()}")
            if time.monotonic() > deadline:
                missing = sorted(set(range(self._num_ranks)) - set(found))
                raise EngineError(
                    f"ranks {missing} of {self._num_ranks} did not call back in time; look at their hosts, or raise "
                    f"trainer.start_timeout_s{self._log_tail()}"
                )
            try:
                caller, _ = server.accept()
            except TimeoutError:
                continue
            connection = _authenticate(caller, key)
            if connection is None:
                continue
            hello, _ = unpack(connection.recv_bytes())
            if hello["world_size"] != self._num_ranks:
                connection.close()
                raise EngineError(
                    f"the launcher starts {hello['world_size']} ranks, but trainer.ranks is {self._num_ranks}; "
                    "set it to the sum of the slots in trainer.hostfile"
                )
            found[hello["rank"]] = connection, f"pid {hello['pid']} on {hello['host']}"

    def _collect(self, doing: str, deadline: float, timeout_s: float, field: str) -> list[Reply]:
        """One answer of every rank."""
        replies: dict[int, Reply] = {}
        while len(replies) < self._num_ranks:
            waiting = {c: rank for rank, c in enumerate(self._connections) if rank not in replies}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise EngineError(
                    f"{doing}: ranks {sorted(waiting.values())} of {self._num_ranks} gave no answer within "
                    f"{timeout_s:g} s; raise {field} if they only are slow{self._log_tail(_TIME_OUT_LOG_LINES)}"
                )
            failed: tuple[int, Reply] | None = None
            for rank in sorted(waiting[c] for c in ready if isinstance(c, Connection)):
                try:
                    header, arrays = unpack(self._connections[rank].recv_bytes())
                except (EOFError, OSError):
                    raise self._death(rank, doing) from None
                replies[rank] = Reply(header=header, arrays=arrays)
                if "error" in header and failed is None:
                    failed = rank, replies[rank]
            if failed is not None:
                raise self._failure(*failed, doing, replies)
        return [replies[rank] for rank in range(self._num_ranks)]

    def _failure(self, rank: int, reply: Reply, doing: str, replies: dict[int, Reply]) -> EngineError:
        """The error that a rank raised; or the death of another rank, if that made this one fail."""
        others = {c: other for other, c in enumerate(self._connections) if other not in replies}
        for connection in wait(list(others), timeout=0.5):
            other = others[connection]  # type: ignore[index]
            try:
                self._connections[other].recv_bytes()
            except (EOFError, OSError):
                return self._death(other, doing)
        return EngineError(
            f"{doing}: rank {rank} ({self._places[rank]}) failed: {reply.header['error']}\n{reply.header['traceback']}"
        )

    def _death(self, rank: int, doing: str) -> EngineError:
        """The error for a rank that died; the launcher's exit status says how."""
        assert self._guard is not None
        how = "is gone"
        with suppress(subprocess.TimeoutExpired):
            how = f"ended with {how_ended(self._guard.wait(_LAST_WORDS_S))}"
        return EngineError(f"{doing}: rank {rank} ({self._places[rank]}) {how}{self._log_tail()}")

    def _log_tail(self, num_lines: int = _LOG_LINES) -> str:
        """The end of the log of launcher and ranks, to append to a message."""
        with suppress(OSError):
            lines = self._log.read_text(errors="replace").strip().splitlines()[-num_lines:]
            if lines:
                return ". The end of their log:\n" + "\n".join(lines)
        return ""


def hang_up(connection: Connection) -> None:
    """Close a connection, even while another thread waits for it: that keeps the socket open, and the other end would
    not notice."""
    with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as own:
        own.shutdown(socket.SHUT_RDWR)
    connection.close()


def call_back(spec: dict[str, Any]) -> Connection:
    """A rank's side: connect to the program that started it. Raises OSError or AuthenticationError."""
    connection = Connection(socket.create_connection(tuple(spec["address"]), timeout=_HANDSHAKE_S).detach())
    os.set_blocking(connection.fileno(), True)
    key = spec["key"].encode()
    answer_challenge(connection, key)
    deliver_challenge(connection, key)
    hello = {
        "rank": int(os.environ["RANK"]),
        "world_size": int(os.environ["WORLD_SIZE"]),
        "pid": os.getpid(),
        "host": socket.gethostname(),
    }
    connection.send_bytes(pack(hello))
    return connection


def launch_command(
    spec: Path, *, num_ranks: int, hostfile: str | None, master_port: int, device: str = "cpu"
) -> list[str]:
    """DeepSpeed's launcher, here or on the hosts of a hostfile, with the worker for every rank.

    It sets CUDA_VISIBLE_DEVICES of the ranks anew: here to the names that this process has, so that local rank i gets
    the i-th of them; on the hosts of a hostfile to 0, 1, …. Raises EngineError if this process has fewer GPUs."""
    worker = ["--log_level=error", "--module", "--no_local_rank", WORKER, str(spec)]
    if hostfile is not None:
        options = ["--hostfile", hostfile, f"--master_port={master_port}"]
        return [sys.executable, "-m", "deepspeed.launcher.runner", *options, *worker]
    devices = list(range(num_ranks)) if device == "cpu" else devices_of_ranks(num_ranks)
    world = base64.urlsafe_b64encode(json.dumps({"localhost": devices}).encode()).decode()
    options = [f"--world_info={world}", "--master_addr=127.0.0.1", f"--master_port={master_port}"]
    return [sys.executable, "-m", "deepspeed.launcher.launch", *options, *worker]


def free_port() -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def _authenticate(caller: socket.socket, key: bytes) -> Connection | None:
    """A connection to a caller that knows the key; None for any other caller, whose connection is closed."""
    seconds = int(_HANDSHAKE_S)
    caller.setblocking(True)
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", seconds, 0))
    connection = Connection(caller.detach())
    try:
        deliver_challenge(connection, key)
        answer_challenge(connection, key)
    except (AuthenticationError, EOFError, OSError):
        connection.close()
        return None
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 0))
    return connection


def _wait_for_group(group: int) -> None:
    """Wait until no process of a killed group is left, for a few seconds at most: the kernel may hold on to one."""
    deadline = time.monotonic() + _KILLED_S
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.01)


def _write_private(path: Path, text: str) -> None:
    """A file that its owner alone can read: it holds the key."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
