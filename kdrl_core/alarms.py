"""Alarms: rules over the metrics of a stage's steps, what they raised, and the stages that they stop.

**Rules** are pure: the same rows always raise the same alarms. With the values x_0 … x_i of a rule's metric, one per
step, step i breaches the rule if

    threshold   x_i > above, or x_i − y_i > above, y another metric
    floor       x_i ≤ at_most
    fall        m_i < (1 − share) · max_{j ≤ i} m_j,  where m_j is the mean of x_{j−window+1} … x_j
    jump        x_i ≥ b + max(min_change, (factor − 1) · |b|)      upwards
                x_i ≤ b − max(min_change, (1 − 1/factor) · |b|)    downwards, b the median of x_{i−window} … x_{i−1}

The alarm is raised at the `patience`-th breaching step in a row, and not again until a step did not breach. Rules look
backwards only: later steps do not change what a step raises. Steps whose metric is missing or not finite are skipped.

**Records**: raised alarms are kept in the manifest of the step's update, which is written once, and collected in
alarms.parquet. So an alarm stays on record when the rules are changed later. Neither file holds the run's name, a date
or a path: equal runs have equal bytes.

**Stops** have no state of their own. A stage is stopped while it has an alarm of a rule with `stop: true` at a step
that the recipe's `alarms.acknowledged` does not cover. So a retry or a second `kdrl resume` stops again, before any
work, until somebody acknowledges the alarm. The run's manifest keeps each acknowledgement, dated, in its history.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from kdrl_core.config.alarms import AlarmRule, FallRule, FloorRule, JumpRule, ThresholdRule
from kdrl_core.errors import StoppedByAlarmError
from kdrl_core.ledger import Run
from kdrl_core.tables.files import load_alarm_rows

Row = Mapping[str, Any]
"""A row of metrics.parquet: `step`, and numbers by name."""

_CLIP_RATIO = "response/clip_ratio"
_LOOK_AT = {
    "reward_collapse": "Compare responses and verdicts before and after it. More malformed and no_answer: the policy "
    "lost the answer format. More wrong: its reasoning got worse. If KL or gradient norm rose just before, suspect the "
    "learning rate.",
    "no_reward": "No response earns a reward, so the policy cannot learn from rewards. Read some, with their verdicts. "
    "All malformed: does the end of the prompt fit the format (prompt.think_opened)? All no_answer: do responses end "
    "before their box? All wrong: compare them with the ground truths; perhaps these are of the wrong column.",
    "format_wrong": "Right answers earn no reward: their format is wrong. Read the reasons of malformed verdicts: "
    "do the responses have the tags that this prompt asks for (prompt.think_opened)? reward.require_format=false "
    "rewards accuracy alone.",
    "clip_ratio": "Responses are cut before their answer. Read some to the end: if the reasoning still makes progress, "
    "raise max_response_tokens; if it goes round in circles, the policy is at fault.",
    "repetition": "Responses that are cut repeat themselves: the policy is stuck in loops. Read the longest.",
    "length_explosion": "Read the longest responses: do they think longer, or never stop?",
    "kl_jump": "Find the responses with the largest kl_mean, and in them the tokens on which student and teacher "
    "differ most.",
    "ref_kl_jump": "The policy moves fast away from the stage's initial policy: check learning rate and gradient norm.",
    "entropy_jump": "Falling entropy: the policy settles on few answers, and the responses of a group become equal. "
    "Rising entropy: it loses what it knew. Compare the responses of one group before and after.",
    "logprob_gap": "The engine samples from another policy than the trainer trains: weights that did not arrive, "
    "another temperature or dtype. If the cause is rounding alone, importance weights correct for it (tis_cap).",
    "timeouts": "Some answers exceed the verifier's time limit: read the slow ones. verification.max_failed_share "
    "stops the stage if there are too many.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """One alarm of one step."""

    stage: str
    step: int
    """The step whose update raised it."""
    rule: str
    """Name in the recipe's `alarms`."""
    severity: str
    metric: str
    value: float
    """The value that was compared: the mean for a fall, else the metric."""
    threshold: float
    """The limit that it was compared with."""
    since: int
    """First of the `patience` steps that breached the rule."""
    text: str
    """What happened, in words."""

    @property
    def advice(self) -> str:
        """What to look at."""
        return _LOOK_AT.get(self.rule, "")  # a rule of another version

    def commands(self, run: str) -> list[str]:
        """Commands that show the step and the steps around it."""
        before = max(0, self.since - 10)
        return [
            f"kdrl rollouts stats {run} --stage {self.stage} --step {before}-{self.step} --all",
            f"kdrl rollouts show {run} --stage {self.stage} --step {self.step}",
        ]


def sentence(alarm: Alarm) -> str:
    """One line: `stage2 step 143, reward_collapse (critical): …`."""
    return f"{alarm.stage} step {alarm.step}, {alarm.rule} ({alarm.severity}): {alarm.text}"


def to_metadata(alarms: Sequence[Alarm]) -> list[dict[str, Any]]:
    """Alarms as the manifest of their step's update holds them."""
    return [{name: value for name, value in asdict(a).items() if name not in ("stage", "step")} for a in alarms]


def load_alarms(run: Run, stage: str) -> list[Alarm]:
    """Everything that was raised in a stage, ascending by step.

    Raises:
        DamagedArtifactError: alarms.parquet cannot be read.
    """
    return [Alarm(stage=stage, **row) for row in load_alarm_rows(run, stage)]


_Breach = tuple[float, float, str]
"""Value, threshold and what happened in words, for a step that breaches a rule."""


