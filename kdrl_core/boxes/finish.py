"""The end of a run: the student as an ordinary model directory."""

import shutil
from pathlib import Path

from kdrl_core.boxes.make import Product, box
from kdrl_core.ledger import Run, verify_own
from kdrl_core.ledger.graph import STUDENT
from kdrl_core.training.protocols import STATE_DIR


@box(STUDENT)
def student(run: Run, checkpoint: Path) -> Product:
    """The last stage's result without trainer state: transformers loads it by its path."""
    verify_own(run, checkpoint)

    def write(folder: Path) -> None:
        left_out = shutil.ignore_patterns(STATE_DIR, "manifest.json")
        shutil.copytree(checkpoint, folder, ignore=left_out, dirs_exist_ok=True)

    return Product(content=write)
