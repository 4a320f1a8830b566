"""A model ─▶ evaluate ─▶ evaluation/<label>/."""

from typing import Any

from prefect import task

from kdrl_core.boxes.evaluate import evaluate_model
from kdrl_core.ledger import open_run_dir
from tasks.options import STEP_OPTIONS


@task(name="evaluate", task_run_name="evaluate-{label}", **STEP_OPTIONS)
def evaluate(run_dir: str, label: str, benchmarks: list[str] | None = None) -> dict[str, Any]:
    """Evaluate `base`, `teacher`, a stage's result or a checkpoint. Returns its results."""
    return evaluate_model(open_run_dir(run_dir), label, benchmarks)