def raised_at_last(rows: Sequence[Row], rules: Mapping[str, AlarmRule], *, stage: str) -> list[Alarm]:
    """The alarms that the last of `rows` raises, in the order of the rules.

    Args:
        rows: metrics of a stage's steps, ascending by step.
        rules: by name.
        stage: noted in the alarms.
    """
    raised = []
    for name, rule in rules.items():
        points = [(row["step"], value) for row in rows if (value := _value(rule, row)) is not None]
        if not points or points[-1][0] != rows[-1]["step"]:
            continue
        values = [value for _, value in points]
        breached = _breach(rule, values, len(values) - 1)
        first = len(values) - rule.patience
        if breached is None or first < 0:
            continue
        if any(_breach(rule, values, at) is None for at in range(first, len(values) - 1)):
            continue
        if first > 0 and _breach(rule, values, first - 1) is not None:
            continue  # raised already
        value, threshold, text = breached
        raised.append(
            Alarm(
                stage=stage,
                step=points[-1][0],
                rule=name,
                severity=rule.severity,
                metric=rule.metric,
                value=value,
                threshold=threshold,
                since=points[first][0],
                text=text,
            )
        )
    return raised


def _value(rule: AlarmRule, row: Row) -> float | None:
    """What the rule compares at a step; None if it skips the step."""
    value = _number(row.get(rule.metric))
    if isinstance(rule, ThresholdRule):
        if rule.min_clip_ratio > 0.0 and not _number(row.get(_CLIP_RATIO)) >= rule.min_clip_ratio:
            return None
        value -= 0.0 if rule.less is None else _number(row.get(rule.less))
    return value if math.isfinite(value) else None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _breach(rule: AlarmRule, values: Sequence[float], at: int) -> _Breach | None:
    """How the step at position `at` breaches the rule; None if it does not."""
    return _CONDITIONS[type(rule)](rule, values[: at + 1])


def _above(rule: ThresholdRule, values: Sequence[float]) -> _Breach | None:
    if values[-1] <= rule.above:
        return None
    what = rule.metric if rule.less is None else f"{rule.metric} minus {rule.less}"
    return values[-1], rule.above, f"{what} is {_shown(values[-1])}, above {_shown(rule.above)}{_for_steps(rule)}"


def _not_above(rule: FloorRule, values: Sequence[float]) -> _Breach | None:
    if values[-1] > rule.at_most:
        return None
    text = f"{rule.metric} is {_shown(values[-1])}, not above {_shown(rule.at_most)}{_for_steps(rule)}"
    return values[-1], rule.at_most, text


def _fallen(rule: FallRule, values: Sequence[float]) -> _Breach | None:
    ends = range(rule.window, len(values) + 1)
    means = [math.fsum(values[end - rule.window : end]) / rule.window for end in ends]
    if not means:
        return None
    now, best = means[-1], max(means)
    threshold = (1.0 - rule.share) * best
    if best < rule.min_best or now >= threshold:
        return None
    text = (
        f"{rule.metric} fell: its mean over {_steps(rule.window)} is {_shown(now)}, {100 * (1 - now / best):.0f} % "
        f"below its best so far, {_shown(best)}{_for_steps(rule)}"
    )
    return now, threshold, text


def _jumped(rule: JumpRule, values: Sequence[float]) -> _Breach | None:
    before = values[-1 - rule.window : -1]
    if len(before) < rule.window:
        return None
    now, base = values[-1], median(before)
    high = base + max(rule.min_change, (rule.factor - 1.0) * abs(base))
    low = base - max(rule.min_change, (1.0 - 1.0 / rule.factor) * abs(base))
    if rule.direction != "down" and now >= high:
        word, threshold = "rose", high
    elif rule.direction != "up" and now <= low:
        word, threshold = "fell", low
    else:
        return None
    text = (
        f"{rule.metric} {word} to {_shown(now)} from {_shown(base)}, the median of the {_steps(rule.window)} "
        f"before{_for_steps(rule)}"
    )
    return now, threshold, text


_CONDITIONS: dict[type[AlarmRule], Callable[[Any, Sequence[float]], _Breach | None]] = {
    ThresholdRule: _above,
    FloorRule: _not_above,
    FallRule: _fallen,
    JumpRule: _jumped,
}


def _for_steps(rule: AlarmRule) -> str:
    return f", {_steps(rule.patience)} in a row" if rule.patience > 1 else ""


def _steps(number: int) -> str:
    return f"{number} step" if number == 1 else f"{number} steps"


def _shown(value: float) -> str:
    return f"{value:.4g}"


def alarms_of(run: Run) -> list[Alarm]:
    """All alarms of a run, stage by stage, ascending by step. Raises as `load_alarms`."""
    return [alarm for stage in run.recipe.stages for alarm in load_alarms(run, stage)]


def stopping_alarms(run: Run, stage: str) -> list[Alarm]:
    """The alarms that stop a stage now."""
    rules = run.recipe.alarms.rules
    acknowledged = getattr(run.recipe.alarms.acknowledged, stage)
    seen = -1 if acknowledged is None else acknowledged
    return [
        alarm
        for alarm in load_alarms(run, stage)
        if alarm.step > seen and alarm.rule in rules and rules[alarm.rule].stop
    ]


def stopping_alarm(run: Run) -> Alarm | None:
    """The last alarm that stops the run now, of the first stage that has one."""
    return next((found[-1] for stage in run.recipe.stages if (found := stopping_alarms(run, stage))), None)


def resume_command(run: Run) -> str:
    """The command that continues a run. If an alarm has stopped it, the command acknowledges the alarm."""
    alarm = stopping_alarm(run)
    if alarm is None:
        return f"kdrl resume {run.name}"
    return f"kdrl resume {run.name} --set {_acknowledge(alarm)}"


def require_not_stopped(run: Run, stage: str) -> None:
    """Raise StoppedByAlarmError if an alarm stops the stage. The error says how to continue."""
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
