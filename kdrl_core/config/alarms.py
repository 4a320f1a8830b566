"""The alarms of a recipe: rules that look at the metrics of each step (docs/alarms.md)."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from kdrl_core.config.section import Section


class AlarmRule(Section):
    """One rule. What its threshold means depends on the rule (`AlarmsConfig`)."""

    enabled: bool = Field(True, description="whether the rule is looked at")
    stop: bool = Field(False, description="stop the stage after the step; kdrl resume goes on")
    threshold: float = Field(ge=0.0, description="beyond which there is an alarm")
    window: Annotated[int, Field(ge=1)] = Field(description="steps that are looked at together")


class AlarmsConfig(Section):
    """Rules by name. A rule that is given in part keeps its other values."""

    reward_collapse: AlarmRule = Field(
        AlarmRule(threshold=0.3, window=10),
        description="reward/mean, mean of a window: falls by this share below the best of all windows before",
    )
    clip_ratio: AlarmRule = Field(
        AlarmRule(threshold=0.5, window=5), description="response/clip_ratio, mean of a window: above"
    )
    repetition: AlarmRule = Field(
        AlarmRule(threshold=0.5, window=5), description="response/repetition_overlong, mean of a window: above"
    )
    length: AlarmRule = Field(
        AlarmRule(threshold=2.0, window=5),
        description="response/length_mean, mean of a window: above so many times that of the first window",
    )
    kl_jump: AlarmRule = Field(
        AlarmRule(threshold=3.0, window=10),
        description="kd/kl_unmasked: above so many times the median of the window before",
    )
    entropy_jump: AlarmRule = Field(
        AlarmRule(threshold=2.0, window=10), description="entropy: above so many times the median of the window before"
    )
    entropy_collapse: AlarmRule = Field(
        AlarmRule(threshold=0.1, window=5),
        description="entropy, mean of a window: below this share of that of the first window",
    )
    engine_gap: AlarmRule = Field(
        AlarmRule(threshold=0.1, window=1),
        description="engine/logprob_gap_mean, nats, mean of a window: above; stale or wrong weights in the engine",
    )
    timeouts: AlarmRule = Field(
        AlarmRule(threshold=0.05, window=1), description="verdict/timeout, share of responses, mean of a window: above"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        """A rule given in part takes the rest from its own defaults."""
        if not isinstance(values, Mapping):
            return values
        defaults = {name: field.default for name, field in cls.model_fields.items()}
        return {
            name: {**defaults[name].model_dump(), **value} if name in defaults and isinstance(value, Mapping) else value
            for name, value in values.items()
        }
