"""Alarms: rules over the metrics of a stage's steps, what they raised, and the stages that they stop."""

from kdrl_core.alarms.record import Alarm, load_alarms, sentence, to_metadata
from kdrl_core.alarms.rules import raised_at_last
from kdrl_core.alarms.stops import alarms_of, require_not_stopped, resume_command, stopping_alarm

__all__ = [
    "Alarm",
    "alarms_of",
    "load_alarms",
    "raised_at_last",
    "require_not_stopped",
    "resume_command",
    "sentence",
    "stopping_alarm",
    "to_metadata",
]
