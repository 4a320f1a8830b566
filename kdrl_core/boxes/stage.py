"""A stage: where it continues, how each of its steps ends, which checkpoints it keeps."""

import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from kdrl_core.alarms import Alarm, raised_at_last, to_metadata
from kdrl_core.boxes.make import Box, Product, box, make
from kdrl_core.errors import DamagedArtifactError, RunError
from kdrl_core.ledger import Manifest, Run, find_intact, find_own, is_published, replace_file, required_sha256, retract
from kdrl_core.ledger.graph import CHECKPOINT, ROLLOUTS, SAMPLE_ROLLOUTS
from kdrl_core.ledger.heal import ASIDE_PREFIX, forget, set_aside_of
from kdrl_core.tables import schemas
from kdrl_core.tables.files import append_metrics, load_metrics, rebuild_metrics
from kdrl_core.training.protocols import StepStats

if TYPE_CHECKING:
    from kdrl_core.boxes.session import StageSession

_ROUNDING = {"rel_tol": 1e-3, "abs_tol": 1e-5}
SEVERAL_TABLES = "READ-WITH-kdrl.open_run.txt"
"""Name of the file that keeps pandas and pyarrow from reading the folder of a stage's steps, or of one step, as if it
were one table: they read every file of a folder, fail at this one, and name it."""
_SEVERAL_TABLES = b"""A step has several tables, which have different columns: rollouts.parquet, rewards.parquet, ...

Read them joined:       import kdrl_core as kdrl; kdrl.open_run(RUN).rollouts()
Read one of them:       pandas.read_parquet(".../step=000012/rewards.parquet")
Read all of one kind:   duckdb.sql("from read_parquet('.../*/rewards.parquet', hive_partitioning = true)")

pandas.read_parquet and pyarrow of this folder fail because of this file. Without it they would give the rows of all
tables under the columns of the first. kdrl reads nothing here; you may delete it.
"""
_logger = logging.getLogger("kdrl")
_NAMES = CHECKPOINT.glob.rpartition("/")[2]


def open_stage(run: Run, stage: str) -> range:
    """Prepare a stage to continue. Returns its `remaining_steps`.

    A damaged checkpoint is set aside: the stage then continues from the one before, or from its initial policy, and
    replays the updates since from their published rollouts. Checkpoints beyond the retention, which an interrupted run
    may have left, are deleted. Metrics that differ from the steps' manifests are rebuilt.

    Raises:
        ForeignFileError: the latest checkpoint is whole, but not the one that the stage made.
        RunError: checkpoints are links out of the run.
    """
    _keep_tables_apart(run, stage)
    _refuse_links(run, run.paths.checkpoint(stage, 0).parent)
    for path in _folders(run, stage).values():
        if not is_published(path):
            find_intact(path)
    while (step := latest_checkpoint(run, stage)) and find_own(run, run.paths.checkpoint(stage, step)) is None:
        pass  # find_own has set it aside, so the one before is the latest now
    prune_checkpoints(run, stage)
    rebuild_metrics(run, stage, num_steps=step)
    return remaining_steps(run, stage)


def _keep_tables_apart(run: Run, stage: str) -> None:
    """Write SEVERAL_TABLES where the stage's steps or samples lie, and link it into the steps, unless it is there."""
    row = SAMPLE_ROLLOUTS if run.recipe.stage(stage).objective == "sft" else ROLLOUTS
    path = (run.paths.root / row.place(stage, 0)).parent.with_name(SEVERAL_TABLES)
    if not path.is_file():
        replace_file(path, _SEVERAL_TABLES)
    for step in run.paths.begun_steps(stage):
        _keep_files_apart(run, stage, step)


def _keep_files_apart(run: Run, stage: str, step: int) -> None:
    """Link SEVERAL_TABLES into the folder of a step, unless it is there, or cannot be linked on this file system."""
    folder = run.paths.step(stage, step)
    with suppress(OSError):
        (folder / SEVERAL_TABLES).hardlink_to(folder.with_name(SEVERAL_TABLES))


def checkpoint_steps(run: Run, stage: str) -> list[int]:
    """Steps of the published checkpoints of a stage, ascending."""
    return [step for step, path in _folders(run, stage).items() if is_published(path)]


def latest_checkpoint(run: Run, stage: str) -> int:
    """Number of updates behind the latest checkpoint; 0 is the stage's initial policy, which is not copied."""
    return max(checkpoint_steps(run, stage), default=0)


def remaining_steps(run: Run, stage: str) -> range:
    """The steps that a stage has left, from its latest checkpoint on.

    Steps whose files are already published are among them: their updates are replayed from these files.
    """
    return range(latest_checkpoint(run, stage), run.recipe.stage(stage).steps)


def is_checkpoint_due(run: Run, stage: str, step: int) -> bool:
    """Whether the policy after `step` updates is to be published."""
    config = run.recipe.stage(stage)
    due = step % config.checkpoint.every == 0 or step == config.steps
    return due or config.is_evaluation_due(step)


