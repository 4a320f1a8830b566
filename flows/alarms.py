"""What an alarm sets off: a log line, a Prefect event and artifact, and, if its rule says so, the end of the stage."""

from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.events import emit_event

from flows.shown import artifact_key
from kdrl_core.alarms import Alarm, alarms_of
from kdrl_core.errors import AlarmError
from kdrl_core.ledger import Run
from kdrl_core.rollouts.metrics import load_metrics
from kdrl_core.steps.step_end import StepSummary

EVENT = "kdrl.alarm."
"""An event's name is this and the rule: `kdrl.alarm.reward_collapse`."""


def raise_alarms(run: Run, stage: str, summary: StepSummary) -> None:
    """Tell the alarms that a step has raised; of one that is replayed they were told when it was published.

    Raises:
        AlarmError: the rule of one of them stops the stage.
    """
    if summary.replayed:
        return
    step = summary.step
    found = [alarm for alarm in alarms_of(stage, load_metrics(run, stage), run.recipe.alarms) if alarm.step == step]
    for alarm in found:
        _tell(run, alarm)
    if stopping := next((alarm for alarm in found if alarm.stop), None):
        raise AlarmError(
            f"{run.name} {stage} step {step}: alarm {stopping.rule}: {stopping.text}. The step is published; see "
            f"`kdrl rollouts show {run.name} {stopping.look}`, and go on with `kdrl resume {run.name}`, which stops "
            f"again only if the alarm comes anew (never: --set alarms.{stopping.rule}.stop=false)"
        )


def _tell(run: Run, alarm: Alarm) -> None:
    get_run_logger().warning("alarm %s at %s step %d: %s", alarm.rule, alarm.stage, alarm.step, alarm.text)
    resource = {"prefect.resource.id": f"kdrl.run.{run.name}", "prefect.resource.name": run.name}
    emit_event(event=f"{EVENT}{alarm.rule}", resource=resource, payload={"run": run.name, **alarm.to_json()})
    create_markdown_artifact(
        f"**{alarm.rule}** at {alarm.stage}, step {alarm.step}: {alarm.text}\n\n"
        f"Look at it: `kdrl rollouts show {run.name} {alarm.look}`",
        key=artifact_key(run, "alarm", alarm.rule),
        description=f"alarm of {run.name}",
    )
