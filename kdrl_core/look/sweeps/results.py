"""The results of a sweep's cells, read from their runs. Unfinished cells have partial results."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import pyarrow as pa

from kdrl_core.boxes.sharing import parts_of
from kdrl_core.config import Recipe
from kdrl_core.errors import KdrlError
from kdrl_core.ledger import Run, checkpoint_label, is_published, open_run, verify_published
from kdrl_core.ledger.graph import reference_labels
from kdrl_core.look.reporting.run_summary import StageRow, is_spent, model_name, summarize
from kdrl_core.look.sweeps.spec import Claim
from kdrl_core.look.sweeps.state import CellState, CellStatus
from kdrl_core.tables.files import LOOKED_AT, load_metrics, read_table

_OF_SOME = {"response/repetition_overlong": "response/clip_ratio", "kd/kl_unmasked": "kd/active_frac"}
"""Metric that is a mean over some responses or tokens → metric with their share. If that is 0, the mean is void."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelScores:
    """One evaluated model: benchmark → problem → share of right samples; and its mean output."""

    scores: dict[str, dict[str, float]]
    length_mean: float
    """Tokens, mean over the responses to all benchmarks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """A periodic evaluation of the stage that is compared."""

    step: int
    seconds: float
    """Training time of the stage until then."""
    model: ModelScores


@dataclass(frozen=True, slots=True, kw_only=True)
class CellResult:
    """A cell whose last stage is evaluated."""

    variant: str
    seed: int
    run: str
    steps: int
    train_s: float
    """Of the last stage, without evaluations."""
    model: ModelScores
    watched: list[Watched] = field(default_factory=list)
    late: dict[str, float] = field(default_factory=dict)
    """Every metric's mean over the last fifth of the last stage's steps, without steps in which it is void."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceResult:
    """A reference model, which variants share: the student before, the student after an earlier stage, the teacher."""

    name: str
    group: str
    """Equal for all seeds of the same model."""
    first_variant: str
    seed: int
    model: ModelScores


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResults:
    """All results of a sweep."""

    name: str
    description: str
    recipe: str
    statuses: list[CellStatus]
    cells: list[CellResult]
    references: list[ReferenceResult]
    begun: dict[str, list[list[Watched]]] = field(default_factory=dict)
    """Variant → partial results of its unfinished cells."""
    recipes: dict[str, Recipe] = field(default_factory=dict)
    """Variant → recipe of its first cell as planned; also for variants that have not begun."""
    claims: list[Claim] = field(default_factory=list)

    @property
    def missing(self) -> list[CellStatus]:
        return [status for status in self.statuses if status.state is not CellState.FINISHED]


def read_results_of(
    name: str,
    description: str,
    recipe: str,
    statuses: Sequence[CellStatus],
    *,
    claims: Sequence[Claim] = (),
    recipes: Mapping[str, Recipe] | None = None,
) -> SweepResults:
    """Read the evaluations and timings of every cell that has them. `recipes`: variant → recipe of its first cell;
    default: those of the runs that have begun."""
    results = SweepResults(
        name=name,
        description=description,
        recipe=recipe,
        statuses=[],
        cells=[],
        references=[],
        claims=list(claims),
        recipes=dict(recipes or {}),
    )
    seen: set[tuple[str, int]] = set()
    for status in statuses:
        try:
            told = status if status.state is CellState.PENDING else _read(results, status, seen)
        except KdrlError as error:  # a cell that cannot be read is missing; its status says why
            damaged = status.state is CellState.FINISHED
            told = replace(status, state=CellState.FAILED, detail=str(error)) if damaged else status
        results.statuses.append(told)
    return results


def _read(results: SweepResults, status: CellStatus, seen: set[tuple[str, int]]) -> CellStatus:
    """Add the results of a cell that has begun. Returns its status, with its progress."""
    run = open_run(status.run)
    results.recipes.setdefault(status.variant, run.recipe)
    for reference in _references(run, status.variant):
        if (key := (reference.group, reference.seed)) not in seen:
            seen.add(key)
            results.references.append(reference)
    if status.state is CellState.FINISHED:
        results.cells.append(_cell(run, status))
        return status
    stage = run.recipe.stages[-1]
    watched = list(_watched(run, stage, before_s=_before_s(_row(run, stage))))
    results.begun.setdefault(status.variant, []).append(watched)
    return replace(status, detail="; ".join(filter(None, [_progress(run), status.detail])))


def _progress(run: Run) -> str:
    """`57 of 80 steps of stage2`; empty before the first step."""
    for stage in reversed(run.recipe.stages):
        if done := len(load_metrics(run, stage)):
            is_last = stage == run.recipe.stages[-1] and done == run.recipe.stage(stage).steps
            return f"{done} of {run.recipe.stage(stage).steps} steps of {stage}{', not evaluated' if is_last else ''}"
    return ""


