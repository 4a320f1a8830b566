"""A run's state, and the run in numbers: accuracy of every model, start and end of each stage, paths of its files.

`tables_of` gives the numbers as tables of text, for Markdown, HTML and the terminal. All is read from the ledger.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow.compute as pc

from kdrl_core.alarms import Alarm, alarms_of, resume_command, stopping_alarm
from kdrl_core.boxes.completion import is_finished
from kdrl_core.boxes.shards import num_shards, remaining_shards
from kdrl_core.boxes.stage import checkpoint_steps
from kdrl_core.data import FilterReport
from kdrl_core.errors import KdrlError, visible
from kdrl_core.evaluation.results import read_results
from kdrl_core.ledger import Run, adopted, artifacts_root, is_published, lock_holder, manifest_of, open_run
from kdrl_core.ledger.graph import evaluated_labels
from kdrl_core.ledger.lock import last_error
from kdrl_core.tables.files import LOOKED_AT, load_metrics, read_table

MODEL_NAMES = {"base": "student before", "stage1": "after stage 1", "stage2": "after stage 2", "teacher": "teacher"}
_ENDS_SHARE = 0.2
"""Start and end of a stage are means over this share of its steps (at least one)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """One evaluated model: benchmark → accuracy, low, high in [0, 1]."""

    label: str
    name: str
    benchmarks: dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRow:
    """One stage: metric → (start, end)."""

    stage: str
    objective: str
    steps: int
    planned_steps: int
    seconds: float
    metrics: dict[str, tuple[float, float]]
    samples: dict[str, float] | None = None
    """Of SFT: `sampled`, `kept`, `problems`, `problems_covered`, seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """The results of a run so far."""

    run: str
    recipe: str
    models: list[ModelRow] = field(default_factory=list)
    stages: list[StageRow] = field(default_factory=list)
    alarms: list[Alarm] = field(default_factory=list)
    paths: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(run: Run) -> RunSummary:
    models = []
    for label in evaluated_labels(run.recipe):
        if is_published(path := run.paths.evaluation(label)):
            results = read_results(path)["benchmarks"]
            models.append(ModelRow(label=label, name=_model_name(run, label), benchmarks=results))
    stages = [row for stage in run.recipe.stages if (row := _stage_row(run, stage)) is not None]
    paths = {"run": run.paths.root, "student": run.paths.student, "report": run.paths.report / "report.html"}
    return RunSummary(
        run=run.name,
        recipe=run.recipe.name,
        models=models,
        stages=stages,
        alarms=alarms_of(run),
        paths={name: str(path) for name, path in paths.items() if path.exists()},
    )


def _model_name(run: Run, label: str) -> str:
    if label in run.recipe.stages:
        objective = run.recipe.stage(label).objective.upper().replace("_", "-")
        return f"{model_name(label)} ({objective})"
    return model_name(label)


def model_name(label: str) -> str:
    """How tables call an evaluated model. Models that a recipe names for comparison have their names there."""
    return MODEL_NAMES.get(label, label)


def _stage_row(run: Run, stage: str) -> StageRow | None:
    rows = load_metrics(run, stage)
    if not rows:
        return None
    ends = max(1, round(_ENDS_SHARE * len(rows)))
    names = ["reward/mean", "response/length_mean", "response/clip_ratio", "entropy", "kd/kl_unmasked", "loss/sft"]
    known = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    config = run.recipe.stage(stage)
    dataset = run.paths.sft_dataset(stage)
    samples = manifest_of(dataset).metadata if config.objective == "sft" and is_published(dataset) else None
    seconds = sum(map(seconds_of, rows))
    return StageRow(
        stage=stage,
        objective=config.objective,
        steps=len(rows),
        planned_steps=config.steps,
        seconds=seconds + (samples["sample_s"] + samples["verify_s"] if samples else 0.0),
        samples=samples,
        metrics={name: (_mean(found[:ends]), _mean(found[-ends:])) for name, found in known.items() if found},
    )


def sample_responses(run: Run, count: int) -> list[dict[str, Any]]:
    """Rows of EVALUATION of the finished student: `count` right ones, then as many wrong ones, each of another problem,
    from the shortest response to the longest."""
    path = run.paths.evaluation(run.recipe.stages[-1])
    if not is_published(path):
        return []
    table = read_table(path / "responses.parquet", most_bytes=LOOKED_AT)
    found = []
    for right in (1.0, 0.0):
        rows = table.filter(pc.equal(table["accuracy_reward"], right)).to_pylist()
        problems = {row["question"]: row for row in reversed(rows)}.values()  # the first response to each
        ordered = sorted(problems, key=lambda row: (row["length"], row["question"]))
        most = min(count, len(ordered))
        found += [ordered[round(place * (len(ordered) - 1) / max(1, most - 1))] for place in range(most)]
    return found


def seconds_of(row: dict[str, Any]) -> float:
    """Seconds of a step, from its row of metrics and timings."""
    return float(sum(value for name, value in row.items() if is_spent(name)))


def is_spent(name: str) -> bool:
    """Whether a timing is part of the step's time, and not hidden behind other work."""
    return name.startswith("time/") and not name.endswith("_hidden_s")


