"""`kdrl ui` as a program: it starts, answers on loopback alone, ends on Ctrl-C, and refuses in words."""

import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import httpx
import psutil
import pytest
from forked import KDRL
from unit.cli.conftest import Cli
from unit.ui import handmade


@pytest.fixture
def going(artifacts: Path) -> Path:
    """A run of one step."""
    root = artifacts / "runs" / "going"
    handmade.write_step(root, "stage1", 0, [{}, {}])
    return root


def test_it_serves_on_loopback_alone_until_ctrl_c(going: Path, artifacts: Path) -> None:
    (going / "rollouts" / "stage=stage1" / "step=000000" / "update.parquet").write_bytes(b"torn")
    process = subprocess.Popen(
        [KDRL, "ui", "going"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "KDRL_ARTIFACTS": str(artifacts)},
    )
    assert process.stdout is not None
    try:
        (url,) = re.findall(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
        found = httpx.get(f"{url}api/runs", timeout=20).json()
        assert found["runs"][0]["num_rollouts"] == 2
        listening = [one for one in psutil.Process(process.pid).net_connections() if one.status == psutil.CONN_LISTEN]
        assert {one.laddr.ip for one in listening} == {"127.0.0.1"}
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, out) == (0, "")
    assert re.search(r"left out: \S+/step=000000/update.parquet: cannot be read", err)
    assert "Traceback" not in err


def test_an_unknown_run_is_refused_with_the_nearest(going: Path, cli: Cli) -> None:
    refused = cli("ui", "gonig")
    assert refused.returncode == 1
    assert "no run 'gonig'" in refused.stderr
    assert "did you mean 'going'?" in refused.stderr


def test_a_port_that_is_taken(going: Path, cli: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = cli("ui", "going", "--port", str(port))
    assert refused.returncode == 1
    assert f"cannot listen at 127.0.0.1:{port} (Address already in use); give another --port" in refused.stderr
