"""Hostile answers among ordinary ones, as the benchmark measures them: every promise of the pool at once."""

import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("count", [pytest.param(1_000, marks=pytest.mark.slow), 8])
def test_hostile_answers_cost_their_limit_and_nothing_else(count: int) -> None:
    """The benchmark exits with an error unless all verdicts came, in order, the ordinary ones right, no hostile one
    rewarded, every worker below its memory limit, the wall time within its bound, and no worker left."""
    command = [sys.executable, "benchmarks/verifier.py", "--only", "hostile", "--hostile", str(count)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{2 * count}\n  ordinary ones right" in done.stdout
