"""`kdrl sweep` as a user types it: a cell that fails, a kill, going on, the table of what there is."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from forked import KDRL
from support import MARK, TINY, left_behind

SWEEP = [str(KDRL), "sweep"]
ONE_BENCHMARK = "[{name: test, file: 'builtin:miniature/benchmarks/test.jsonl', max_problems: 4}]"
OWN = ["evaluation.periodic=[]", f"evaluation.benchmarks={ONE_BENCHMARK}", "stage2.steps=2"]
SETS = [part for value in [*TINY, *OWN] for part in ("--set", value)]
VARIANTS = {
    "KDRL": {},
    "small pool": {"stage2.data.max_problems": 2},
    "GRPO": {"stage2.objective": "grpo"},
}


def _start(artifacts: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, MARK: str(artifacts)}
    return subprocess.Popen(
        [*SWEEP, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _call(artifacts: Path, *arguments: str) -> tuple[int, str, str]:
    process = _start(artifacts, *arguments)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_a_failed_cell_is_reported(artifacts: Path, tmp_path: Path) -> None:
    file = tmp_path / "three.yaml"
    file.write_text(yaml.safe_dump({"name": "three", "variants": VARIANTS}, sort_keys=False))
    process = _start(artifacts, "run", str(file), *SETS)
    begun = artifacts / "runs" / "three--kdrl--seed0" / "rollouts" / "stage=stage2"
    deadline = time.monotonic() + 200
    while not begun.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "stage 2 of the first cell did not begin"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert left_behind(str(artifacts)) == []

    code, output, errors = _call(artifacts, "run", "three", "--workers", "2")  # without its file and options
    assert code == 1
    assert "Traceback" not in errors
    assert "cell three--small-pool--seed0 failed: stage2: 2 problems are left after filtering" in errors
    assert "error: sweep three: 1 of 3 cells are not finished: three--small-pool--seed0 failed" in errors
    assert "Go on with: kdrl sweep run three (or one alone: kdrl resume three--small-pool--seed0)" in errors
    assert "finished three--grpo--seed0" in errors
    assert "Not finished" in output
    assert left_behind(str(artifacts)) == []

    code, output, _ = _call(artifacts, "status", "three", "--json")
    assert code == 0
    states = {cell["run"]: (cell["state"], cell["detail"]) for cell in json.loads(output)["cells"]}
    assert states["three--kdrl--seed0"] == states["three--grpo--seed0"] == ("finished", "")
    assert states["three--small-pool--seed0"][0] == "failed"

    code, output, _ = _call(artifacts, "report", "three", "--json")
    table = json.loads(output)
    assert code == 0
    assert [row["label"] for row in table["rows"] if not row["is_reference"]] == ["KDRL", "small pool", "GRPO"]
    assert [one["run"] for one in table["missing"]] == ["three--small-pool--seed0"]
    assert (artifacts / "sweeps" / "three" / "report" / "sweep.md").is_file()

    manifest = json.loads((artifacts / "runs" / "three--grpo--seed0" / "manifest.json").read_text())
    assert {one["what"]: one["run"] for one in manifest["adopted"]}["stage1"] == "three--kdrl--seed0"
    before = _stamps(artifacts / "runs")
    code, _, errors = _call(artifacts, "run", "three", "--set", "stage2.steps=1")
    assert code == 1
    assert "three--kdrl--seed0 was started with another recipe" in errors
    assert _stamps(artifacts / "runs") == before


def _stamps(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in root.rglob("*.parquet")}
