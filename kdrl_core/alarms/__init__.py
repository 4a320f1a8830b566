"""Alarms: rules over the metrics of a stage, which say when a run goes wrong and what to look at."""

from kdrl_core.alarms.evaluate import Alarm, alarms_of, alarms_of_run

__all__ = ["Alarm", "alarms_of", "alarms_of_run"]
