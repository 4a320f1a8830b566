"""Checks everything that a run has published: have bytes, manifests or steps changed?

A resume checks only the artifacts that it continues from. This check covers the others as well, such as the rollouts of
old steps. It loads no model library; only `repair_run` does.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from kdrl_core.boxes.stage import latest_checkpoint
from kdrl_core.config.outside import slots_of
from kdrl_core.errors import DamagedArtifactError, ForeignFileError, KdrlError, RunError
from kdrl_core.ledger import Outside, Run, is_published, lock_holder, manifest_of, outside_of, run_lock, verify_own
from kdrl_core.ledger.artifact import ARTIFACTS, Node
from kdrl_core.ledger.graph import ROLLOUTS, STEP, evaluated_labels, final_checkpoint, node_at, required
from kdrl_core.ledger.heal import ASIDE_PREFIX
from kdrl_core.ledger.identity import difference, identify_slot
from kdrl_core.ledger.manifest import artifact_stem, published_below
from kdrl_core.ledger.names import stage_and_step
from kdrl_core.ledger.versions import give_up, later_than
from kdrl_core.tables.files import differing_metrics, rebuild_metrics

_SETTLE_S = 1.0

OnChecked = Callable[[int, int], None]
"""Called with the number of artifacts compared so far, and the number of all artifacts."""


class Remedy(StrEnum):
    """What repairs a damaged artifact."""

    RESUME = "kdrl resume"
    """The run still needs the artifact, and a resume makes it again."""
    REPAIR = "kdrl check --repair"
    """For verdicts and scores of old steps: they are made again from the step's rollouts."""
    BACKUP = "a backup"
    """For records that kdrl cannot make again, such as the rollouts of an old step. The run continues without them."""
    REPLACE = "a backup, or kdrl check --replace"
    """For what models have made where they do not compute the same bits again, and later steps were made from it: those
    can only be restored, or be given up (`replace_artifact`)."""
    RESTORE = "restoring it"
    """For models, data and code outside of the run: only their owner can restore them. The run refuses to go on."""
    OWNER = "moving or deleting it"
    """The artifact is intact but in the wrong place. Once it is gone, the right one is made again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One artifact that is missing, or differs from what was published."""

    path: str
    """Relative to the run; for a model, data or code, as the recipe names it."""
    problem: str
    remedy: Remedy
    stage: str | None = None
    step: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What was checked and what was found."""

    num_artifacts: int
    num_bytes: int
    num_outside: int
    """Models, data and code outside of the run that were compared with what it recorded; 0 for a run of an earlier
    version of kdrl, which has recorded nothing."""
    findings: list[Finding]


def check_run(run: Run, *, on_checked: OnChecked | None = None) -> CheckReport:
    """Compare every artifact of a run with its manifest, every manifest with the manifests of its inputs, every step
    with its required files, and the models, data and code outside of the run with what the run recorded. Reads only.

    While another process works on the run, findings are checked twice: a file may be about to appear.
    """
    artifacts = list(published_below(run.paths.root))
    findings, num_bytes = _look(run, artifacts, on_checked)
    if findings and lock_holder(run.paths.lock) is not None:
        time.sleep(_SETTLE_S)
        again, _ = _look(run, [run.paths.root / name for name in findings], None)
        findings = {name: finding for name, finding in again.items() if name in findings}
    recorded = outside_of(run)
    findings |= {one.path: one for one in _outside(run, recorded)}
    return CheckReport(
        num_artifacts=len(artifacts), num_bytes=num_bytes, num_outside=len(recorded), findings=list(findings.values())
    )


def _look(run: Run, artifacts: list[Path], on_checked: OnChecked | None) -> tuple[dict[str, Finding], int]:
    """Findings by path, and how many bytes were compared."""
    findings: dict[str, Finding] = {}
    num_bytes = 0

    def found(path: Path, problem: str, remedy: Remedy | None = None) -> None:
        finding = _finding(run, path, problem, remedy)
        findings.setdefault(finding.path, finding)

    for number, path in enumerate(artifacts, start=1):
        try:
            manifest = verify_own(run, path)
        except ForeignFileError as error:
            found(path, error.problem, Remedy.OWNER)
        except DamagedArtifactError as error:
            found(path, error.problem)
        except RunError:  # deleted meanwhile, as old checkpoints are
            pass
        else:
            num_bytes += manifest.size
        if on_checked is not None:
            on_checked(number, len(artifacts))
    for path in (*_required(run), *_present(run), *_named_inputs(run, artifacts)):
        if not is_published(path):
            found(path, "has no manifest" if path.exists() else "is missing")
    for path in _set_aside(run):
        found(path, "was damaged, set aside, and not made again since")
    for stage in run.recipe.stages:
        for path in differing_metrics(run, stage, num_steps=latest_checkpoint(run, stage)):
            found(path, "does not hold what the steps' manifests say")
    return findings, num_bytes


def _outside(run: Run, recorded: Outside) -> Iterator[Finding]:
    """What the recipe names outside of the run and is not there, or has another content than was recorded."""
    for slot, text in slots_of(run.recipe).items():
        if slot in recorded:
            try:
                found = identify_slot(run.recipe, slot, text, reads_all=True)
                problem = "is missing" if found is None else difference(recorded[slot], found)
            except KdrlError as error:
                problem = str(error)
            if problem is not None:
                yield Finding(path=text, problem=f"{slot}: {problem}", remedy=Remedy.RESTORE)


def repair_run(run: Run, report: CheckReport) -> tuple[list[str], list[str]]:
    """Make the artifacts again that `Remedy.REPAIR` applies to. Returns the repaired paths, and why others failed.

    Raises:
        RunLockedError: another process works on the run.
    """
    from kdrl_core.boxes.make import make
    from kdrl_core.boxes.session import close_sessions, stage_session
    from kdrl_core.boxes.step import SCORES, verify

    boxes = {each.row.name: each for each in (*SCORES, verify)}
    repaired, refused = [], []
    with run_lock(run.paths.lock):
        for finding in report.findings:
            node = node_at(finding.path)
            if finding.remedy is not Remedy.REPAIR or node is None or node.stage is None:
                continue
            try:
                make(stage_session(run.paths.root, node.stage), boxes[node.name], node.at)
            except KdrlError as error:
                refused.append(f"{finding.path}: {error}")
            else:
                repaired.append(finding.path)
        close_sessions()
    return repaired, refused


def replace_artifact(run: Run, report: CheckReport, place: str) -> list[str]:
    """Give up a damaged artifact that `Remedy.REPLACE` applies to, and everything that was made from it: a resume makes
    other versions. Returns the places of what was given up, the latest first; it is all kept in `.replaced`.

    Raises:
        RunError: the report has no such finding.
        RunLockedError: another process works on the run.
    """
    may = [finding.path for finding in report.findings if finding.remedy is Remedy.REPLACE]
    node = node_at(place)
    if place not in may or node is None:
        of_these = f"only {', '.join(may)} can be" if may else "nothing of this run can be"
        raise RunError(f"{place} cannot be replaced; {of_these}. kdrl check {run.name} says what else is damaged")
    with run_lock(run.paths.lock):
        given_up = give_up(run, node)
        for stage in run.recipe.stages:
            rebuild_metrics(run, stage, num_steps=latest_checkpoint(run, stage))
    return given_up


def _set_aside(run: Run) -> Iterator[Path]:
    """The artifacts that were set aside and not made again."""
    for leftover in sorted(run.paths.root.rglob(f"{ASIDE_PREFIX}*")):
        path = leftover.with_name(leftover.name.removeprefix(ASIDE_PREFIX))
        if artifact_stem(path) is None and not is_published(path):
            yield path


def _required(run: Run) -> Iterator[Path]:
    """The files that every stage must have, for each step that a checkpoint covers or that has an update."""
    for stage in run.recipe.stages:
        steps = latest_checkpoint(run, stage)
        while is_published(run.paths.update(stage, steps)):
            steps += 1
        yield from (run.paths.root / node.place for node in required(run.recipe, stage, steps))


def _present(run: Run) -> Iterator[Path]:
    """The files and folders that must be published if they exist. Readers of rollouts as one dataset read every Parquet
    file among them."""
    names = {row.glob: None for row in ARTIFACTS.values()} | {f"{STEP.glob}/*{Path(ROLLOUTS.file).suffix}": None}
    for name in names:
        yield from (path for path in sorted(run.paths.root.glob(name)) if path.name[0] not in "._")


def _named_inputs(run: Run, artifacts: list[Path]) -> Iterator[Path]:
    """The inputs of published artifacts, except those that the retention may delete."""
    kept = {final_checkpoint(run.recipe, stage) for stage in run.recipe.stages}
    for artifact in artifacts:
        with suppress(RunError):  # it has a finding of its own
            for name in manifest_of(artifact).inputs:
                node, path = node_at(name), run.paths.root / name
                if path.is_relative_to(run.paths.root) and (node is None or not node.row.is_pruned or node in kept):
                    yield path


def _finding(run: Run, path: Path, problem: str, remedy: Remedy | None) -> Finding:
    name = run.paths.relative(path)
    stage, step = stage_and_step(name)
    problem = problem.replace(f"{run.paths.root}/", "").removeprefix(f"{name}/").removeprefix(f"{name} ")
    return Finding(path=name, problem=problem, remedy=remedy or _remedy(run, name, step), stage=stage, step=step)


def _remedy(run: Run, name: str, step: int | None) -> Remedy:
    node = node_at(name)
    if node is None:
        return Remedy.RESUME if step is None else Remedy.OWNER
    is_past = _is_past(run, node)
    varies = node.row.by_model and not run.recipe.is_exact
    if varies and (node.name == ROLLOUTS.name if is_past else later_than(run, node)):
        return Remedy.REPLACE
    if not is_past:
        return Remedy.RESUME
    return Remedy.REPAIR if node.row.per == "step" and node.row.follows else Remedy.BACKUP


def _is_past(run: Run, node: Node) -> bool:
    """Whether the run no longer needs the artifact, for example because later ones exist."""
    if node.row.per == "label":
        return node.at not in evaluated_labels(run.recipe)
    if node.stage is None or node.row.per is None:
        return False
    if node.stage not in run.recipe.stages:
        return True
    if node.row.per == "shard":
        return is_published(run.paths.sft_dataset(node.stage))
    is_before = isinstance(node.at, int) and node.at < latest_checkpoint(run, node.stage)
    return is_before and node != final_checkpoint(run.recipe, node.stage)
