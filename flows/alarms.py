"""Raised alarms in Prefect: an event that automations can wait for, a Markdown artifact, a line in the log.

When a stage is opened, the alarms of its last step are sent again, because a crash may have kept them from being sent.
The id of an event depends only on run, stage, step and rule, and the server keeps one event per id.
"""

import logging
import uuid
from collections.abc import Iterable
from dataclasses import asdict

from prefect.artifacts import create_markdown_artifact
from prefect.events import emit_event

from flows.shown import artifact_key
from kdrl_core.alarms import Alarm, load_alarms, require_not_stopped, sentence
from kdrl_core.boxes.session import close_sessions
from kdrl_core.errors import StoppedByAlarmError
from kdrl_core.ledger import Run
from kdrl_core.tables.files import load_metrics

EVENT_PREFIX = "kdrl.alarm."
"""Events are `kdrl.alarm.<rule>`; an automation that expects `kdrl.alarm.*` gets all."""

_NAMESPACE = uuid.UUID("0f2a7f0e-52a3-5b0e-9a3b-6d1f8c1e7a55")
_SHOWN_STEPS = 12
_logger = logging.getLogger("kdrl")


def stage_opened(run: Run, stage: str, steps: range) -> None:
    """Call before the first of the stage's remaining `steps`. Raises StoppedByAlarmError if an alarm has stopped the
    stage, and nobody has acknowledged it."""
    rows = load_metrics(run, stage)
    if rows and steps:
        _tell(run, [alarm for alarm in load_alarms(run, stage) if alarm.step == rows[-1]["step"]])
    require_not_stopped(run, stage)


def step_ended(run: Run, stage: str, alarms: Iterable[Alarm]) -> None:
    """Send the alarms of a published step. Raises StoppedByAlarmError if one of their rules has `stop: true`."""
    if raised := list(alarms):
        _tell(run, raised)
        try:
            require_not_stopped(run, stage)
        except StoppedByAlarmError:
            close_sessions()  # end in order: this process may continue the stage later, from its files
            raise


def event_id(run: Run, alarm: Alarm) -> uuid.UUID:
    """The same each time the alarm is sent."""
    return uuid.uuid5(_NAMESPACE, f"{run.name}\x1f{run.started_at}\x1f{alarm.stage}\x1f{alarm.step}\x1f{alarm.rule}")


def _tell(run: Run, alarms: Iterable[Alarm]) -> None:
    for alarm in alarms:
        _logger.warning("alarm: %s; look at it with: %s", sentence(alarm), alarm.commands(run.name)[-1])
        emit_event(
            event=f"{EVENT_PREFIX}{alarm.rule}",
            resource={
                "prefect.resource.id": f"kdrl.run.{run.name}",
                "prefect.resource.name": run.name,
                "kdrl.stage": alarm.stage,
                "kdrl.rule": alarm.rule,
                "kdrl.severity": alarm.severity,
            },
            payload={
                "run": run.name,
                "recipe": run.recipe.name,
                **asdict(alarm),
                "stops": _stops(run, alarm),
                "look_at": alarm.commands(run.name),
            },
            id=event_id(run, alarm),
        )
        create_markdown_artifact(
            _markdown(run, alarm),
            key=artifact_key(run, alarm.stage, "alarm", alarm.rule),
            description=f"{alarm.rule} at {alarm.stage} step {alarm.step} of {run.name}",
        )


def _stops(run: Run, alarm: Alarm) -> bool:
    rule = run.recipe.alarms.rules.get(alarm.rule)  # None: switched off since
    return rule is not None and rule.stop


def _markdown(run: Run, alarm: Alarm) -> str:
    """What happened, the metric over the last steps, and what to look at."""
    rows = [row for row in load_metrics(run, alarm.stage) if row["step"] <= alarm.step][-_SHOWN_STEPS:]
    lines = [
        f"# {alarm.severity}: {alarm.rule}",
        f"**{run.name}**, {alarm.stage}, step {alarm.step}: {alarm.text}.",
        f"Value {alarm.value:.6g}, threshold {alarm.threshold:.6g}, since step {alarm.since}.",
        "\n".join(
            [
                f"| step | {alarm.metric} |",
                "| ---: | ---: |",
                *(f"| {row['step']} | {row[alarm.metric]:.6g} |" for row in rows if row.get(alarm.metric) is not None),
            ]
        ),
        alarm.advice + (" The stage stops here." if _stops(run, alarm) else ""),
        "```\n" + "\n".join(alarm.commands(run.name)) + "\n```",
    ]
    return "\n\n".join(lines)
