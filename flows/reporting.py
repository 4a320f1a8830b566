"""The finished run → student, report: the deployment `kdrl-reporting/reporting`."""

from prefect import flow

from flows import hooks, shown
from flows.stage_flows import open_own_run
from flows.stopping import stoppable
from kdrl_core.ledger import run_lock
from tasks.boxes import export, report


@flow(name="kdrl-reporting", flow_run_name=hooks.flow_run_name, on_failure=[hooks.on_failure])
@stoppable
def reporting(run_dir: str) -> None:
    """Publish the finished student and the report."""
    run = open_own_run(run_dir)
    with run_lock(run.paths.lock):
        export(run_dir)
        report(run_dir)
        shown.reported(run)
