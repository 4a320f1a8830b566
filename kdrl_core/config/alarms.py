"""Alarms of a recipe: which metric values, over how many steps, warn the user and may stop the stage.

Alarms change no published result, so every field may change on resume. `kdrl_core.alarms` has the arithmetic of the
rules, docs/alarms.md the reasons for the defaults.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, Field, model_validator

from kdrl_core.config.section import Positive, Section, Share, require_one_of

AlarmMetric = Literal[
    "reward/mean", "reward/format", "reward/accuracy", "response/length_mean", "response/length_max",
    "response/clip_ratio", "response/repetition_overlong", "verdict/correct", "verdict/wrong", "verdict/malformed",
    "verdict/no_answer", "verdict/timeout", "verdict/error", "kd/kl", "kd/kl_unmasked", "kd/kl_sampled",
    "kd/active_frac", "ref/kl", "entropy", "loss/policy", "loss/sft", "loss/total", "optim/grad_norm",
    "engine/logprob_gap_mean", "engine/logprob_gap_max", "ratio/tis_mean", "ratio/tis_capped_frac",
]  # fmt: skip
"""Columns of metrics.parquet that a rule may watch. A rule is silent in stages without its metric."""

_OF_FUNCTION = re.compile(r"reward/(?:([A-Za-z_][\w-]*)/(?:mean|applies)|([A-Za-z_][\w-]*)\.[\w-]+/mean)", re.ASCII)


def function_of_metric(name: str) -> str | None:
    """The function of `reward.functions` that a metric is of; None for any other metric."""
    found = _OF_FUNCTION.fullmatch(name)
    return None if found is None else found[1] or found[2]


def _known_metric(name: str) -> str:
    if function_of_metric(name) is None:
        require_one_of(name, get_args(AlarmMetric))
    return name


Metric = Annotated[str, AfterValidator(_known_metric)]
"""An `AlarmMetric`; or of one of `reward.functions` `reward/<name>/mean`, `reward/<name>/applies`, or
`reward/<name>.<part>/mean`."""

Severity = Literal["warning", "critical"]


class AlarmRule(Section):
    """Fields of every rule."""

    metric: Metric = Field(description="column of metrics.parquet")
    patience: Positive = Field(1, description="steps in a row that must breach the rule; then you are told once")
    severity: Severity = "warning"
    stop: bool = Field(False, description="stop the stage once the step is published; set alarms.acknowledged to go on")


class ThresholdRule(AlarmRule):
    """The metric is above a number. With `less`, the difference of the two metrics is."""

    above: float = Field(description="the metric must be greater")
    less: Metric | None = Field(None, description="column of metrics.parquet that is subtracted from the metric")
    min_clip_ratio: Share = Field(0.0, description="skip steps in which a smaller share of responses is cut")


class FloorRule(AlarmRule):
    """The metric is not above a number."""

    at_most: float = Field(description="the metric must not be greater")


class FallRule(AlarmRule):
    """The mean of the last `window` steps has fallen by a share of the best such mean so far."""

    share: float = Field(gt=0.0, lt=1.0, description="share of the best mean so far that is lost")
    window: Positive = Field(10, description="steps that the mean is taken over")
    min_best: float = Field(0.05, gt=0.0, description="the best mean must be at least this high; below it is noise")


class JumpRule(AlarmRule):
    """The metric is far above or below the median of the last `window` steps."""

    factor: float = Field(gt=1.0, description="up: above factor × median; down: below median / factor")
    min_change: float = Field(gt=0.0, description="and at least this far from it, in units of the metric")
    direction: Literal["up", "down", "both"] = "up"
    window: int = Field(10, ge=2, description="earlier steps whose median is the baseline")

    @model_validator(mode="after")
    def _median_stands_still(self) -> Self:
        if self.patience > self.window // 2:
            raise ValueError(
                f"patience {self.patience} is more than half of window {self.window}: the median would have followed "
                f"the jump before it is told; set patience to at most {self.window // 2}"
            )
        return self


class AcknowledgedConfig(Section):
    """Alarms that somebody has seen. Alarms of steps up to the given one no longer stop the stage."""

    stage1: int | None = Field(None, ge=0, description="last step whose alarms were seen")
    stage2: int | None = Field(None, ge=0, description="last step whose alarms were seen")


DEFAULTS: dict[str, dict[str, Any]] = {
    "reward_collapse": {"metric": "reward/mean", "share": 0.3, "patience": 3, "severity": "critical"},
    "no_reward": {"metric": "reward/mean", "at_most": 0.0, "patience": 5, "severity": "critical"},
    "format_wrong": {"metric": "reward/accuracy", "less": "reward/mean", "above": 0.1, "patience": 5},
    "clip_ratio": {"metric": "response/clip_ratio", "above": 0.5, "patience": 5},
    "repetition": {
        "metric": "response/repetition_overlong",
        "above": 0.5,
        "min_clip_ratio": 0.05,
        "patience": 5,
    },
    "length_explosion": {"metric": "response/length_mean", "factor": 2.0, "min_change": 16.0, "patience": 3},
    "kl_jump": {"metric": "kd/kl_unmasked", "factor": 3.0, "min_change": 0.1, "patience": 2},
    "ref_kl_jump": {"metric": "ref/kl", "factor": 5.0, "min_change": 0.1, "patience": 2},
    "entropy_jump": {"metric": "entropy", "factor": 2.0, "min_change": 0.1, "direction": "both", "patience": 2},
    "logprob_gap": {"metric": "engine/logprob_gap_mean", "above": 0.05, "patience": 3, "severity": "critical"},
    "timeouts": {"metric": "verdict/timeout", "above": 0.05, "patience": 3},
}
"""Defaults of the rules. Every rule is on."""


def _default(kind: type[Any], name: str) -> Any:
    return Field(kind(**DEFAULTS[name]), description="null: off")


class AlarmsConfig(Section):
    """The rules; a rule that is null is off."""

    reward_collapse: FallRule | None = _default(FallRule, "reward_collapse")
    no_reward: FloorRule | None = _default(FloorRule, "no_reward")
    format_wrong: ThresholdRule | None = _default(ThresholdRule, "format_wrong")
    clip_ratio: ThresholdRule | None = _default(ThresholdRule, "clip_ratio")
    repetition: ThresholdRule | None = _default(ThresholdRule, "repetition")
    length_explosion: JumpRule | None = _default(JumpRule, "length_explosion")
    kl_jump: JumpRule | None = _default(JumpRule, "kl_jump")
    ref_kl_jump: JumpRule | None = _default(JumpRule, "ref_kl_jump")
    entropy_jump: JumpRule | None = _default(JumpRule, "entropy_jump")
    logprob_gap: ThresholdRule | None = _default(ThresholdRule, "logprob_gap")
    timeouts: ThresholdRule | None = _default(ThresholdRule, "timeouts")
    acknowledged: AcknowledgedConfig = AcknowledgedConfig()

    @property
    def rules(self) -> dict[str, AlarmRule]:
        """The rules that are on, by name."""
        values = {name: getattr(self, name) for name in DEFAULTS}
        return {name: rule for name, rule in values.items() if rule is not None}

    @property
    def rules_of_functions(self) -> dict[str, AlarmRule]:
        """As `rules`, for `reward.functions`, whose sum need not lie between 0 and 1, and may be 0 for a success. So by
        default `no_reward` watches the share of successes, and `format_wrong` is off."""
        standard, rules = AlarmsConfig(), self.rules
        if self.format_wrong == standard.format_wrong:
            rules.pop("format_wrong", None)
        if "no_reward" in rules and self.no_reward == standard.no_reward:
            rules["no_reward"] = rules["no_reward"].model_copy(update={"metric": "reward/accuracy"})
        return rules

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Fill in the defaults of each rule, so that `alarms.clip_ratio.stop=true` is enough."""
        if not isinstance(values, Mapping):
            return values
        return {
            name: {**DEFAULTS[name], **value} if name in DEFAULTS and isinstance(value, Mapping) else value
            for name, value in values.items()
        }
