"""The final evaluation: the deployment `kdrl-evaluation/evaluation`."""

from prefect import flow

from flows import hooks, shown
from flows.stage_flows import open_own_run
from flows.stopping import stop_if_cancelled, stoppable
from kdrl_core.ledger import run_lock
from kdrl_core.ledger.graph import evaluated_labels
from kdrl_core.look.tracking import close_tracking, track
from tasks.boxes import evaluate


@flow(name="kdrl-evaluation", flow_run_name=hooks.flow_run_name, on_failure=[hooks.on_failure])
@stoppable
def evaluation(run_dir: str) -> None:
    """Evaluate the initial student, the student after each stage, and the teacher, on every benchmark of the recipe."""
    run = open_own_run(run_dir)
    with run_lock(run.paths.lock):
        for label in evaluated_labels(run.recipe):
            stop_if_cancelled()
            evaluate(run_dir, label)
        track(run)
        close_tracking()
        shown.evaluated(run)
