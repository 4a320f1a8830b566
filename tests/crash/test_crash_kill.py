"""SIGKILL of a real process at random instants: resumed to its end, a run has the bytes of an undisturbed one."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from crash.tiny_run import differing, open_tiny, results, train

from kdrl_core.ledger import Run, is_published, lock_holder

SCRIPT = Path(__file__).with_name("tiny_run.py")
NUM_KILLS = 4
SPARSE = ["stage2.steps=7", "stage2.checkpoint.every=3"]
"""Stage 1 checkpoints every step; stage 2 does not, and replays the steps since."""
_DEADLINE_S = 120.0


def start(artifacts: Path) -> subprocess.Popen[str]:
    """The script, once its imports are done."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(artifacts), "killed"],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    """The process and its verification worker, at once, as a machine that loses power does."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=_DEADLINE_S)


def files(run: Run) -> int:
    """How many manifests there are: how far the run has come."""
    # os.walk, since rglob fails when a folder vanishes under it.
    return sum(name.endswith("manifest.json") for _, _, names in os.walk(run.paths.root) for name in names)


def test_killed_run_ends_in_the_same_bytes(tmp_path: Path) -> None:
    whole = open_tiny(tmp_path / "undisturbed", "killed", SPARSE)
    train(whole)
    rng = random.Random(0)
    run = open_tiny(tmp_path / "disturbed", "killed", SPARSE)
    progress = [files(run)]
    for _ in range(NUM_KILLS):
        process = start(tmp_path / "disturbed")
        # Each life gets a few publications further, and dies a random moment after the last of them.
        goal, deadline = progress[-1] + rng.randint(2, 6), time.monotonic() + _DEADLINE_S
        while files(run) < goal and process.poll() is None:
            assert time.monotonic() < deadline, "the run makes no progress"
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.05))
        assert process.poll() is None, "the run ended before it was killed"
        kill(process)
        progress.append(files(run))
        assert lock_holder(run.paths.lock) is None  # the kernel's lock ends with its holder
    assert progress == sorted(progress)

    process = start(tmp_path / "disturbed")
    assert process.wait(timeout=_DEADLINE_S) == 0
    assert len(results(whole)) > 30
    assert differing(run, whole) == []
    assert is_published(run.paths.checkpoint("stage2", 7))
    assert not list(run.paths.root.rglob(".tmp-*"))