def prune_checkpoints(run: Run, stage: str) -> list[int]:
    """Delete checkpoints beyond the recipe's retention. The checkpoint of the last step is always kept and not counted.
    Returns the deleted steps. Raises RunError for checkpoints that are links out of the run."""
    config = run.recipe.stage(stage)
    _refuse_links(run, run.paths.checkpoint(stage, 0).parent)
    steps = checkpoint_steps(run, stage)
    keep = {*[step for step in steps if step != config.steps][-config.checkpoint.keep_last :], config.steps}
    if every := config.checkpoint.keep_every:
        keep |= {step for step in steps if step % every == 0}
    doomed = [step for step in steps if step not in keep]
    for step in doomed:
        retract(run.paths.checkpoint(stage, step))
    for step in _folders(run, stage, prefix=ASIDE_PREFIX):  # damaged ones that the stage has gone past
        if step not in keep and any(later > step for later in steps):
            forget(run.paths.checkpoint(stage, step))
    return doomed


def _folders(run: Run, stage: str, *, prefix: str = "") -> dict[int, Path]:
    """Step → path of its checkpoint, published or not; with `prefix`, of a checkpoint that was set aside."""
    found = {}
    for path in run.paths.checkpoint(stage, 0).parent.glob(f"{prefix}{_NAMES}"):
        node = CHECKPOINT.find(run.paths.relative(path.with_name(path.name.removeprefix(prefix))))
        if node is not None and isinstance(node.at, int):
            found[node.at] = path
    return dict(sorted(found.items()))


def _refuse_links(run: Run, folder: Path) -> None:
    """Raise RunError if checkpoints are links out of the run: deleting them would delete files of others."""
    root = run.paths.root.resolve()
    for path in (folder, *folder.glob(_NAMES)):
        if not path.resolve().is_relative_to(root):
            raise RunError(
                f"{path} leads out of the run, to {path.resolve()}; checkpoints are deleted there by the retention, so "
                "move them into the run, or link the whole artifacts folder (KDRL_ARTIFACTS)"
            )


# --- the end of a step ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSummary:
    """What the flow reports about a finished step."""

    step: int
    metrics: dict[str, float]
    timings: dict[str, float]
    checkpoint: Path | None
    """Of the policy after the step, if one is saved. It may be published with the next rollouts only."""
    replayed: bool
    alarms: tuple[Alarm, ...] = ()
    """Alarms that the step raised; empty for a replayed step, whose alarms were reported when it was made."""


@box(CHECKPOINT)
def checkpoint(session: "StageSession", at: int) -> Product:
    """Save the policy after `at` updates, with the state of its trainer. Of an adapter it is the adapter alone, unless
    the policy is evaluated or ends the stage: then it has the merged model as well."""
    trainer = session.idle_trainer_at(at)
    is_read = at == session.config.steps or session.config.is_evaluation_due(at)
    if session.run.recipe.student.lora is None or not is_read:
        return Product(content=trainer.save)
    return Product(content=lambda folder: {**trainer.save(folder), **trainer.export_hf(folder)})


def save(session: "StageSession", at: int) -> None:
    """Publish the checkpoint of `at` updates, and delete those that it pushes out of the retention."""
    make(session, checkpoint, at)
    prune_checkpoints(session.run, session.stage)


def end_step(session: "StageSession", update: Box, step: int) -> StepSummary:
    """Make a step's update, append its metrics to the stage's metrics, and save a checkpoint if one is due: beside the
    next rollouts if the trainer can, unless something else waits for it. Raises as the box `update` does."""
    run, stage = session.run, session.stage
    made = make(session, update, step)
    recorded = made.manifest.metadata
    append_metrics(run, stage, step)
    _keep_files_apart(run, stage, step)
    is_due = is_checkpoint_due(run, stage, step + 1) and not (made.reused and _is_past(session, step + 1))
    if is_due:
        session.save_later(partial(save, session, step + 1))
        if not session.trainer_saves_aside or _is_waited_for(session, step + 1):
            session.finish_saving()
    alarms = [] if made.reused else recorded["alarms"]
    return StepSummary(
        step=step,
        metrics=recorded["metrics"],
        timings=recorded["timings"],
        checkpoint=run.paths.checkpoint(stage, step + 1) if is_due else None,
        replayed=made.reused,
        alarms=tuple(Alarm(stage=stage, step=step, **alarm) for alarm in alarms),
    )


def _is_past(session: "StageSession", at: int) -> bool:
    """Whether a replay goes past a checkpoint that the retention has deleted, and that it cannot make with the same
    bytes again (`Recipe.is_exact`). What was made from it is there; the next checkpoint is a later one."""
    run, path = session.run, session.run.paths.checkpoint(session.stage, at)
    if run.recipe.is_exact or at == session.config.steps or is_published(path):
        return False
    is_damaged = any(left.exists() for left in set_aside_of(path))
    return not is_damaged and required_sha256(run, path) is not None


