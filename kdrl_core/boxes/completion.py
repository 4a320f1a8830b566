"""Whether a run is finished, and the student that it produces. Loads no model library, so that viewers can use it."""

import logging
import shutil
from itertools import dropwhile
from pathlib import Path

from kdrl_core.boxes.make import Product, box
from kdrl_core.errors import DamagedArtifactError, RunError
from kdrl_core.ledger import Manifest, Run, is_published, manifest_of, verify_own
from kdrl_core.ledger.graph import CHECKPOINT, STUDENT, Node, final_checkpoint, needs, results
from kdrl_core.ledger.heal import changed_inputs
from kdrl_core.tables.files import differing_metrics
from kdrl_core.training.protocols import STATE_DIR

_logger = logging.getLogger("kdrl")


def is_finished(run: Run, *, verify: bool = False) -> bool:
    """Whether the last checkpoint and everything made from it exist and belong together. With `verify`, everything that
    a resume would repair must be intact as well: data, metrics, and the last checkpoint of each stage."""
    final = final_checkpoint(run.recipe)
    last = list(dropwhile(lambda node: node != final, results(run.recipe)))
    paths = {node: run.paths.root / node.place for node in last}
    if not all(is_published(path) for path in paths.values()):
        return False
    try:
        if not all(_is_current(run, node, manifest_of(path)) for node, path in paths.items()):
            return False
        return not verify or _is_whole(run)
    except DamagedArtifactError as error:
        _logger.warning("%s; so run %s is not finished", error.problem, run.name)
        return False


def _is_current(run: Run, node: Node, manifest: Manifest) -> bool:
    """Whether a node was made from the inputs that the recipe gives it, and those still there are unchanged."""
    wanted = {choice[0].place for choice in needs(run.recipe, node)} if node.name != CHECKPOINT.name else set()
    return wanted <= manifest.inputs.keys() and not changed_inputs(run, manifest)


def _is_whole(run: Run) -> bool:
    """Whether all results exist and metrics are right. Raises DamagedArtifactError for an artifact that was altered."""
    paths = [run.paths.root / node.place for node in results(run.recipe)]
    missing = [path for path in paths if not is_published(path)]
    for path in paths:
        if path not in missing:
            verify_own(run, path)
    for stage in run.recipe.stages:
        missing += differing_metrics(run, stage, num_steps=run.recipe.stage(stage).steps)
    if missing:
        _logger.warning("%s is missing or not as it was; so run %s is not finished", missing[0], run.name)
    return not missing


def require_trained(run: Run, stage: str) -> None:
    """Raise RunError if a stage has ended without its last checkpoint: training nothing must not pass as success."""
    final = final_checkpoint(run.recipe, stage).place
    if not is_published(run.paths.root / final):
        raise RunError(
            f"{stage} came to its end without {final}, so it is not trained; "
            f"look for the first error in the log, then: kdrl resume {run.name}"
        )


def require_finished(run: Run) -> None:
    """Raise RunError if a run has ended without being finished."""
    for stage in run.recipe.stages:
        require_trained(run, stage)
    if not is_finished(run):
        raise RunError(
            f"run {run.name} came to its end without its evaluations, student and report; "
            f"look for the first error in the log, then: kdrl resume {run.name}"
        )


@box(STUDENT)
def student(run: Run, checkpoint: Path) -> Product:
    """The last stage's result without trainer state: transformers loads it by its path."""
    verify_own(run, checkpoint)

    def write(folder: Path) -> None:
        left_out = shutil.ignore_patterns(STATE_DIR, "manifest.json")
        shutil.copytree(checkpoint, folder, ignore=left_out, dirs_exist_ok=True)

    return Product(content=write)
