"""Looks through all that a run has published: which bytes, manifests or steps are not as they were.

A resumed run checks what it goes on from; this checks the rest as well, such as the rollouts of steps long past. Loads
no model library. Repairing, which does, is `repair_run`.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from kdrl_core.errors import DamagedArtifactError, RunError
from kdrl_core.ledger import Run, is_published, manifest_of, run_lock, verify_published
from kdrl_core.ledger.manifest import DIRECTORY_MANIFEST, Manifest
from kdrl_core.reporting.summary import final_labels
from kdrl_core.rollouts.metrics import differing_metrics
from kdrl_core.steps.checkpoints import latest_checkpoint

OnChecked = Callable[[int, int], None]
"""Called with how many artifacts have been compared, and of how many."""


class Remedy(StrEnum):
    """What makes a damaged artifact whole again."""

    RESUME = "kdrl resume"
    """The run goes on from it, and makes it again."""
    REPAIR = "kdrl check --repair"
    """Verdicts and scores of a step long past: made again from its rollouts."""
    BACKUP = "a backup"
    """What is kept of the past, such as the rollouts of a step whose policy is gone. The run goes on without it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One artifact that is not as it was published."""

    path: str
    """Relative to the run."""
    problem: str
    remedy: Remedy
    stage: str | None = None
    step: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What was looked through and found."""

    num_artifacts: int
    num_bytes: int
    findings: list[Finding]


def check_run(run: Run, *, on_checked: OnChecked | None = None) -> CheckReport:
    """Compare every artifact of a run with its manifest, every manifest with those of its inputs, and every step with
    the files that it has to have. Reads only."""
    artifacts = list(_artifacts(run.paths.root))
    findings: dict[str, Finding] = {}
    num_bytes = 0

    def found(path: Path, problem: str) -> None:
        finding = _finding(run, path, problem)
        findings.setdefault(finding.path, finding)

    for number, path in enumerate(artifacts, start=1):
        try:
            manifest = verify_published(path)
        except DamagedArtifactError as error:
            found(path, _problem(run, error))
        except RunError:  # deleted since, as checkpoints are
            pass
        else:
            num_bytes += manifest.size
            if foreign := _foreign_input(run, path, manifest):
                found(path, f"is of another step: it was made from {foreign}")
            for name in _changed_inputs(run, manifest):
                found(path, f"made from another {name} than is there now")
        if on_checked is not None:
            on_checked(number, len(artifacts))
    for path in (*_required(run), *_folders(run)):
        if not is_published(path):
            found(path, "has no manifest" if path.exists() else "is missing")
    for stage in run.recipe.stages:
        for path in differing_metrics(run, stage):
            found(path, "does not hold what the steps' manifests say")
    return CheckReport(num_artifacts=len(artifacts), num_bytes=num_bytes, findings=list(findings.values()))


def repair_run(run: Run, report: CheckReport) -> list[str]:
    """Make again what `Remedy.REPAIR` applies to; returns the paths. What comes out otherwise than it was is refused.

    Raises:
        RunLockedError: another process works on the run.
        DamagedArtifactError: the rollouts are damaged as well, or an artifact came out otherwise.
    """
    from kdrl_core.steps.score import score_step
    from kdrl_core.steps.session import close_sessions, stage_session
    from kdrl_core.steps.verify import verify_step

    repaired = []
    with run_lock(run.paths.lock):
        for finding in report.findings:
            if finding.remedy is not Remedy.REPAIR or finding.stage is None or finding.step is None:
                continue
            session = stage_session(run.paths.root, finding.stage)
            if finding.path.endswith("/rewards.parquet"):
                verify_step(session, finding.step)
            else:
                score_step(session, finding.step)
            repaired.append(finding.path)
        close_sessions()
    return repaired


