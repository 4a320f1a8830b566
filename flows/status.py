"""Where a run stands, read from its files."""

from typing import Any

from kdrl_core.errors import KdrlError
from kdrl_core.ledger import Run, lock_holder, open_run
from kdrl_core.rollouts.metrics import load_metrics
from kdrl_core.steps.checkpoints import checkpoint_steps
from kdrl_core.steps.completion import is_finished


def named_status(name: str) -> dict[str, Any]:
    """`run_status` of a run by name, as a row of a list: one that cannot be opened says why and hides no other."""
    try:
        return run_status(open_run(name))
    except KdrlError as error:
        return {"run": name, "state": f"unusable: {error}"}


def run_status(run: Run) -> dict[str, Any]:
    """Plain values: run, recipe, state, progress, reward, started, steps by stage."""
    holder = lock_holder(run.paths.lock)
    steps = {stage: len(load_metrics(run, stage)) for stage in run.recipe.stages}
    last = next((load_metrics(run, stage)[-1] for stage in reversed(run.recipe.stages) if steps[stage]), None)
    if is_finished(run):
        state = "finished"
    elif holder is not None:
        state = f"running ({holder})"
    else:
        state = f"stopped; kdrl resume {run.name}"
    return {
        "run": run.name,
        "recipe": run.recipe.name,
        "state": state,
        "progress": ", ".join(f"{stage} {steps[stage]}/{run.recipe.stage(stage).steps}" for stage in steps),
        "reward": None if last is None else round(last["reward/mean"], 3),
        "started": run.started_at,
        "steps": steps,
        "checkpoints": {stage: checkpoint_steps(run, stage) for stage in run.recipe.stages},
        "path": str(run.paths.root),
    }
