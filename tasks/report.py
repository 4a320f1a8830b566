"""The finished run ─▶ student/ and report/."""

from prefect import task

from kdrl_core.boxes.finish import export_student
from kdrl_core.ledger import open_run_dir
from kdrl_core.look.reporting.run_report import publish_report
from tasks.options import STEP_OPTIONS


@task(name="export-student", task_run_name="export-student", **STEP_OPTIONS)
def export(run_dir: str) -> str:
    """Publish the finished student as an ordinary model directory. Returns its path."""
    return str(export_student(open_run_dir(run_dir)))


@task(name="report", task_run_name="report", **STEP_OPTIONS)
def report(run_dir: str) -> str:
    """Publish the report. Returns its folder."""
    return str(publish_report(open_run_dir(run_dir)))
