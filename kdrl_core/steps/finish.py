"""The end of a run: the student as an ordinary model directory, and the report."""

import shutil
from pathlib import Path

from kdrl_core.ledger import Run, is_current, is_published, manifest_of, publish_directory, verify_published
from kdrl_core.reporting.report import render_report
from kdrl_core.reporting.summary import final_labels
from kdrl_core.training.torch_trainer import STATE_FILE


def export_student(run: Run) -> Path:
    """Publish the last stage's result without trainer state: transformers loads it by its path."""
    checkpoint = _final_checkpoint(run)

    def write(folder: Path) -> None:
        shutil.copytree(
            checkpoint, folder, ignore=shutil.ignore_patterns(STATE_FILE, "manifest.json"), dirs_exist_ok=True
        )

    publish_directory(run.paths.student, write, inputs=run.inputs(checkpoint))
    verify_published(run.paths.student)
    return run.paths.student


def write_report(run: Run) -> Path:
    """Publish the report of a run whose models are all evaluated."""
    publish_directory(run.paths.report, lambda folder: render_report(run, folder), inputs=_report_inputs(run))
    return run.paths.report


def is_finished(run: Run) -> bool:
    """Whether the report is there and about the run's final models."""
    final = _final_checkpoint(run)
    evaluations = [run.paths.evaluation(label) for label in final_labels(run)]
    if not is_published(final) or not all(is_published(path) for path in evaluations):
        return False
    last = run.paths.evaluation(run.recipe.stages[-1])
    return is_current(last, {run.relative(final): manifest_of(final).sha256}) and is_current(
        run.paths.report, _report_inputs(run)
    )


def _report_inputs(run: Run) -> dict[str, str]:
    paths = [run.paths.evaluation(label) for label in final_labels(run)]
    return {run.relative(path): manifest_of(path).sha256 for path in paths}


def _final_checkpoint(run: Run) -> Path:
    stage = run.recipe.stages[-1]
    return run.paths.checkpoint(stage, run.recipe.stage(stage).steps)
