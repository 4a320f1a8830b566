"""Whether a run is finished. Loads no model library: it is asked by whoever only looks on."""

import logging
from pathlib import Path

from kdrl_core.errors import DamagedArtifactError, RunError
from kdrl_core.ledger import Run, is_current, is_published, manifest_of, verify_own
from kdrl_core.ledger.labels import final_labels
from kdrl_core.tables.metrics import differing_metrics

_logger = logging.getLogger("kdrl")


def is_finished(run: Run, *, verify: bool = False) -> bool:
    """Whether the report is there and about the run's final models. With `verify`, whether all that a resume would mend
    is whole as well: data, metrics, the last checkpoint of each stage and the results (the log names what is not)."""
    final = final_checkpoint(run)
    evaluations = [run.paths.evaluation(label) for label in final_labels(run)]
    results = [final, run.paths.student, *evaluations]
    if not all(is_published(path) for path in results):
        return False
    last = run.paths.evaluation(run.recipe.stages[-1])
    try:
        if not is_current(last, {run.relative(final): manifest_of(final).sha256}):
            return False
        if not is_current(run.paths.report, report_inputs(run)):
            return False
        return not verify or _is_whole(run, [*results, run.paths.report])
    except DamagedArtifactError as error:
        _logger.warning("%s; so run %s is not finished", error.problem, run.name)
        return False


def _is_whole(run: Run, results: list[Path]) -> bool:
    """Raises DamagedArtifactError for an artifact that is not as it was; missing data and metrics make it False."""
    data = [run.paths.pool, run.paths.filter_report]
    data += [run.paths.sft_dataset(stage) for stage in run.recipe.stages if run.recipe.stage(stage).objective == "sft"]
    earlier = [final_checkpoint(run, stage) for stage in run.recipe.stages[:-1]]
    missing = [path for path in (*data, *earlier) if not is_published(path)]
    for path in (*data, *earlier, *results):
        if path not in missing:
            verify_own(run, path)
    for stage in run.recipe.stages:
        missing += differing_metrics(run, stage, num_steps=run.recipe.stage(stage).steps)
    if missing:
        _logger.warning("%s is missing or not as it was; so run %s is not finished", missing[0], run.name)
    return not missing


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
