"""`kdrl doctor` on a machine that cannot run the recipe: one line per check, what to do, and exit code 1."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_a_machine_without_gpus(cli: Callable[..., Any], artifacts: Path) -> None:
    done = cli("doctor", "--recipe", "paper-1.5b", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    gpus = next(index for index, line in enumerate(lines) if line.startswith("✗ GPUs "))
    assert "0 GPUs are visible with CUDA_VISIBLE_DEVICES= (none), the recipe uses " in lines[gpus]
    assert lines[gpus + 1].startswith("  → take a node with GPUs and a driver")
    assert any(line.startswith("✓ Python ") for line in lines)
    real = next(line for line in lines if line.startswith("– a step for real "))
    assert "nothing can be loaded before this is mended: " in real
    assert lines[-1].endswith(" failed")
    assert not artifacts.exists()


def test_json_for_a_bug_report(cli: Callable[..., Any], tmp_path: Path) -> None:
    done = cli("doctor", "-r", "paper-1.5b", "--json", "--folder", str(tmp_path / "scratch"), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["recipe"] == "paper-1.5b"
    assert "GPUs" in report["failed"]
    assert {"kdrl", "torch", "transformers"} <= set(report["versions"])
    assert str(tmp_path) not in done.stdout
    assert not (tmp_path / "scratch").exists()
