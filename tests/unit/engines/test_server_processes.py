"""Servers as processes of this program: what is said when one ends, and when it is started again.

Real processes, with a server of a few lines in place of vLLM's; tests/parity has vLLM's.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

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


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_is_started_again_but_not_while_it_rests(tmp_path: Path) -> None:
    (port,), key, log, said = free_ports(1), new_key(), tmp_path / "replica-1.log", list[str]()
    assert port < 32_768  # below the ports of outgoing connections
    url = f"http://127.0.0.1:{port}/v1"
    replica = Replica(url=url, command=[sys.executable, "-c", SERVER, str(port)], environment={"KEY": key}, log=log)
    group = ReplicaGroup([replica], say=said.append, key=key, asleep=True)

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
        assert said == [f"replica 1 ({url}) ended with signal SIGKILL"]
        assert group.state_of(url) == " (ended with signal SIGKILL)"
        assert "POST /collective_rpc True" in group.last_words()
        time.sleep(0.8)
        assert log.read_text().count("up") == 1
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
