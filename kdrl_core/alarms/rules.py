"""The alarm rules of a recipe, applied to a stage's metrics. Pure: the same rows always raise the same alarms.

With the values x_0 … x_i of a rule's metric, one per step, step i breaches the rule if

    threshold   x_i > above
    fall        m_i < (1 − share) · max_{j ≤ i} m_j,  where m_j is the mean of x_{j−window+1} … x_j
    jump        x_i ≥ b + max(min_change, (factor − 1) · |b|)      upwards
                x_i ≤ b − max(min_change, (1 − 1/factor) · |b|)    downwards, b the median of x_{i−window} … x_{i−1}

The alarm is raised at the `patience`-th breaching step in a row, and not again until a step did not breach. Rules look
backwards only: later steps do not change what a step raises. Steps whose metric is missing or not finite are skipped.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from kdrl_core.alarms.record import Alarm
from kdrl_core.config.alarms import AlarmRule, FallRule, JumpRule, ThresholdRule

Row = Mapping[str, Any]
"""A row of metrics.parquet: `step`, and numbers by name."""

_CLIP_RATIO = "response/clip_ratio"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Breach:
    """A step at which a rule's condition holds."""

    value: float
    threshold: float
    text: str


def raised_at_last(rows: Sequence[Row], rules: Mapping[str, AlarmRule], *, stage: str) -> list[Alarm]:
    """The alarms that the last of `rows` raises, in the order of the rules.

    Args:
        rows: metrics of a stage's steps, ascending by step.
        rules: by name.
        stage: noted in the alarms.
    """
    raised = []
    for name, rule in rules.items():
        points = [row for row in rows if _counts(rule, row)]
        if not points or points[-1] is not rows[-1]:
            continue
        breached = _breach(rule, points, len(points) - 1)
        first = len(points) - rule.patience
        if breached is None or first < 0:
            continue
        if any(_breach(rule, points, at) is None for at in range(first, len(points) - 1)):
            continue
        if first > 0 and _breach(rule, points, first - 1) is not None:
            continue  # told already
        raised.append(
            Alarm(
                stage=stage,
                step=points[-1]["step"],
                rule=name,
                severity=rule.severity,
                metric=rule.metric,
                value=breached.value,
                threshold=breached.threshold,
                since=points[first]["step"],
                text=breached.text,
            )
        )
    return raised


def _counts(rule: AlarmRule, row: Row) -> bool:
    return _is_number(row.get(rule.metric)) and not (
        isinstance(rule, ThresholdRule) and rule.min_clip_ratio > 0.0 and not _is_cut(row, rule.min_clip_ratio)
    )


def _is_cut(row: Row, least: float) -> bool:
    share = row.get(_CLIP_RATIO)
    return _is_number(share) and float(share) >= least  # type: ignore[arg-type]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _breach(rule: AlarmRule, points: Sequence[Row], at: int) -> _Breach | None:
    """How the step at position `at` breaches the rule; None if it does not."""
    values = [float(row[rule.metric]) for row in points[: at + 1]]
    return _CONDITIONS[type(rule)](rule, values)


def _above(rule: ThresholdRule, values: Sequence[float]) -> _Breach | None:
    if values[-1] <= rule.above:
        return None
    return _Breach(
        value=values[-1],
        threshold=rule.above,
        text=f"{rule.metric} is {_shown(values[-1])}, above {_shown(rule.above)}{_for_steps(rule)}",
    )


def _fallen(rule: FallRule, values: Sequence[float]) -> _Breach | None:
    ends = range(rule.window, len(values) + 1)
    means = [math.fsum(values[end - rule.window : end]) / rule.window for end in ends]
    if not means:
        return None
    now, best = means[-1], max(means)
    threshold = (1.0 - rule.share) * best
    if best < rule.min_best or now >= threshold:
        return None
    return _Breach(
        value=now,
        threshold=threshold,
        text=(
            f"{rule.metric} fell: its mean over {_steps(rule.window)} is {_shown(now)}, {100 * (1 - now / best):.0f} % "
            f"below its best so far, {_shown(best)}{_for_steps(rule)}"
        ),
    )


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
    return _Breach(
        value=now,
        threshold=threshold,
        text=(
            f"{rule.metric} {word} to {_shown(now)} from {_shown(base)}, the median of the {_steps(rule.window)} "
            f"before{_for_steps(rule)}"
        ),
    )


_CONDITIONS: dict[type[AlarmRule], Callable[[Any, Sequence[float]], _Breach | None]] = {
    ThresholdRule: _above,
    FallRule: _fallen,
    JumpRule: _jumped,
}


def _for_steps(rule: AlarmRule) -> str:
    return f", {_steps(rule.patience)} in a row" if rule.patience > 1 else ""


def _steps(number: int) -> str:
    return f"{number} step" if number == 1 else f"{number} steps"


def _shown(value: float) -> str:
    return f"{value:.4g}"
