"""Servers as processes of this program: what is said when one ends, and when it is started again.

Real processes, with a server of a few lines in place of vLLM's; tests/parity has vLLM's.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kdrl_core.engines import server_processes
from kdrl_core.engines.server_client import ServedModel
from kdrl_core.engines.server_pool import ServerPool
from kdrl_core.engines.server_processes import Replica, ReplicaGroup, free_ports, new_key
from kdrl_core.errors import EngineError

SERVER = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self):
        allowed = self.headers.get("Authorization") == f"Bearer {os.environ['KEY']}"
        print(os.getpid(), self.command, self.path, allowed, file=sys.stderr, flush=True)
        self.send_response(200 if allowed else 401)
        self.end_headers()
    do_GET = do_POST = answer
    def log_message(self, *_): pass
print("up", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


END = "if self.command == 'POST': import threading; threading.Timer(1.5, os._exit, [7]).start()"


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_is_started_again_but_not_while_it_rests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (port,), key, log, said = free_ports(1), new_key(), tmp_path / "replica-1.log", list[str]()
    assert port < 32_768  # below the ports of outgoing connections
    url = f"http://127.0.0.1:{port}/v1"
    replica = Replica(url=url, command=[sys.executable, "-c", SERVER, str(port)], environment={"KEY": key}, log=log)
    group = ReplicaGroup([replica], say=said.append, key=key, asleep=True)
    killed: list[int] = []
    kill_group = server_processes.kill_group

    def noted(number: int) -> None:
        killed.append(number)
        kill_group(number)

    monkeypatch.setattr(server_processes, "kill_group", noted)

    def kill() -> None:
        number = log.read_text().split("\n")[-2].split()[0]
        os.kill(int(number), signal.SIGKILL)

    try:
        group.wait_until_ready(60.0)
        lines = log.read_text().splitlines()
        assert lines[0] == "up"
        assert [line.split(maxsplit=1)[1] for line in lines[1:]] == [
            "GET /v1/models True",
            "POST /collective_rpc True",  # it is put to sleep
        ]
        kill()
        until(lambda: said)
        told = "ended with signal SIGKILL, which the kernel sends when memory has run out"
        assert said == [f"replica 1 ({url}) {told}"]
        assert group.state_of(url) == f" ({told})"
        assert "POST /collective_rpc True" in group.last_words()
        time.sleep(1.2)
        assert log.read_text().count("up") == 1
        assert len(killed) == 1  # another program may have the number of a group that is gone
        group.use()
        until(lambda: not group.state_of(url))
        assert log.read_text().count("up") == 2
        assert log.read_text().count("POST") == 1  # it is in use: not put to sleep
        assert group.last_words() == ""
    finally:
        group.close()
    assert len(said) == 1  # of the end that was asked for nothing is said


def test_a_server_that_cannot_start_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    program = "import sys; print('out of memory', flush=True); sys.exit(3)"
    replica = Replica(
        url="http://127.0.0.1:1/v1",
        command=[sys.executable, "-c", program],
        environment={},
        log=tmp_path / "replica-1.log",
    )
    group = ReplicaGroup([replica], say=lambda _: None, starts=1)
    with pytest.raises(EngineError, match=r"replica 1 .* status 3 before it answered\. The end of its log:\nout"):
        group.wait_until_ready(60.0)


def test_a_server_that_ends_asleep_while_others_come_up_is_named(tmp_path: Path) -> None:
    slow = "import time; time.sleep(600)"
    short = SERVER.replace("        self.end_headers()", "        self.end_headers()\n        " + END)
    (port,) = free_ports(1)
    replicas = [
        Replica(url=f"http://127.0.0.1:{number}/v1", command=command, environment={"KEY": "k"}, log=tmp_path / name)
        for number, name, command in (
            (port, "short", [sys.executable, "-c", short, str(port)]),
            (1, "slow", [sys.executable, "-c", slow]),
        )
    ]
    group = ReplicaGroup(replicas, say=lambda _: None, key="k", asleep=True, starts=1)
    with pytest.raises(
        EngineError, match=r"replica 1 .* ended with status 7 while others came up\. The end of its log"
    ):
        group.wait_until_ready(60.0)


class Own:
    """In place of a `ReplicaGroup`."""

    def __init__(self, rests: Callable[[], object] = lambda: None) -> None:
        self.rest = rests
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True

    def state_of(self, url: str) -> str:
        return ""

    def last_words(self) -> str:
        return ""


@contextmanager
def served(port: int, told: list[str]) -> Iterator[None]:
    """A server that says which model it has, and notes what it is told."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"data": [{"id": "model"}]})

        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["method"])
            self.answer({"results": [{"weights": "", "incarnation": "1", "digest": ""}]})

        def answer(self, content: Any) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_that_comes_up_while_the_others_fall_asleep_sleeps_too() -> None:
    first, second = free_ports(2)
    told: list[list[str]] = [[], []]
    with ExitStack() as servers:
        servers.enter_context(served(first, told[0]))
        own: Any = Own(rests=lambda: servers.enter_context(served(second, told[1])))
        urls = [f"http://127.0.0.1:{port}/v1" for port in (first, second)]
        pool = ServerPool(ServedModel(urls=urls, sleep=True, own=own, retry_for_s=0.0), role="rollout", field="vllm")
        pool.sleep()
        assert told == [["kdrl_sleep"] * 2, ["kdrl_sleep"]]
        assert [server.is_asleep for server in pool.servers] == [True, True]
        pool.close()
        assert own.is_closed


def test_servers_of_which_none_is_fit_are_ended() -> None:
    own: Any = Own()
    (port,) = free_ports(1)
    with pytest.raises(EngineError, match=r"cannot be reached .*\(the run started these servers\)\. Mend what"):
        ServerPool(
            ServedModel(urls=[f"http://127.0.0.1:{port}/v1"], own=own, retry_for_s=0.0), role="rollout", field="vllm"
        )
    assert own.is_closed


def test_a_server_that_does_not_answer_in_time_is_named_and_ended(tmp_path: Path) -> None:
    program = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    log = tmp_path / "replica-1.log"
    replica = Replica(url="http://127.0.0.1:1/v1", command=[sys.executable, "-c", program], environment={}, log=log)
    group = ReplicaGroup([replica], say=lambda _: None)
    until(lambda: log.exists() and log.read_text().strip())
    with pytest.raises(EngineError, match=r"replica 1 .* does not answer after 0.1 s"):
        group.wait_until_ready(0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(json.loads(log.read_text()), 0)
