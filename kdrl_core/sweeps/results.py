"""What the cells of a sweep have come to, read from their runs: finished cells, and others as far as they are."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import pyarrow as pa

from kdrl_core.errors import KdrlError
from kdrl_core.ledger import Run, checkpoint_label, is_published, open_run, verify_published
from kdrl_core.reporting.summary import MODEL_NAMES, StageRow, final_labels, is_spent, summarize
from kdrl_core.rollouts.metrics import load_metrics
from kdrl_core.rollouts.schema import read_table
from kdrl_core.sweeps.sharing import parts_of
from kdrl_core.sweeps.spec import Claim
from kdrl_core.sweeps.state import CellState, CellStatus

_OF_CUT = "response/repetition_overlong"
"""Of responses that were cut: 0 in steps that cut none, which says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelScores:
    """One evaluated model: benchmark → problem → share of right samples; and its mean output."""

    scores: dict[str, dict[str, float]]
    length_mean: float
    """Over the responses to all benchmarks, tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """A periodic evaluation of the stage that is compared."""

    step: int
    seconds: float
    """That the stage had trained until then."""
    model: ModelScores


@dataclass(frozen=True, slots=True, kw_only=True)
class CellResult:
    """A cell whose last stage is evaluated."""

    variant: str
    seed: int
    run: str
    steps: int
    train_s: float
    """Of the last stage, evaluations left out."""
    model: ModelScores
    watched: list[Watched] = field(default_factory=list)
    late: dict[str, float] = field(default_factory=dict)
    """Every metric's mean over the last fifth of the last stage's steps; of cut responses, over steps that cut some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceResult:
    """A model that variants have in common: the student before, after an earlier stage, the teacher."""

    name: str
    group: str
    """Equal for all seeds of the same model."""
    first_variant: str
    seed: int
    model: ModelScores


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResults:
    """All of a sweep."""

    name: str
    description: str
    recipe: str
    statuses: list[CellStatus]
    cells: list[CellResult]
    references: list[ReferenceResult]
    claims: list[Claim] = field(default_factory=list)

    @property
    def missing(self) -> list[CellStatus]:
        """Cells that are not finished."""
        return [status for status in self.statuses if status.state is not CellState.FINISHED]


def read_results_of(
    name: str, description: str, recipe: str, statuses: Sequence[CellStatus], claims: Sequence[Claim] = ()
) -> SweepResults:
    """Read the evaluations and timings of every cell that has them."""
    cells: list[CellResult] = []
    references: dict[tuple[str, int], ReferenceResult] = {}
    found: list[CellStatus] = []
    for status in statuses:
        try:
            if status.state is not CellState.PENDING:
                run = open_run(status.run)
                for reference in _references(run, status.variant):
                    references.setdefault((reference.group, reference.seed), reference)
                if status.state is CellState.FINISHED:
                    cells.append(_cell(run, status))
        except KdrlError as error:  # what cannot be read is missing, and its status says why
            damaged = status.state is CellState.FINISHED
            found.append(replace(status, state=CellState.FAILED, detail=str(error)) if damaged else status)
        else:
            found.append(status)
    return SweepResults(
        name=name,
        description=description,
        recipe=recipe,
        statuses=found,
        cells=cells,
        references=list(references.values()),
        claims=list(claims),
    )


def by_label(references: Iterable[ReferenceResult]) -> dict[str, list[ReferenceResult]]:
    """Models for reference under the names that tables and claims give them.

    Where variants differ in one, as in a teacher, the first has its plain name, and the others `teacher of VARIANT`.
    """
    groups: dict[str, list[ReferenceResult]] = {}
    for reference in references:
        groups.setdefault(reference.group, []).append(reference)
    found: dict[str, list[ReferenceResult]] = {}
    for group in groups.values():
        name = group[0].name
        found[name if name not in found else f"{name} of {group[0].first_variant}"] = group
    return found


def _cell(run: Run, status: CellStatus) -> CellResult:
    stage = run.recipe.stages[-1]
    row = next(row for row in summarize(run).stages if row.stage == stage)
    return CellResult(
        variant=status.variant,
        seed=status.seed,
        run=run.name,
        steps=row.steps,
        train_s=row.seconds,
        model=_model(run.paths.evaluation(stage)),
        watched=list(_watched(run, stage, before_s=_sampling_s(row))),
        late=_late(load_metrics(run, stage)),
    )


def _late(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    last = rows[-max(1, len(rows) // 5) :]
    names = set.intersection(*(set(row) for row in last)) - {"step"} if last else set()
    found = {
        name: [row[name] for row in last if name != _OF_CUT or row["response/clip_ratio"] > 0.0]
        for name in sorted(names)
    }
    return {name: fmean(values) for name, values in found.items() if values}


def _references(run: Run, variant: str) -> Iterator[ReferenceResult]:
    recipe = run.recipe
    groups = {part.name: part.key for part in parts_of(recipe.model_copy(update={"seed": 0}))}
    for label in final_labels(run):
        path = run.paths.evaluation(label)
        if label != recipe.stages[-1] and is_published(path):
            yield ReferenceResult(
                name=MODEL_NAMES[label],
                group=groups[f"evaluation of {label}"],
                first_variant=variant,
                seed=recipe.seed,
                model=_model(path),
            )


def _sampling_s(row: StageRow) -> float:
    """What an SFT stage spent before its first step."""
    return 0.0 if row.samples is None else row.samples["sample_s"] + row.samples["verify_s"]


def _watched(run: Run, stage: str, *, before_s: float) -> Iterator[Watched]:
    seconds = _cumulative(load_metrics(run, stage), before_s)
    for step in sorted(seconds):
        path = run.paths.evaluation(checkpoint_label(stage, step))
        if is_published(path):
            yield Watched(step=step, seconds=seconds[step], model=_model(path))


def _cumulative(rows: Iterable[Mapping[str, float]], total: float) -> dict[int, float]:
    """Updates → seconds of all steps until then."""
    found = {}
    for row in rows:
        total += sum(value for name, value in row.items() if is_spent(name))
        found[int(row["step"]) + 1] = total
    return found


def _model(path: Path) -> ModelScores:
    verify_published(path)
    table = read_table(path / "responses.parquet").select(["benchmark", "prompt_id", "accuracy_reward", "length"])
    means = table.group_by(["benchmark", "prompt_id"], use_threads=False).aggregate([("accuracy_reward", "mean")])
    scores: dict[str, dict[str, float]] = {}
    for row in means.to_pylist():
        scores.setdefault(row["benchmark"], {})[row["prompt_id"]] = row["accuracy_reward_mean"]
    lengths: pa.ChunkedArray = table["length"]
    return ModelScores(scores=scores, length_mean=float(lengths.to_numpy().mean()))
