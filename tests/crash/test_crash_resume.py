"""A run that is killed with SIGKILL and resumed ends with the same bytes as one that was not."""

import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import TINY

from kdrl_core.config import load_recipe
from kdrl_core.ledger import RunPaths, create_run
from kdrl_core.rollouts.metrics import load_metrics

LOOP = Path(__file__).with_name("loop.py")
STEPS = {"stage1": 4, "stage2": 8}
KILLS = 6


def _new_run(artifacts: Path, name: str, every: int) -> RunPaths:
    steps = [f"{stage}.steps={count}" for stage, count in STEPS.items()]
    checkpoints = [f"{stage}.checkpoint.every={every}" for stage in STEPS]
    recipe = load_recipe(
        "miniature", [*TINY, *steps, *checkpoints, "stage1.evaluate_every=null", "stage2.evaluate_every=null"]
    )
    return create_run(name, recipe, artifacts=artifacts).paths


def _digests(paths: RunPaths) -> dict[str, str]:
    """sha256 of everything that a rerun reproduces: tables (but timings), weights, trainer state, pool."""
    names = [p for p in paths.root.rglob("*") if p.suffix in (".parquet", ".safetensors") or p.name == "state.json"]
    return {
        str(p.relative_to(paths.root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in names
        if p.name != "timings.parquet" and ".scratch" not in p.parts
    }


@pytest.mark.parametrize("every", [1, 3])
def test_killed_and_resumed_is_bit_identical(tmp_path: Path, every: int) -> None:
    command = [sys.executable, str(LOOP)]
    calm = _new_run(tmp_path, "calm", every)
    subprocess.run([*command, str(calm.root)], check=True, timeout=200)

    killed = _new_run(tmp_path, "killed", every)
    rng = random.Random(every)
    kills = 0
    for _ in range(KILLS):
        process = subprocess.Popen([*command, str(killed.root)])
        begun = killed.rollouts("stage1", 0)
        while process.poll() is None and not begun.exists():
            time.sleep(0.01)  # a kill during imports would prove nothing
        time.sleep(rng.uniform(0.0, 0.4) if kills == 0 else rng.uniform(4.0, 6.0))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 2
    subprocess.run([*command, str(killed.root)], check=True, timeout=200)

    expected, actual = _digests(calm), _digests(killed)
    assert actual.keys() == expected.keys()
    assert [name for name in expected if actual[name] != expected[name]] == []
    run = create_run("killed", load_recipe(killed.recipe), artifacts=tmp_path)
    for stage, count in STEPS.items():
        assert [row["step"] for row in load_metrics(run, stage)] == list(range(count))  # none lost, none twice
    assert not list(killed.root.rglob(".tmp-*"))