def _artifacts(root: Path) -> Iterator[Path]:
    """Every artifact that has a manifest, or had: of files and of directories."""
    for where in sorted(root.rglob("*manifest.json")):
        inside = where.relative_to(root).parts
        if len(inside) == 1 or any(part.startswith(".") for part in inside):
            continue  # the run's own, or what is not published
        if where.name == DIRECTORY_MANIFEST:
            yield where.parent
        elif where.name.startswith("_"):
            stem = where.name.removeprefix("_").removesuffix(".manifest.json")
            suffix = ".json" if where.parent == root / "data" and stem == "filter" else ".parquet"
            yield where.with_name(stem + suffix)


def _required(run: Run) -> Iterator[Path]:
    """The files that every step has to have which is behind a checkpoint or has an update."""
    paths = run.paths
    for stage in run.recipe.stages:
        config = run.recipe.stage(stage)
        steps = latest_checkpoint(run, stage)
        while is_published(paths.update(stage, steps)):
            steps += 1
        if steps:
            yield from (paths.pool, paths.filter_report)
        for step in range(steps):
            yield paths.update(stage, step)
            if config.objective == "sft":
                continue
            yield from (paths.rollouts(stage, step), paths.rewards(stage, step))
            if config.scores_teacher:
                yield paths.teacher(stage, step)
            if config.ref_beta > 0.0:
                yield paths.reference(stage, step)
        if steps and config.objective == "sft":
            yield paths.sft_dataset(stage)


def _folders(run: Run) -> Iterator[Path]:
    """The folders that have to be published as a whole, if they are there."""
    paths = run.paths
    yield from sorted(paths.root.glob("checkpoints/*/step-*"))
    yield from sorted(paths.root.glob("evaluation/[!.]*"))
    yield from (path for path in (paths.student, paths.report) if path.exists())


def _foreign_input(run: Run, path: Path, manifest: Manifest) -> str | None:
    """Of an artifact in a step's folder that is made from that step's files: an input that is of another step."""
    folder = run.relative(path.parent)
    if "/step=" not in folder or path.stem == "rollouts":
        return None
    of_steps = (name for name in manifest.inputs if "/step=" in name)
    return next((name for name in of_steps if not name.startswith(f"{folder}/")), None)


def _changed_inputs(run: Run, manifest: Manifest) -> Iterator[str]:
    """Inputs that are still there, whole, and are not those that the artifact was made from."""
    for name, sha256 in manifest.inputs.items():
        path = run.paths.root / name
        with suppress(DamagedArtifactError):  # named on its own account
            if not Path(name).is_absolute() and is_published(path) and manifest_of(path).sha256 != sha256:
                yield name


def _finding(run: Run, path: Path, problem: str) -> Finding:
    name = run.relative(path)
    stage, step = _stage_and_step(name)
    problem = problem.removeprefix(f"{name}/").removeprefix(f"{name} ")
    return Finding(path=name, problem=problem, remedy=_remedy(run, path, stage, step), stage=stage, step=step)


def _stage_and_step(name: str) -> tuple[str | None, int | None]:
    parts = dict(part.split("=", 1) for part in name.split("/") if "=" in part)
    return parts.get("stage"), int(parts["step"]) if "step" in parts else None


def _remedy(run: Run, path: Path, stage: str | None, step: int | None) -> Remedy:
    if stage is not None and step is not None:
        if step >= latest_checkpoint(run, stage):
            return Remedy.RESUME
        return Remedy.BACKUP if path.stem in ("rollouts", "update") else Remedy.REPAIR
    kind, name = path.relative_to(run.paths.root).parts[:2] if path.parent != run.paths.root else (path.name, "")
    of_the_past = {
        "checkpoints": path != run.paths.checkpoint(name, latest_checkpoint(run, name)),
        "evaluation": name not in final_labels(run),
        "samples": path.name != "dataset.parquet" and is_published(path.parent.parent / "dataset.parquet"),
    }
    return Remedy.BACKUP if of_the_past.get(kind, False) else Remedy.RESUME


def _problem(run: Run, error: DamagedArtifactError) -> str:
    """What is wrong, without the remedy and the run's folder, which the finding names on its own."""
    return str(error).partition(";")[0].replace(f"{run.paths.root}/", "")
