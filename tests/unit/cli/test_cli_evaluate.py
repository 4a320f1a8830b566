"""`kdrl evaluate`: what it prints and writes, resumed after SIGKILL, and what it refuses at once."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import KDRL
from unit.cli.test_cli_bad_input import assert_told

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

STUDENT = "builtin:miniature/student"


def test_an_evaluation_survives_a_kill_and_is_found_again(cli: Cli, tmp_path: Path, artifacts: Path) -> None:
    command = ["evaluate", STUDENT, "-r", "miniature", "-b", "test", "--samples", "4"]
    process = subprocess.Popen(
        [KDRL, *command],
        cwd=tmp_path,
        env={**os.environ, "KDRL_ARTIFACTS": str(artifacts)},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(artifacts.glob("evaluations/*/*.work/_shard-*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    shards = {file: file.stat().st_mtime_ns for file in artifacts.glob("evaluations/*/*.work/shard-*.parquet")}
    assert 1 <= len(shards) <= 8

    whole = cli(*command, "--json", "--lm-eval", "lm.json")
    assert whole.returncode == 0, whole.stderr
    (found,) = json.loads(whole.stdout)
    assert (found["benchmark"], found["num_problems"], found["num_samples"]) == ("test", 256, 4)
    assert set(found["pass_at_k"]) == {"1", "2", "4"}
    assert whole.stderr.splitlines()[-1] == "test: 1,024/1,024 responses"
    lm_eval = json.loads((tmp_path / "lm.json").read_text())
    assert lm_eval["results"]["test"]["exact_match,none"] == found["accuracy"]

    again = cli(*command)
    assert again.returncode == 0, again.stderr
    assert again.stderr == ""
    row = next(line for line in again.stdout.splitlines() if line.startswith("test "))
    assert row.split()[:3] == ["test", "256×4", f"{100 * found['accuracy']:.1f}"]
    assert row.endswith("before")
    assert f"test  {found['folder']}" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            [STUDENT, "-b", "tset"],
            ["no benchmark 'tset'", "known: test, hard, ood, validation", "did you mean 'test'?"],
        ),
        ([STUDENT, "--columns", "answer=key"], ["--columns is for benchmarks of your own; add --benchmark NAME=FILE"]),
        ([STUDENT, "-b", "mine=nowhere.jsonl"], ["benchmark mine: ", "nowhere.jsonl does not exist"]),
        (
            [STUDENT, "-b", "bad=bad.jsonl"],
            ["bad.jsonl: columns id, problem are of no known format", "benchmark bad's columns={problem: …"],
        ),
        (["nowhere"], ["error: MODEL nowhere: no such directory"]),
        (["run:nowhere"], ["error: MODEL run:nowhere: "]),
        ([STUDENT, "--api-key", "env:KEY"], ["--api-key is of an endpoint", "http://HOST:PORT/v1"]),
        (["http://127.0.0.1:1/v1", "--api-key", "env:NOT_SET"], ["NOT_SET"]),
        ([STUDENT, "-s", "evaluation.max_context_tokens=900"], ["beyond the context", "max_context_tokens=128"]),
    ],
)
def test_bad_input_is_refused_at_once(arguments: list[str], parts: list[str], cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"id": "a", "problem": "1+1"}\n')
    started = time.perf_counter()
    found = cli("evaluate", "-r", "miniature", *arguments)
    assert time.perf_counter() - started < 15
    assert_told(found, *parts)
