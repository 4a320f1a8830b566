"""How `kdrl status` shows what a run has raised."""

from typing import TYPE_CHECKING, Any

from rich.text import Text

from flows.cli.shared import out

if TYPE_CHECKING:
    from kdrl_core.alarms import Alarm

_SHOWN_ALARMS = 10


def print_alarms(opened: Any, *, are_told: bool) -> None:
    """Print a line for each alarm that the run has raised, newest last, and the command that shows the newest.

    Args:
        are_told: the lines of the alarms were printed before.
    """
    from kdrl_core.alarms import alarms_of

    raised = alarms_of(opened)
    for alarm in [] if are_told else raised[-_SHOWN_ALARMS:]:
        out.say(alarm_line(alarm))
    if raised:
        earlier = f"{len(raised) - _SHOWN_ALARMS} earlier ones: --json. " if len(raised) > _SHOWN_ALARMS else ""
        out.say(f"       {earlier}look at it: {raised[-1].commands(opened.name)[-1]}")
        out.print()


def alarm_line(alarm: "Alarm") -> Text:
    """An alarm in a line, coloured by its severity."""
    from kdrl_core.alarms import sentence

    return Text(f"alarm  {sentence(alarm)}", style="bold red" if alarm.severity == "critical" else "yellow")


def alarm_mark(alarms: list[dict[str, Any]]) -> str:
    """`3, 1 critical`: how many alarms a run has raised; empty if none."""
    critical = sum(alarm["severity"] == "critical" for alarm in alarms)
    return f"{len(alarms)}{f', {critical} critical' if critical else ''}" if alarms else ""
