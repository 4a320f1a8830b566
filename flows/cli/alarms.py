"""How `kdrl status` shows what a run has raised."""

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from flows.cli.shared import out

if TYPE_CHECKING:
    from kdrl_core.alarms import Alarm

_SHOWN_ALARMS = 10


def print_alarms(opened: Any, console: Console = out, *, are_told: bool = False) -> None:
    """Print a line for each alarm that the run has raised, newest last, and the command that shows the newest.

    Args:
        are_told: the lines were printed already.
    """
    from kdrl_core.alarms import alarms_of

    raised = alarms_of(opened)
    for alarm in [] if are_told else raised[-_SHOWN_ALARMS:]:
        console.print(alarm_line(alarm), soft_wrap=True, highlight=False)
    if raised:
        earlier = f"{len(raised) - _SHOWN_ALARMS} earlier ones: --json. " if len(raised) > _SHOWN_ALARMS else ""
        console.print(
            f"       {earlier}look at it: {raised[-1].commands(opened.name)[-1]}", soft_wrap=True, highlight=False
        )
        console.print()


def alarm_line(alarm: "Alarm") -> Text:
    """An alarm in a line, coloured by its severity."""
    from kdrl_core.alarms import sentence

    return Text(f"alarm  {sentence(alarm)}", style="bold red" if alarm.severity == "critical" else "yellow")


def alarm_mark(alarms: list[dict[str, Any]]) -> str:
    """`3, 1 critical`: how many alarms a run has raised; empty if none."""
    critical = sum(alarm["severity"] == "critical" for alarm in alarms)
    return f"{len(alarms)}{f', {critical} critical' if critical else ''}" if alarms else ""