def by_label(results: SweepResults) -> dict[str, tuple[dict[int, ModelScores], set[int]]]:
    """Reference models by the names that tables and claims give them: their results by seed, and the planned seeds.

    If variants have different models of one name, such as two teachers, the first variant's keeps the plain name; the
    others are called `teacher of VARIANT`. The names do not depend on which models have results already.
    """
    owners = _owners(results)
    models: dict[str, dict[int, ModelScores]] = {}
    for reference in results.references:
        models.setdefault(reference.group, {})[reference.seed] = reference.model
    found: dict[str, tuple[dict[int, ModelScores], set[int]]] = {}
    names: set[str] = set()
    for group, (name, variants) in owners.items():
        label = name if name not in names else f"{name} of {variants[0]}"
        names.add(name)
        if group in models:
            planned = {status.seed for status in results.statuses if status.variant in variants}
            found[label] = models[group], planned
    return found


def _owners(results: SweepResults) -> dict[str, tuple[str, list[str]]]:
    """Group → its model's name, and the variants that have it, in their order."""
    found: dict[str, tuple[str, list[str]]] = {}
    for variant, recipe in results.recipes.items():
        for name, group in reference_groups(recipe).items():
            found.setdefault(group, (name, []))[1].append(variant)
    for reference in results.references:
        found.setdefault(reference.group, (reference.name, [reference.first_variant]))
    return found


def reference_groups(recipe: Recipe) -> dict[str, str]:
    """Name of each reference model of a recipe → its group: equal for all recipes and seeds with the same model."""
    groups = {part.name: part.key for part in parts_of(recipe.model_copy(update={"seed": 0}))}
    return {model_name(label): groups[f"evaluation of {label}"] for label in reference_labels(recipe)}


def _cell(run: Run, status: CellStatus) -> CellResult:
    stage = run.recipe.stages[-1]
    row = _row(run, stage)
    assert row is not None  # it is finished
    return CellResult(
        variant=status.variant,
        seed=status.seed,
        run=run.name,
        steps=row.steps,
        train_s=row.seconds,
        model=_model(run.paths.evaluation(stage)),
        watched=list(_watched(run, stage, before_s=_before_s(row))),
        late=_late(load_metrics(run, stage)),
    )


def _late(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    last = rows[-max(1, len(rows) // 5) :]
    names = set.intersection(*(set(row) for row in last)) - {"step"} if last else set()
    found = {name: [row[name] for row in last if says_something(row, name)] for name in sorted(names)}
    return {name: fmean(values) for name, values in found.items() if values}


def says_something(row: Mapping[str, float], metric: str) -> bool:
    """Whether a step's metric is not void. The repetition rate of cut responses is void if none was cut."""
    return metric not in _OF_SOME or row.get(_OF_SOME[metric]) != 0.0


def _references(run: Run, variant: str) -> Iterator[ReferenceResult]:
    groups = reference_groups(run.recipe)
    for label in reference_labels(run.recipe):
        path, name = run.paths.evaluation(label), model_name(label)
        if is_published(path):
            yield ReferenceResult(
                name=name, group=groups[name], first_variant=variant, seed=run.recipe.seed, model=_model(path)
            )


def _row(run: Run, stage: str) -> StageRow | None:
    """None before the first step."""
    return next((row for row in summarize(run).stages if row.stage == stage), None)


def _before_s(row: StageRow | None) -> float:
    """Seconds that an SFT stage spent on sampling its teacher, before its first step."""
    return 0.0 if row is None or row.samples is None else row.samples["sample_s"] + row.samples["verify_s"]


def _watched(run: Run, stage: str, *, before_s: float) -> Iterator[Watched]:
    seconds = before_s
    for row in load_metrics(run, stage):
        seconds += sum(value for name, value in row.items() if is_spent(name))
        step = int(row["step"]) + 1
        path = run.paths.evaluation(checkpoint_label(stage, step))
        if is_published(path):
            yield Watched(step=step, seconds=seconds, model=_model(path))


def _model(path: Path) -> ModelScores:
    verify_published(path)
    table = read_table(
        path / "responses.parquet", ["benchmark", "prompt_id", "accuracy_reward", "length"], most_bytes=LOOKED_AT
    )
    means = table.group_by(["benchmark", "prompt_id"], use_threads=False).aggregate([("accuracy_reward", "mean")])
    scores: dict[str, dict[str, float]] = {}
    for row in means.to_pylist():
        scores.setdefault(row["benchmark"], {})[row["prompt_id"]] = row["accuracy_reward_mean"]
    lengths: pa.ChunkedArray = table["length"]
    return ModelScores(scores=scores, length_mean=float(lengths.to_numpy().mean()))
