"""`kdrl label`: what it prints and writes, resumed after SIGKILL, and what it refuses at once."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forked import KDRL
from unit.cli.test_cli_bad_input import assert_told

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

SOURCE = "builtin:miniature/stage1.json"
SAMPLES = ["--set", "stage2.data.difficulty.num_samples=4"]
TWENTY = ["label", "-r", "miniature", "-i", SOURCE, "--max-problems", "20", *SAMPLES]


def test_labels_survive_a_kill(cli: Cli, tmp_path: Path) -> None:
    whole = cli(*TWENTY, "-o", "whole.parquet", "--shard-problems", "1", "--json")
    assert whole.returncode == 0, whole.stderr
    found = json.loads(whole.stdout)
    assert (found["num_labelled"], found["num_sampled"], sum(found["histogram"])) == (20, 20, 20)
    assert found["pass_at"]["4"] >= found["pass_at"]["2"] >= found["pass_at"]["1"] > 0
    assert whole.stderr.splitlines()[-1] == "label: 80/80 responses"
    assert not (tmp_path / "whole.parquet.work").exists()

    command = [*TWENTY, "-o", "killed.parquet", "--shard-problems", "1", "--keep-work"]
    shards = tmp_path / "killed.parquet.work" / "shards"
    process = subprocess.Popen([KDRL, *command], cwd=tmp_path, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(shards.glob("_shard-*"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    published = {file: file.stat().st_mtime_ns for file in shards.glob("_shard-*")}
    assert 3 <= len(published) < 20
    assert not (tmp_path / "killed.parquet").exists()

    resumed = cli(*command)
    assert resumed.returncode == 0, resumed.stderr
    assert {file: file.stat().st_mtime_ns for file in published} == published
    assert (tmp_path / "killed.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert len(list(shards.glob("shard-*.parquet"))) == 20
    assert "pass@1" in resumed.stdout
    assert "20 of 20 problems, 20 sampled for it" in resumed.stdout
    rows = [line.split() for line in resumed.stdout.splitlines()[2:7]]
    assert [[int(row[0]), int(row[1])] for row in rows] == [list(pair) for pair in enumerate(found["histogram"])]
    labels = [
        dict(row)["DeepSeek-R1-Distill-Qwen-1.5B"]
        for row in pq.read_table(shards.parents[1] / "killed.parquet")["failures"].to_pylist()
    ]
    assert [labels.count(count) for count in range(5)] == found["histogram"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["-o", "out.jsonl"], ["--output out.jsonl", "give a name that ends in .parquet"]),
        (["-o", "here.parquet"], ["--output here.parquet exists", "--force"]),
        (["-o", "in.parquet", "-i", "in.parquet", "--force"], ["is an input as well", "give another file"]),
        (["-o", "in.parquet", "-i", "i*.parquet", "--force"], ["is an input as well", "give another file"]),
        (["-o", "out.parquet", "--samples", "8"], ["--samples 8 differs from", "num_samples=4", "leave --samples out"]),
        (["-o", "out.parquet", "--stage", "stage9"], ["no stage 'stage9'", "stage1 or stage2"]),
        (["-o", "out.parquet", "--model", "nowhere"], ["--model nowhere: its label needs a name", "add --label NAME"]),
        (["-o", "out.parquet", "--model", "nowhere", "--label", "x"], ["error: --model nowhere: no such directory"]),
        (["-o", "out.parquet", "-i", "nowhere.jsonl"], ["nowhere.jsonl does not exist"]),
        (["-o", "out.parquet", "-s", "stage2.betta=1"], ["did you mean 'beta'?"]),
    ],
)
def test_bad_input_is_refused_at_once(arguments: list[str], parts: list[str], cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "here.parquet").write_text("")
    pq.write_table(pa.table({"problem": ["1+1"], "answer": ["2"]}), tmp_path / "in.parquet")
    before = (tmp_path / "in.parquet").read_bytes()
    started = time.perf_counter()
    done = cli("label", "-r", "miniature", "-i", SOURCE, *SAMPLES, *arguments)
    assert_told(done, *parts)
    assert time.perf_counter() - started < 20.0  # no model library: a second or two on an idle machine
    assert not list(tmp_path.glob("*.work"))
    assert (tmp_path / "in.parquet").read_bytes() == before


def test_responses_that_were_not_sampled_are_not_summed_up(cli: Cli, tmp_path: Path) -> None:
    rows = [{"problem": "1+1", "answer": "2", "failures": {"DeepSeek-R1-Distill-Qwen-1.5B": 1}}]
    (tmp_path / "in.jsonl").write_text(json.dumps(rows))
    done = cli("label", "-r", "miniature", "-i", "in.jsonl", "-o", "out.parquet", *SAMPLES)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 problems, 0 sampled for it" in done.stdout
    assert "pass@1    75.0 %" in done.stdout
    assert "responses" not in done.stdout
