"""Commands in a terminal, and in a process group that is signalled whole, as `timeout` does it."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from forked import KDRL
from support import MARK, TINY, assert_only_private_servers, left_behind
from terminal import CTRL_C, Terminal

SETS = [part for value in (*TINY, "stage2.evaluate_every=null", "stage2.steps=400") for part in ("--set", value)]
LIMIT_S = 10.0


def _start(artifacts: Path, *arguments: str) -> Terminal:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return Terminal([str(KDRL), *arguments], {**environment, MARK: str(artifacts), "KDRL_ARTIFACTS": str(artifacts)})


def _step(artifacts: Path, number: int, run: str = "r") -> Path:
    return artifacts / "runs" / run / "rollouts" / "stage=stage2" / f"step={number:06d}" / "update.parquet"


def _ends(terminal: Terminal, artifacts: Path, way_on: str, *, limit_s: float = LIMIT_S) -> None:
    got, seconds = terminal.ended(30)
    assert got == 130, terminal.said
    assert seconds < limit_s, terminal.said
    assert way_on in terminal.said
    assert "Traceback" not in terminal.said
    assert left_behind(str(artifacts)) == []


def test_a_run_that_is_interrupted_twice_is_resumed_to_its_end(artifacts: Path) -> None:
    """By Ctrl-C in a terminal, then by SIGTERM to the group."""
    terminal = _start(artifacts, "run", "--name", "r", *SETS, "--set", "stage2.steps=12")
    terminal.wait_until(_step(artifacts, 1).exists, "stage 2")
    assert _foreign_to_the_group(terminal, artifacts)  # the server and the verifier's workers
    assert_only_private_servers(str(artifacts))
    terminal.type(CTRL_C)
    _ends(terminal, artifacts, "interrupted; go on with: kdrl resume r")
    log = (artifacts / "runs" / "r" / "run.log").read_text()
    assert "session ends: stopped by Ctrl-C; go on with: kdrl resume r" in log
    done = len(list((artifacts / "runs" / "r").glob("rollouts/stage=stage2/*/update.parquet")))
    checkpoints = sorted((artifacts / "runs" / "r" / "checkpoints" / "stage2").iterdir())
    assert checkpoints[-1].name == f"step-{done:06d}"  # what was in hand is published whole
    assert not (artifacts / "runs" / "r" / "run.holder.json").exists()

    terminal = _start(artifacts, "resume", "r")
    terminal.wait_until(_step(artifacts, done + 1).exists, "a further step")
    terminal.signal_group(signal.SIGTERM)
    _ends(terminal, artifacts, "interrupted; go on with: kdrl resume r")

    published = {path: path.stat().st_mtime_ns for path in (artifacts / "runs" / "r" / "rollouts").rglob("*.parquet")}
    terminal = _start(artifacts, "resume", "r")
    assert terminal.ended(240)[0] == 0, terminal.said
    assert {path: path.stat().st_mtime_ns for path in published} == published  # nothing is done again
    assert "after stage 2 (KDRL)" in terminal.said
    assert left_behind(str(artifacts)) == []

    status = json.loads(subprocess.run([KDRL, "status", "r", "--json"], capture_output=True, check=True).stdout)
    assert status["state"] == "finished"
    assert status["steps"] == {"stage1": 2, "stage2": 12}
    assert {model["label"] for model in status["summary"]["models"]} == {"base", "stage1", "stage2", "teacher"}

    terminal = _start(artifacts, "resume", "r")
    assert terminal.ended(60)[0] == 0
    assert "nothing to do" in terminal.said


def _foreign_to_the_group(terminal: Terminal, artifacts: Path) -> list[str]:
    """Command lines of the program's children. None of them may be in its process group."""
    children = psutil.Process(terminal.process.pid).children(recursive=True)
    in_group = [c for c in children if os.getpgid(c.pid) == terminal.process.pid]
    names = [" ".join(child.cmdline()) for child in in_group]
    assert not [name for name in names if "resource_tracker" not in name], names
    return [" ".join(child.cmdline()) for child in children if child not in in_group]


@pytest.mark.slow
def test_twice_at_once_a_closed_terminal_and_a_kill(artifacts: Path) -> None:
    terminal = _start(artifacts, "run", "--name", "r", *SETS)
    terminal.wait_until(_step(artifacts, 1).exists, "stage 2")
    terminal.type(CTRL_C)
    time.sleep(0.2)
    terminal.type(CTRL_C)
    _ends(terminal, artifacts, "interrupted; go on with: kdrl resume r", limit_s=4)

    terminal = _start(artifacts, "resume", "r")
    terminal.wait_until(_step(artifacts, 6).exists, "stage 2")
    terminal.close()
    code, seconds = terminal.ended(30)
    assert code == 130
    assert seconds < LIMIT_S
    assert left_behind(str(artifacts)) == []

    terminal = _start(artifacts, "resume", "r")
    terminal.wait_until(lambda: "starting" in terminal.said, "its first line")  # then Prefect and torch are imported
    terminal.type(CTRL_C)
    _ends(terminal, artifacts, "interrupted; go on with: kdrl resume r")

    terminal = _start(artifacts, "resume", "r")
    terminal.wait_until(_step(artifacts, 30).exists, "stage 2")
    terminal.process.kill()
    assert terminal.ended(5)[0] == -signal.SIGKILL
    assert left_behind(str(artifacts)) == []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
def test_a_sweep_stops_with_its_cells(artifacts: Path, how: str) -> None:
    vary = ["--vary", "stage2.beta.init=0.5,1.0", "--workers", "2", "--seeds", "1"]
    terminal = _start(artifacts, "sweep", "--name", "s", "--recipe", "miniature", *vary, *SETS)
    terminal.wait_until(lambda: any(artifacts.glob("runs/s-*/rollouts/stage=stage2/*/update.parquet")), "a cell")
    if how == "Ctrl-C":
        terminal.type(CTRL_C)
    else:
        terminal.signal_group(signal.SIGTERM)
    _ends(terminal, artifacts, "interrupted; go on with: kdrl sweep run s")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("command", ["evaluate", "label"])
def test_evaluate_and_label_stop_after_the_last_response(
    artifacts: Path, tmp_path: Path, command: str, how: str
) -> None:
    labels = str(tmp_path / "labels.parquet")
    arguments = {
        "evaluate": ["evaluate", "builtin:miniature/student", "-r", "miniature", "--samples", "400"],
        "label": ["label", "-r", "miniature", "-i", "builtin:miniature/stage2.parquet", "-o", labels, "--all"],
    }[command]
    terminal = _start(artifacts, *arguments)
    terminal.wait_until(lambda: any((*artifacts.rglob("*.jsonl"), *tmp_path.rglob("*.jsonl"))), "the first response")
    if how == "Ctrl-C":
        terminal.type(CTRL_C)
    else:
        terminal.signal_group(signal.SIGTERM)
    _ends(terminal, artifacts, "interrupted; the same command")
