"""`kdrl run`, `status` and `resume` as a user types them, without a server."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from support import MARK, TINY, assert_only_private_servers, left_behind

KDRL = str(Path(sys.executable).with_name("kdrl"))
SETS = [part for value in TINY for part in ("--set", value)]


def _start(artifacts: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [KDRL, *arguments],
        env={**os.environ, MARK: str(artifacts)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _call(artifacts: Path, *arguments: str) -> tuple[int, str, str]:
    process = _start(artifacts, *arguments)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


def test_interrupted_run_is_resumed_to_its_end(artifacts: Path) -> None:
    process = _start(artifacts, "run", "--name", "r", *SETS, "--set", "stage2.steps=6")
    metrics = artifacts / "runs" / "r" / "metrics" / "stage=stage2" / "metrics.parquet"
    deadline = time.monotonic() + 200
    while not metrics.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "stage 2 did not begin"
        time.sleep(0.05)
    assert_only_private_servers(str(artifacts))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "go on with: kdrl resume r" in errors
    assert "Traceback" not in errors
    assert left_behind(str(artifacts)) == []

    code, output, errors = _call(artifacts, "resume", "r")
    assert code == 0, errors
    assert "stage2 step 5/6" in errors  # plain lines, since this is no terminal
    assert "stage1 step 0/2" not in errors  # what is published is not done again
    assert "after stage 2 (KDRL)" in output
    assert left_behind(str(artifacts)) == []

    code, output, _ = _call(artifacts, "status", "r", "--json")
    status = json.loads(output)
    assert code == 0
    assert status["state"] == "finished"
    assert status["steps"] == {"stage1": 2, "stage2": 6}
    assert {model["label"] for model in status["summary"]["models"]} == {"base", "stage1", "stage2", "teacher"}

    code, output, _ = _call(artifacts, "resume", "r")
    assert code == 0
    assert "nothing to do" in output


def test_failure_inside_the_flow_is_one_line(artifacts: Path) -> None:
    code, _, errors = _call(artifacts, "run", "--name", "small", *SETS, "--set", "stage1.data.max_problems=2")
    assert code == 1
    assert "error: stage1: 2 problems are left after filtering, fewer than prompts_per_step=4" in errors
    assert "Traceback" not in errors
    assert left_behind(str(artifacts)) == []
