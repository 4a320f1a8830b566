"""The results of a sweep's cells, read from their runs. Unfinished cells have partial results."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

from kdrl_core.boxes.sharing import parts_of
from kdrl_core.config import Recipe
from kdrl_core.errors import KdrlError
from kdrl_core.ledger import Run, checkpoint_label, is_published, open_run, verify_published
from kdrl_core.look.reporting.run_summary import MODEL_NAMES, StageRow, is_spent, model_name, summarize
from kdrl_core.look.sweeps.claims import VALIDATION, JudgedOn, reference_labels
from kdrl_core.look.sweeps.fifths import Fifths, fifths_of
from kdrl_core.look.sweeps.state import CellState, CellStatus
from kdrl_core.tables.files import LOOKED_AT, load_metrics, read_table


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelScores:
    """One evaluated model: benchmark → problem → share of right samples, and mean length of the responses in tokens."""

    scores: dict[str, dict[str, float]]
    lengths: dict[str, dict[str, float]]

    def length_mean(self, judged_on: str) -> float:
        """Tokens: mean over the benchmarks' means over problems."""
        return fmean(fmean(self.lengths[name].values()) for name in benchmarks_of(self.lengths, judged_on))

    def accuracy(self, judged_on: str) -> float:
        """Mean over the benchmarks' means over problems."""
        return fmean(fmean(self.scores[name].values()) for name in benchmarks_of(self.scores, judged_on))


def benchmarks_of(names: Collection[str], judged_on: str) -> list[str]:
    """The benchmark that a sweep is judged on, if it is among the names. Otherwise those of `avg`: all but
    `validation`, or `validation` if there is no other."""
    if judged_on in names:
        return [judged_on]
    return [name for name in names if name != VALIDATION] or [*names]


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
    start_s: float = 0.0
    """Seconds of the last stage before its first step: of an SFT stage's teacher samples."""
    metrics: dict[str, Fifths] = field(default_factory=dict)
    """Every metric of the last stage, as its means over fifths of the steps."""


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
    judged: JudgedOn = field(default_factory=JudgedOn)

    @property
    def missing(self) -> list[CellStatus]:
        return [status for status in self.statuses if status.state is not CellState.FINISHED]


def read_results_of(
    name: str,
    description: str,
    recipe: str,
    statuses: Sequence[CellStatus],
    *,
    judged: JudgedOn | None = None,
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
        judged=judged or JudgedOn(),
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


def starts_of(results: SweepResults, variant: str) -> dict[int, ModelScores]:
    """Seed → the model that a variant's last stage started from, as it was evaluated as a model for reference."""
    if (recipe := results.recipes.get(variant)) is None:
        return {}
    label = ["base", *recipe.stages][-2]
    group = reference_groups(recipe)[MODEL_NAMES[label]]
    return {reference.seed: reference.model for reference in results.references if reference.group == group}


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
        start_s=_before_s(row),
        metrics=fifths_of(load_metrics(run, stage)),
    )


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
    keys = ["benchmark", "prompt_id"]
    means = table.group_by(keys, use_threads=False).aggregate([("accuracy_reward", "mean"), ("length", "mean")])
    model = ModelScores(scores={}, lengths={})
    for row in means.to_pylist():
        model.scores.setdefault(row["benchmark"], {})[row["prompt_id"]] = row["accuracy_reward_mean"]
        model.lengths.setdefault(row["benchmark"], {})[row["prompt_id"]] = row["length_mean"]
    return model
