"""A run's own evaluation that is killed in the middle goes on behind its last response."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from crash.tiny_run import open_tiny
from support import benchmarks

from kdrl_core.boxes.check import check_run
from kdrl_core.boxes.evaluate import evaluate_model
from kdrl_core.engines.transformers_engines import TransformersRolloutEngine
from kdrl_core.ledger import Run, open_run, published_below, sweep_temporaries
from kdrl_core.types import Rollout, RolloutRequest

OVERRIDES = [
    "evaluation.temperature=0.7",
    "runtime.rollout_batch_size=4",
    benchmarks("test", "hard", "ood", "validation", samples=2, max_problems=6),
    "evaluation.max_context_tokens=48",
]
DYING = f"""
import os, signal, sys
from pathlib import Path
from crash.tiny_run import open_tiny
from kdrl_core.boxes.evaluate import evaluate_model
from kdrl_core.sampling.journal import Journal

keep, kept = Journal.keep, set()

def dying(journal, responses):
    keep(journal, responses)
    kept.update(response.seed for response in responses)
    if len(kept) >= 18:
        os.kill(os.getpid(), signal.SIGKILL)

Journal.keep = dying
evaluate_model(open_tiny(Path(sys.argv[1]), "killed", {OVERRIDES}), "base")
"""
"""Evaluates 4 benchmarks of 6 problems, 2 responses each, and dies in the second."""


@pytest.fixture(scope="module")
def died(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of artifacts that such a process left."""
    artifacts = tmp_path_factory.mktemp("killed")
    open_tiny(artifacts, "killed", OVERRIDES)
    done = subprocess.run(
        [sys.executable, "-c", DYING, str(artifacts)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return artifacts


@pytest.fixture
def killed(died: Path, tmp_path: Path) -> Run:
    shutil.copytree(died, tmp_path, dirs_exist_ok=True)
    return open_run("killed", artifacts=tmp_path)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[RolloutRequest]:
    """What engines of this process are asked for."""
    seen: list[RolloutRequest] = []
    generate = TransformersRolloutEngine.generate

    def heard(self: Any, requests: Sequence[RolloutRequest], **options: Any) -> list[Rollout]:
        seen.extend(requests)
        return generate(self, requests, **options)

    monkeypatch.setattr(TransformersRolloutEngine, "generate", heard)
    return seen


def work_of(run: Run) -> Path:
    return run.paths.evaluation("base").with_name(".scratch-base")


def test_only_what_is_missing_is_sampled(killed: Run, tmp_path: Path, asked: list[RolloutRequest]) -> None:
    assert not [path for path in published_below(killed.paths.root) if "evaluation" in path.parts]
    assert not check_run(killed).findings
    sweep_temporaries(killed.paths.root)  # as a resume does
    (journal,) = work_of(killed).glob("*/*.jsonl")
    lines = [json.loads(line.partition(" ")[2]) for line in journal.read_text().splitlines()]
    kept = {line["seed"] for line in lines}
    assert 6 <= len(kept) < 12
    found = evaluate_model(killed, "base")
    resumed = {request.seed for request in asked}
    assert len(asked) == 48 - 12 - len(kept)
    assert not kept & resumed
    assert not work_of(killed).exists()

    asked.clear()
    whole = open_tiny(tmp_path / "whole", "whole", OVERRIDES)
    undisturbed = evaluate_model(whole, "base")
    assert len(asked) == 48
    ours, theirs = (run.paths.evaluation("base") for run in (killed, whole))
    assert (ours / "responses.parquet").read_bytes() == (theirs / "responses.parquet").read_bytes()
    assert found | {"date": 0, "seconds": 0} == undisturbed | {"date": 0, "seconds": 0}
    assert list(found) == list(undisturbed) == ["label", "model", "date", "seconds", "benchmarks"]
    assert sorted(file.name for file in ours.iterdir()) == sorted(file.name for file in theirs.iterdir())
    assert found["date"] < undisturbed["date"]


def test_a_damaged_shard_is_sampled_again(killed: Run, asked: list[RolloutRequest]) -> None:
    (shard,) = work_of(killed).glob("*/shard-*.parquet")
    shard.write_bytes(shard.read_bytes()[:-8] + b"12345678")
    evaluate_model(killed, "base")
    assert len([request for request in asked if request.prompt_id.startswith("validation-")]) == 12


def test_what_was_sampled_with_other_settings_does_not_count(
    killed: Run, tmp_path: Path, asked: list[RolloutRequest]
) -> None:
    """The same folder under another recipe, whose responses have the same seeds."""
    other = Run(killed.paths, open_tiny(tmp_path / "other", "other", [*OVERRIDES, "evaluation.temperature=0.8"]).recipe)
    evaluate_model(other, "base")
    assert len(asked) == 48
    assert not work_of(killed).exists()
