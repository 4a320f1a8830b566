"""Whether a run is finished. Loads no model library: it is asked by whoever only looks on."""

from pathlib import Path

from kdrl_core.ledger import Run, is_current, is_published, manifest_of
from kdrl_core.reporting.summary import final_labels


def is_finished(run: Run) -> bool:
    """Whether the report is there and about the run's final models."""
    final = final_checkpoint(run)
    evaluations = [run.paths.evaluation(label) for label in final_labels(run)]
    if not is_published(final) or not all(is_published(path) for path in evaluations):
        return False
    last = run.paths.evaluation(run.recipe.stages[-1])
    return is_current(last, {run.relative(final): manifest_of(final).sha256}) and is_current(
        run.paths.report, report_inputs(run)
    )


def report_inputs(run: Run) -> dict[str, str]:
    """What a report is made from: the final evaluations, by the hashes in their manifests."""
    paths = [run.paths.evaluation(label) for label in final_labels(run)]
    return {run.relative(path): manifest_of(path).sha256 for path in paths}


def final_checkpoint(run: Run) -> Path:
    """The last stage's last checkpoint, published or not."""
    stage = run.recipe.stages[-1]
    return run.paths.checkpoint(stage, run.recipe.stage(stage).steps)
