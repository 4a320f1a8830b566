"""The end of a run: the student as an ordinary model directory."""

import shutil
from pathlib import Path

from kdrl_core.ledger import Run, publish_directory, verify_own
from kdrl_core.ledger.graph import final_checkpoint
from kdrl_core.training.protocols import STATE_DIR


def export_student(run: Run) -> Path:
    """Publish the last stage's result without trainer state: transformers loads it by its path."""
    checkpoint = run.paths.root / final_checkpoint(run.recipe).place
    sha256 = verify_own(run, checkpoint).sha256

    def write(folder: Path) -> None:
        shutil.copytree(
            checkpoint, folder, ignore=shutil.ignore_patterns(STATE_DIR, "manifest.json"), dirs_exist_ok=True
        )

    publish_directory(run.paths.student, write, inputs={run.relative(checkpoint): sha256})
    return run.paths.student