def _is_waited_for(session: "StageSession", at: int) -> bool:
    """Whether a checkpoint is needed before the next rollouts are sampled, or none are: it is evaluated, it ends the
    stage, the stage samples nothing, or the rollouts are there and were made from it."""
    config, path = session.config, session.run.paths.checkpoint(session.stage, at)
    is_last = at == config.steps or config.objective == "sft"
    return is_last or config.is_evaluation_due(at) or required_sha256(session.run, path) is not None


Told = Mapping[str, Mapping[str, Any]]
"""Row name → metadata of the manifest of the step's file."""


def timings(told: Told, update_s: float, tokens: int) -> dict[str, float]:
    """Seconds of a step by phase, and response tokens per second; `update_s` and `tokens` are the update's own."""
    rows = {
        "time/rollout_s": "rollouts",
        "time/teacher_score_s": "teacher",
        "time/reference_score_s": "reference",
        "time/verify_s": "rewards",
    }
    found = {name: float(told[row]["seconds"]) if row in told else 0.0 for name, row in rows.items()}
    found["time/verify_hidden_s"] = float(told["rewards"].get("hidden_seconds", 0.0))
    if scored := told.get("teacher"):
        found["time/teacher_score_hidden_s"] = float(scored.get("hidden_seconds", 0.0))
    found["time/update_s"] = update_s
    if sync := told["rollouts"].get("sync"):
        found["sync/seconds"] = float(sync["seconds"])
    sampling_s = found["time/rollout_s"]
    if resampled := told["rollouts"].get("resampling"):  # dropped groups were sampled as well, and all were judged
        tokens, sampling_s = resampled["num_tokens"], sampling_s - resampled["judged_s"]
    found["throughput/rollout_tokens_per_s"] = tokens / max(sampling_s, 1e-9)
    return found


def step_facts(
    session: "StageSession", step: int, metrics: Mapping[str, float], timings: Mapping[str, float]
) -> dict[str, Any]:
    """What an update's manifest records: metrics, timings, and the alarms that the recipe's rules raise for the step,
    from its own and earlier metrics. Memory is with the timings: like them, a replay does not reproduce it."""
    timings = {**timings, **{name: value for name, value in metrics.items() if name.startswith("memory/")}}
    metrics = {name: value for name, value in metrics.items() if name not in timings}
    before = [row for row in load_metrics(session.run, session.stage) if row["step"] < step]
    rows = [*before, {"step": step, **metrics}]
    raised = raised_at_last(rows, session.alarm_rules, stage=session.stage)
    return {"metrics": metrics, "timings": timings, "alarms": to_metadata(raised)}


def check_replay(run: Run, path: Path, published: Manifest, facts: Mapping[str, Any]) -> None:
    """Compare the metrics of a replayed update with the recorded ones. They are equal on the machine that made them. On
    another machine sums may be added in another order; then the log warns.

    Raises:
        DamagedArtifactError: on a CPU, where updates are reproducible, they differ by more than rounding.
    """
    metrics = facts["metrics"]
    recorded = published.metadata["metrics"]
    differing = [name for name, value in metrics.items() if not _same(value, recorded.get(name))]
    if not differing:
        return
    name = max(differing, key=lambda name: abs(metrics[name] - recorded.get(name, math.inf)))
    told = (
        f"{path}: its replay gives {name} {metrics[name]!r}, recorded is {recorded.get(name)!r} ({len(differing)} "
        "metrics differ)"
    )
    if run.recipe.runtime.device == "cpu" and not all(
        math.isclose(metrics[n], recorded.get(n, math.inf), **_ROUNDING) for n in differing
    ):
        raise DamagedArtifactError(
            f"{told}: the policy is not the one that the step was trained with, or these versions train otherwise",
            f"restore the run from a backup, or delete {path.parent} and the later steps to have them made anew",
        )
    _logger.warning("%s: this machine or these versions do not reproduce the run bit by bit", told)


def _same(value: float, recorded: float | None) -> bool:
    return recorded is not None and (value == recorded or (math.isnan(value) and math.isnan(recorded)))


def update_table(rows: pa.Table, stats: StepStats, **signals: Any) -> pa.Table:
    """UPDATE of a step that trained on these rows. Columns that are not given are null."""
    kind = pa.list_(pa.float32())
    columns = {field.name: pa.nulls(len(rows), field.type) for field in schemas.UPDATE} | signals
    columns |= {"prompt_id": rows["prompt_id"], "sample": rows["sample"], "logprobs": pa.array(stats.logprobs, kind)}
    if stats.entropies is not None:
        columns["entropies"] = pa.array(stats.entropies, kind)
    return pa.Table.from_pydict(columns, schema=schemas.UPDATE)
