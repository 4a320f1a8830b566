"""Alarms that stop their stage: which are not acknowledged yet, and how to continue.

A stop has no state of its own. A stage is stopped while it has an alarm of a rule with `stop: true` at a step that the
recipe's `alarms.acknowledged` does not cover. So a retry or a second `kdrl resume` stops again, before any work, until
somebody acknowledges the alarm. The history of the run's manifest keeps that with its date.
"""

from kdrl_core.alarms.record import Alarm, load_alarms, sentence
from kdrl_core.errors import StoppedByAlarmError
from kdrl_core.ledger import Run


def alarms_of(run: Run) -> list[Alarm]:
    """All alarms of a run, stage by stage, ascending by step. Raises as `load_alarms`."""
    return [alarm for stage in run.recipe.stages for alarm in load_alarms(run, stage)]


def stopping_alarms(run: Run, stage: str) -> list[Alarm]:
    """The alarms that keep a stage from going on."""
    rules = run.recipe.alarms.rules
    acknowledged = getattr(run.recipe.alarms.acknowledged, stage)
    seen = -1 if acknowledged is None else acknowledged
    return [
        alarm
        for alarm in load_alarms(run, stage)
        if alarm.step > seen and alarm.rule in rules and rules[alarm.rule].stop
    ]


def stopping_alarm(run: Run) -> Alarm | None:
    """The last alarm that keeps the run from going on, of the first stage that has one."""
    return next((found[-1] for stage in run.recipe.stages if (found := stopping_alarms(run, stage))), None)


def resume_command(run: Run) -> str:
    """The command that continues a run, past an alarm that has stopped it."""
    alarm = stopping_alarm(run)
    if alarm is None:
        return f"kdrl resume {run.name}"
    return f"kdrl resume {run.name} --set {_acknowledge(alarm)}"


def require_not_stopped(run: Run, stage: str) -> None:
    """Raise StoppedByAlarmError, which says how to go on, if an alarm keeps the stage from going on."""
    stopping = stopping_alarms(run, stage)
    if not stopping:
        return
    last = stopping[-1]
    more = f" and {len(stopping) - 1} more before it" if len(stopping) > 1 else ""
    raise StoppedByAlarmError(
        f"stopped by an alarm: {sentence(last)}{more} (value {last.value:.6g}, threshold {last.threshold:.6g}). All "
        f"steps up to {last.step} are published, nothing is lost. Look at it with: {last.commands(run.name)[-1]}. Then "
        f"go on, with the rule in force: kdrl resume {run.name} --set {_acknowledge(last)}; or with the rule only "
        f"telling: kdrl resume {run.name} --set alarms.{last.rule}.stop=false"
    )


def _acknowledge(alarm: Alarm) -> str:
    return f"alarms.acknowledged.{alarm.stage}={alarm.step}"
