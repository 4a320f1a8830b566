"""The end of a run: the student as an ordinary model directory, and the report."""

import shutil
from pathlib import Path

from kdrl_core.ledger import Run, find_intact, publish_directory, verify_own, verify_published
from kdrl_core.reporting.report import render_report
from kdrl_core.reporting.summary import final_labels
from kdrl_core.steps.completion import final_checkpoint, report_inputs
from kdrl_core.training.protocols import STATE_DIR


def export_student(run: Run) -> Path:
    """Publish the last stage's result without trainer state: transformers loads it by its path."""
    checkpoint = final_checkpoint(run)
    sha256 = verify_own(run, checkpoint).sha256

    def write(folder: Path) -> None:
        shutil.copytree(
            checkpoint, folder, ignore=shutil.ignore_patterns(STATE_DIR, "manifest.json"), dirs_exist_ok=True
        )

    publish_directory(run.paths.student, write, inputs={run.relative(checkpoint): sha256})
    return run.paths.student


def write_report(run: Run) -> Path:
    """Publish the report of a run whose models are all evaluated."""
    for label in final_labels(run):
        verify_published(run.paths.evaluation(label))
    find_intact(run.paths.report, is_exact=False)
    publish_directory(run.paths.report, lambda folder: render_report(run, folder), inputs=report_inputs(run))
    return run.paths.report
