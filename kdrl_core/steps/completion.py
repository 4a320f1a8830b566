"""Whether a run is finished. Loads no model library: it is asked by whoever only looks on."""

import logging
from pathlib import Path

from kdrl_core.errors import DamagedArtifactError, RunError
from kdrl_core.ledger import Run, is_current, is_published, manifest_of, verify_published
from kdrl_core.reporting.summary import final_labels

_logger = logging.getLogger("kdrl")


def is_finished(run: Run, *, verify: bool = False) -> bool:
    """Whether the report is there and about the run's final models; with `verify`, whether all of them have their bytes
    as well (the log names the first that has not)."""
    final = final_checkpoint(run)
    evaluations = [run.paths.evaluation(label) for label in final_labels(run)]
    results = [final, run.paths.student, *evaluations]
    if not all(is_published(path) for path in results):
        return False
    last = run.paths.evaluation(run.recipe.stages[-1])
    try:
        current = is_current(last, {run.relative(final): manifest_of(final).sha256}) and is_current(
            run.paths.report, report_inputs(run)
        )
        earlier = [final_checkpoint(run, stage) for stage in run.recipe.stages[:-1]]
        checked = (*filter(is_published, earlier), *results, run.paths.report)  # earlier ones may have been deleted
        for path in checked if current and verify else ():
            verify_published(path)
    except DamagedArtifactError as error:
        _logger.warning("%s; so run %s is not finished", str(error).partition(";")[0], run.name)
        return False
    return current


def require_trained(run: Run, stage: str) -> None:
    """Raise RunError if a stage that was gone through has no last checkpoint: to train nothing is no success."""
    final = final_checkpoint(run, stage)
    if not is_published(final):
        raise RunError(
            f"{stage} came to its end without {run.relative(final)}, so it is not trained; "
            f"look for the first error in the log, then: kdrl resume {run.name}"
        )


def require_finished(run: Run) -> None:
    """Raise RunError if a run that was gone through is not finished."""
    for stage in run.recipe.stages:
        require_trained(run, stage)
    if not is_finished(run):
        raise RunError(
            f"run {run.name} came to its end without its evaluations, student and report; "
            f"look for the first error in the log, then: kdrl resume {run.name}"
        )


def report_inputs(run: Run) -> dict[str, str]:
    """What a report is made from: the final evaluations, by the hashes in their manifests."""
    paths = [run.paths.evaluation(label) for label in final_labels(run)]
    return {run.relative(path): manifest_of(path).sha256 for path in paths}


def final_checkpoint(run: Run, stage: str | None = None) -> Path:
    """The last checkpoint of a stage (default: the last), published or not."""
    stage = stage or run.recipe.stages[-1]
    return run.paths.checkpoint(stage, run.recipe.stage(stage).steps)
