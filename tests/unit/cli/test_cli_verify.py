"""`kdrl verify` as a user calls it."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
from forked import KDRL
from unit.cli.test_cli_bad_input import assert_told

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

CASES: list[dict[str, Any]] = [
    {"prediction": "4", "gold": "4", "right": True, "source": "easy"},
    {"prediction": r"\frac{1}{2}", "gold": "0.5", "right": True, "source": "easy"},
    {"prediction": r"so it is \boxed{7}", "gold": "8", "right": False, "source": "hard"},
    {"prediction": "9", "gold": "10", "right": True, "source": "hard"},
    {"prediction": "9^{9^{9^{9}}}", "gold": "5", "right": False, "source": "hard"},
]


@pytest.fixture
def cases(tmp_path: Path) -> Path:
    """Bare answers, one of them hostile."""
    path = tmp_path / "cases.jsonl"
    path.write_text("".join(json.dumps(case) + "\n" for case in CASES))
    return path


SHORT = ["--timeout", "2", "--workers", "1"]
BARE = ["verify", "cases.jsonl", "--box", "--expected", "right", "--by", "source", *SHORT]


@pytest.mark.usefixtures("cases")
def test_summary_and_output(cli: Cli, tmp_path: Path) -> None:
    done = cli(*BARE, "-o", "out.jsonl")
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for expected in (
        "correct 2 40.0 %",
        "wrong 2 40.0 %",
        "malformed 0 0.0 %",
        "timeout 1 20.0 %",
        "rows correct wrong timeout reward agreement false + false − source",
        "2 2 0 0 1.000 100.0 % 0 0 easy",
        "3 0 2 1 0.000 66.7 % 0 1 hard",
        "rows 5; responses in 'prediction', truths in 'gold'",
        "reward 0.400 on average; format 0.0 %, accuracy 40.0 %",
        "expected 80.00 % agreement, 0 false positives, 1 false negative (by 'right')",
        "output out.jsonl",
    ):
        assert expected in lines
    assert lines[-2].endswith("rows/s; 2 comparisons by 1 worker")
    assert done.stderr.splitlines() == [
        "verifying: 5/5 rows",
        "warning: 1 timeout: reward 0, but not found wrong; the first: line 5: no result within 2 s; "
        "the worker was killed; --timeout allows more time",
    ]
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{name: row[name] for name in CASES[0]} for row in found] == CASES
    assert [row["verdict"] for row in found] == ["correct", "correct", "wrong", "wrong", "timeout"]
    assert pd.read_json(tmp_path / "out.jsonl", lines=True)["reward"].tolist() == [1, 1, 0, 0, 0]

    assert_told(cli(*BARE, "-o", "out.jsonl"), "--output out.jsonl exists; give another file, or --force to replace it")
    assert cli(*BARE, "-o", "out.jsonl", "--force").returncode == 0


@pytest.mark.usefixtures("cases")
def test_json_stands_alone_on_stdout(cli: Cli, tmp_path: Path) -> None:
    with (tmp_path / "cases.jsonl").open("a") as file:
        file.write('{"gold": "1"}\n')
    done = cli(*BARE, "--json", "--on-error", "drop", "--max-malformed-share", "0.2")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["columns"] == {"response": "prediction", "truth": "gold", "expected": "right", "by": "source"}
    assert {kind: each["count"] for kind, each in found["verdicts"].items() if each["count"]} == {
        "correct": 2,
        "wrong": 2,
        "timeout": 1,
    }
    assert (found["rows"], found["dropped"], found["output"]) == (5, 1, None)
    assert found["expected"] == {"agreement": 0.8, "false_positives": 0, "false_negatives": 1}
    assert found["by"]["hard"]["expected"] == {"agreement": 2 / 3, "false_positives": 0, "false_negatives": 1}
    assert "warning: dropped 1 malformed row: 1 × cases.jsonl line 6, field 'prediction': missing" in done.stderr
    assert sorted(tmp_path.iterdir()) == [tmp_path / "cases.jsonl"]


def test_parquet_and_format(cli: Cli, tmp_path: Path) -> None:
    responses = [r"<think>a</think>\boxed{1}", r"a</think>\boxed{1}", r"\boxed{1}"]
    pd.DataFrame({"response": responses, "answer": ["1"] * 3}, index=[7, 8, 9]).to_parquet(tmp_path / "in.parquet")
    for options, verdicts in (
        ([], ["correct", "malformed", "malformed"]),
        (["--think-opened"], ["malformed", "correct", "malformed"]),
        (["--no-format"], ["correct"] * 3),
        (["--box", "--format"], ["correct", "malformed", "malformed"]),
    ):
        done = cli("verify", "in.parquet", "-o", "out.parquet", "--force", "--workers", "1", *options)
        assert done.returncode == 0, done.stderr
        found = pd.read_parquet(tmp_path / "out.parquet")
        assert found["verdict"].tolist() == verdicts
        assert found.index.tolist() == [7, 8, 9]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["nosuch.jsonl"], ["nosuch.jsonl does not exist"]),
        (["cases.jsonl", "-o", "out.parquet"], ["verdicts on cases.jsonl are written as JSON Lines", ".jsonl or .ndj"]),
        (["cases.jsonl", "-o", "cases.jsonl", "--force"], ["--output cases.jsonl is an input as well"]),
        (["cases.jsonl", "-o", "here.jsonl"], ["--output here.jsonl exists", "--force"]),
        (["cases.jsonl", "--truth", "answer"], ["cases.jsonl has no column 'answer' (--truth)", "it has prediction"]),
        (["cases.jsonl", "--expected", "source"], ["cases.jsonl line 1, field 'source': true, false, 1 or 0"]),
        (["cases.jsonl", "--response", "right"], ["cases.jsonl line 1, field 'right': text is expected", "--on-error"]),
        (["cases.jsonl", "--timeout", "0"], ["--timeout 0: give seconds above 0"]),
        (["cases.jsonl", "--timeout", "nan"], ["--timeout nan: give seconds above 0"]),
        (["cases.jsonl", "--memory-limit", "100"], ["--memory-limit 100: ", "give at least 384"]),
    ],
)
@pytest.mark.usefixtures("cases")
def test_bad_input_is_refused_at_once(arguments: list[str], parts: list[str], cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "here.jsonl").write_text("old")
    started = time.perf_counter()
    assert_told(cli("verify", *arguments), *parts)
    assert time.perf_counter() - started < 20.0  # no worker: a second or two on an idle machine
    assert (tmp_path / "here.jsonl").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cases.jsonl", "here.jsonl"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    row = json.dumps({"prediction": r"\boxed{9^{9^{9^{9}}}}", "gold": "5"}) + "\n"
    (tmp_path / "cases.jsonl").write_text(row * 3)
    (tmp_path / "out.jsonl").write_text("old")
    process = subprocess.Popen(
        [KDRL, "verify", "cases.jsonl", "-o", "out.jsonl", "--force", "--timeout", "600", "--workers", "2"],
        cwd=tmp_path,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    watched, deadline = psutil.Process(process.pid), time.monotonic() + 90
    # At work on the tower (one of the three rows, since they are equal), and no longer importing sympy.
    while not any(child.cpu_times().user > 4 for child in watched.children(recursive=True)):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    assert list(tmp_path.glob(".tmp-*"))
    workers = watched.children(recursive=True)
    os.killpg(process.pid, number) if number is signal.SIGINT else process.send_signal(number)  # as a terminal does
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted; no output was written"
    assert "Traceback" not in errors
    assert not [worker for worker in psutil.wait_procs(workers, timeout=15)[1] if worker.is_running()]
    assert (tmp_path / "out.jsonl").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cases.jsonl", "out.jsonl"]
