"""The state of a run, read from its files."""

from dataclasses import asdict
from typing import Any

from kdrl_core.alarms import alarms_of, resume_command, stopping_alarm
from kdrl_core.boxes.checkpoints import checkpoint_steps
from kdrl_core.boxes.completion import is_finished
from kdrl_core.boxes.shards import num_shards, remaining_shards
from kdrl_core.errors import KdrlError
from kdrl_core.ledger import Run, adopted, is_published, lock_holder, open_run
from kdrl_core.tables.metrics import load_metrics


def named_status(name: str) -> dict[str, Any]:
    """`run_status` of a run by name. If the run cannot be opened, its state says why."""
    try:
        return run_status(open_run(name))
    except KdrlError as error:
        return {"run": name, "state": f"unusable: {error}"}


def run_status(run: Run) -> dict[str, Any]:
    """Plain values: run, recipe, state, progress, reward, alarms, started, steps by stage, parts from other runs."""
    holder = lock_holder(run.paths.lock)
    rows = {stage: load_metrics(run, stage) for stage in run.recipe.stages}
    steps = {stage: found[-1]["step"] + 1 if found else 0 for stage, found in rows.items()}
    last = next((rows[stage][-1] for stage in reversed(run.recipe.stages) if rows[stage]), {})
    reward = last.get("reward/mean")
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
        "reward": None if reward is None else round(reward, 3),
        "alarms": [asdict(alarm) for alarm in alarms_of(run)],
        "started": run.started_at,
        "steps": steps,
        "checkpoints": {stage: checkpoint_steps(run, stage) for stage in run.recipe.stages},
        "adopted": {one["what"]: one["run"] for one in adopted(run)},
        "path": str(run.paths.root),
    }


def _stage_progress(run: Run, stage: str, done: int) -> str:
    """`stage2 12/80`, or of an SFT stage that is still sampling `stage2 samples 3/12`."""
    config = run.recipe.stage(stage)
    if config.objective == "sft" and not done and is_published(run.paths.pool):
        total, left = num_shards(run, stage), len(remaining_shards(run, stage))
        if 0 < left < total:
            return f"{stage} samples {total - left}/{total}"
    return f"{stage} {done}/{config.steps}"