def _mean(values: list[float]) -> float:
    return float(sum(values) / len(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Header and rows; the first `num_text` columns are text, the others numbers."""

    title: str
    header: list[str]
    rows: list[list[str]]
    num_text: int = 1

    def to_markdown(self) -> str:
        """GitHub-flavoured Markdown, without the title."""
        lines = [self.header, [*["---"] * self.num_text, *["---:"] * (len(self.header) - self.num_text)], *self.rows]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def accuracy_table(summary: RunSummary) -> Table:
    """Accuracy in % with the 95 % interval, one model a row, one benchmark a column."""
    benchmarks = list(dict.fromkeys(name for model in summary.models for name in model.benchmarks))
    rows = [[model.name, *(_interval(model.benchmarks.get(name)) for name in benchmarks)] for model in summary.models]
    return Table(title="Accuracy, % (95 % interval)", header=["model", *benchmarks], rows=rows)


def phase_table(summary: RunSummary) -> Table:
    """Reward, length, clip ratio and KL at the start and the end of each stage."""
    header = ["stage", "steps", "reward", "length", "clip ratio", "teacher KL", "s"]
    rows = []
    for stage in summary.stages:
        columns = {"reward/mean": 2, "response/length_mean": 0, "response/clip_ratio": 2, "kd/kl_unmasked": 2}
        cells = [_change(stage.metrics.get(name), digits) for name, digits in columns.items()]
        rows.append(
            [
                f"{stage.stage} {stage.objective}",
                f"{stage.steps}/{stage.planned_steps}",
                *cells,
                f"{stage.seconds:.0f}",
            ]
        )
    return Table(title="Training: means of the first → last fifth of the steps", header=header, rows=rows)


def sft_table(summary: RunSummary) -> Table:
    """What rejection sampling kept (B.2) and the likelihood loss (14); no rows without an SFT stage."""
    rows = []
    for stage in summary.stages:
        if stage.samples is None:
            continue
        kept, sampled, covered, problems = (
            int(stage.samples[name]) for name in ("kept", "sampled", "problems_covered", "problems")
        )
        rows.append(
            [
                stage.stage,
                f"{kept:,} of {sampled:,} ({100 * kept / sampled:.0f} %)",
                f"{covered:,} of {problems:,}",
                _change(stage.metrics.get("loss/sft"), 4),
            ]
        )
    return Table(title="SFT by rejection sampling", header=["stage", "samples kept", "problems", "loss"], rows=rows)


def filter_table(report: FilterReport) -> Table:
    """What each rule of a stage's filter dropped and left."""
    rows = [[one.rule, one.description, f"{one.dropped:,}", f"{left:,}"] for one, left in report.lines()]
    ends = (["problems read", "", "", f"{report.rows_in:,}"], ["kept", "", "", f"{report.rows_out:,}"])
    header = ["rule", "what it drops", "dropped", "left"]
    return Table(title=f"Data filter of {report.stage}", header=header, rows=[ends[0], *rows, ends[1]], num_text=2)


def tables_of(summary: RunSummary) -> list[Table]:
    """The tables that have rows, in the order in which they are shown."""
    return [table for table in (accuracy_table(summary), phase_table(summary), sft_table(summary)) if table.rows]


def _interval(result: dict[str, float] | None) -> str:
    if result is None:
        return "–"
    return f"{100 * result['accuracy']:.1f} ({100 * result['low']:.1f}–{100 * result['high']:.1f})"


def _change(ends: tuple[float, float] | None, digits: int) -> str:
    return "–" if ends is None else f"{ends[0]:.{digits}f} → {ends[1]:.{digits}f}"


def named_status(name: str) -> dict[str, Any]:
    """`run_status` of a run by name. If the run cannot be read, its state says why: it must not hide the others."""
    try:
        return run_status(open_run(name))
    except KdrlError as error:
        fault = str(error)
    except Exception as error:  # a damaged or foreign file can make its reader fail in any way
        fault = f"{type(error).__name__}: {visible(' '.join(str(error).split()))}"
    return {"run": name, "state": f"unusable: {fault}", "path": str(artifacts_root() / "runs" / name)}


def run_status(run: Run) -> dict[str, Any]:
    """Plain values: run, recipe, state, progress, reward, alarms, started, steps by stage, parts from other runs."""
    holder = lock_holder(run.paths.lock)
    rows = {stage: load_metrics(run, stage) for stage in run.recipe.stages}
    steps = {stage: found[-1]["step"] + 1 if found else 0 for stage, found in rows.items()}
    last = next((rows[stage][-1] for stage in reversed(run.recipe.stages) if rows[stage]), {})
    if is_finished(run):
        state = "finished"
    elif holder is not None:
        state = f"running ({holder})"
    else:
        alarm = stopping_alarm(run)
        state = f"stopped{f' by {alarm.rule}' if alarm else ''}; {resume_command(run)}"
    return {
        "run": run.name,
        "recipe": run.recipe.name,
        "state": state,
        "progress": ", ".join(_stage_progress(run, stage, done) for stage, done in steps.items()),
        "reward": last.get("reward/mean"),
        "alarms": [asdict(alarm) for alarm in alarms_of(run)],
        "started": run.started_at,
        "last_error": None if state == "finished" or holder else last_error(run.paths.root),
        "steps": steps,
        "checkpoints": {stage: checkpoint_steps(run, stage) for stage in run.recipe.stages},
        "adopted": {one["what"]: one["run"] for one in adopted(run)},
        "path": str(run.paths.root),
    }


def _stage_progress(run: Run, stage: str, done: int) -> str:
    """`stage2 12/80`; `stage2 samples 3/12` while an SFT stage is still sampling."""
    config = run.recipe.stage(stage)
    if config.objective == "sft" and not done and is_published(run.paths.pool):
        total, left = num_shards(run, stage), len(remaining_shards(run, stage))
        if 0 < left < total:
            return f"{stage} samples {total - left}/{total}"
    return f"{stage} {done}/{config.steps}"
