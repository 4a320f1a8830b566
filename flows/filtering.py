"""problems → pool: the deployment `kdrl-filtering/filtering`."""

from prefect import flow

from flows import hooks, shown
from flows.stage_flows import open_own_run
from flows.stopping import stoppable
from kdrl_core.ledger import run_lock
from tasks.boxes import filter_problems


@flow(name="kdrl-filtering", flow_run_name=hooks.flow_run_name, on_failure=[hooks.on_failure])
@stoppable
def filtering(run_dir: str) -> None:
    """Filter the problems of every stage of an existing run, unless the pool exists already."""
    with run_lock(open_own_run(run_dir).paths.lock):
        shown.filtered(run_dir, filter_problems(run_dir))
