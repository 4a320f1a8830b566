"""problems ─▶ filter ─▶ data/pool.parquet, data/filter.json."""

from prefect import task

from kdrl_core.boxes.filter import filter_run
from kdrl_core.ledger import open_run_dir
from tasks.options import STEP_OPTIONS


@task(name="filter", task_run_name="filter", **STEP_OPTIONS)
def filter_problems(run_dir: str) -> dict[str, str]:
    """Filter the problems of every stage. Returns the filter's table per stage."""
    return {stage: report.to_text() for stage, report in filter_run(open_run_dir(run_dir)).items()}
