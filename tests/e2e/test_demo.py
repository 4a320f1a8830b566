"""`make demo`'s program for real: server, worker, deployment, and nothing left behind, however it ends."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import MARK, TINY, assert_only_private_servers, left_behind

from kdrl_core.ledger import open_run
from kdrl_core.look.reporting.run_summary import run_status

ROOT = Path(__file__).parent.parent.parent


def _demo(artifacts: Path, *arguments: str) -> subprocess.Popen[str]:
    sets = [part for value in TINY for part in ("--set", value)]
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli.demo", "--name", "e2e", *sets, *arguments],
        cwd=ROOT,
        env={**os.environ, "KDRL_ARTIFACTS": str(artifacts), MARK: str(artifacts)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_demo_runs_the_deployment_and_stops_everything(artifacts: Path) -> None:
    process = _demo(artifacts)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert "prefect deployment run kdrl/full-pipeline --watch" in output
    assert "stage2 step 2/3" in output
    assert "after stage 2 (KDRL)" in output
    assert "demo ended with exit code 0" in output
    assert "Traceback" not in output
    assert run_status(open_run("e2e"))["state"] == "finished"
    assert left_behind(str(artifacts)) == []


@pytest.mark.slow
def test_interrupted_demo_leaves_no_process_and_can_be_resumed(artifacts: Path) -> None:
    process = _demo(artifacts, "--set", "stage2.steps=500")
    metrics = artifacts / "runs" / "e2e" / "metrics" / "stage=stage2" / "metrics.parquet"
    deadline = time.monotonic() + 300
    while not metrics.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "stage 2 did not begin"
        time.sleep(0.5)
    assert_only_private_servers(str(artifacts))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "kdrl resume e2e" in output
    assert left_behind(str(artifacts)) == []
    assert run_status(open_run("e2e"))["state"] == "stopped; kdrl resume e2e"


@pytest.mark.slow
def test_failed_flow_gives_its_exit_status(artifacts: Path) -> None:
    """A flow that fails on the worker, after every check that the demo itself can make."""
    process = _demo(artifacts, "--set", "stage1.data.max_problems=2")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1, output
    assert "fewer than prompts_per_step=4" in output
    assert left_behind(str(artifacts)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "minature"], "no recipe 'minature', did you mean 'miniature'?"),
        (["--name", "../x"], "run name '../x' is not allowed"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(artifacts: Path, arguments: list[str], message: str) -> None:
    process = _demo(artifacts, *arguments)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert message in output
    assert "Prefect server" not in output


def test_busy_port_is_named(artifacts: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = _demo(artifacts, "--port", str(port))
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"port {port} on 127.0.0.1 cannot be used" in output
    assert "Prefect server" not in output
