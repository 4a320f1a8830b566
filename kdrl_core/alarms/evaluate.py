"""Rules over a stage's metrics → alarms.

Pure: an alarm at step k follows from the rows up to k alone, so a resumed run has the alarms of one that was never
killed, and they need no file of their own. A rule raises an alarm where its condition begins to hold, not at every step
on which it does; it raises another one once it has ceased to hold in between.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from kdrl_core.config import Recipe
from kdrl_core.config.alarms import AlarmRule, AlarmsConfig
from kdrl_core.ledger import Run
from kdrl_core.rollouts.metrics import load_metrics

Row = Mapping[str, Any]
Finding = tuple[float, float, str]
"""What was measured, the limit, and how the two compare in words."""

_LEAST_BEST = 0.05
"""A reward that was never better has not collapsed."""
_LEAST_BEFORE = 5
"""Steps before a jump can be told from a start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """A rule's condition began to hold."""

    stage: str
    step: int
    rule: str
    metric: str
    value: float
    limit: float
    stop: bool
    text: str
    """What happened, in a sentence."""
    look: str
    """Options of `kdrl rollouts show RUN` that show what to look at."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def alarms_of_run(run: Run, recipe: Recipe | None = None) -> list[Alarm]:
    """Every alarm of a run so far, by stage and step.

    Args:
        recipe: with other rules than the run's own.

    Raises:
        DamagedArtifactError: a stage's metrics cannot be read.
    """
    recipe = recipe or run.recipe
    return [alarm for stage in recipe.stages for alarm in alarms_of(stage, load_metrics(run, stage), recipe.alarms)]


def alarms_of(stage: str, rows: Sequence[Row], config: AlarmsConfig) -> list[Alarm]:
    """The alarms of a stage's rows, ascending by step; rows without a rule's metric are no news to it."""
    found = []
    for name, (metric, condition, look) in _RULES.items():
        rule: AlarmRule = getattr(config, name)
        if not rule.enabled:
            continue
        known = [(int(row["step"]), float(row[metric])) for row in rows if row.get(metric) is not None]
        held = False
        for (step, _), finding in zip(known, condition([value for _, value in known], rule), strict=True):
            if finding is not None and not held:
                value, limit, words = finding
                found.append(
                    Alarm(
                        stage=stage,
                        step=step,
                        rule=name,
                        metric=metric,
                        value=value,
                        limit=limit,
                        stop=rule.stop,
                        text=f"{metric} {words}",
                        look=f"--stage {stage} --step {step} {look}".strip(),
                    )
                )
            held = finding is not None
    return sorted(found, key=lambda alarm: alarm.step)


def _windows(values: Sequence[float], rule: AlarmRule) -> Iterator[float | None]:
    """At each value the mean of the window that ends there; None before there is one."""
    for end in range(1, len(values) + 1):
        yield fmean(values[end - rule.window : end]) if end >= rule.window else None


def _above(values: Sequence[float], rule: AlarmRule) -> Iterator[Finding | None]:
    for recent in _windows(values, rule):
        if recent is not None and recent > rule.threshold:
            yield recent, rule.threshold, f"is {_mean(recent, rule)}, above {rule.threshold:g}"
        else:
            yield None


def _falls(values: Sequence[float], rule: AlarmRule) -> Iterator[Finding | None]:
    """Below (1 − threshold) × the best window before."""
    best, best_at = 0.0, 0
    for position, recent in enumerate(_windows(values, rule)):
        limit = (1.0 - rule.threshold) * best
        if recent is not None and best >= _LEAST_BEST and recent < limit:
            fall, ago = 1.0 - recent / best, position - best_at
            yield recent, limit, f"fell to {_mean(recent, rule)}, {fall:.0%} below its best, {best:.3g} {ago} steps ago"
        else:
            yield None
        if recent is not None and recent > best:
            best, best_at = recent, position


def _grows(values: Sequence[float], rule: AlarmRule) -> Iterator[Finding | None]:
    yield from _against_start(values, rule, sign=1.0, verb="grew")


def _shrinks(values: Sequence[float], rule: AlarmRule) -> Iterator[Finding | None]:
    yield from _against_start(values, rule, sign=-1.0, verb="shrank")


def _against_start(values: Sequence[float], rule: AlarmRule, *, sign: float, verb: str) -> Iterator[Finding | None]:
    """Beyond threshold × the first window, upwards or downwards."""
    first = None
    for recent in _windows(values, rule):
        limit = rule.threshold * first if first is not None else 0.0
        if recent is not None and first is not None and sign * recent > sign * limit:
            yield recent, limit, f"{verb} to {_mean(recent, rule)}, {recent / first:.2g} times its start, {first:.3g}"
        else:
            yield None
        first = recent if first is None else first


def _jumps(values: Sequence[float], rule: AlarmRule) -> Iterator[Finding | None]:
    """Above threshold × the median of the window before."""
    for position, value in enumerate(values):
        before = values[max(0, position - rule.window) : position]
        usual = median(before) if len(before) >= min(_LEAST_BEFORE, rule.window) else 0.0
        if usual > 0.0 and value > rule.threshold * usual:
            words = f"jumped to {value:.3g}, {value / usual:.2g} times the median of {len(before)} steps, {usual:.3g}"
            yield value, rule.threshold * usual, words
        else:
            yield None


def _mean(value: float, rule: AlarmRule) -> str:
    return f"{value:.3g} (mean of {rule.window} steps)" if rule.window > 1 else f"{value:.3g}"


_RULES: dict[str, tuple[str, Callable[[Sequence[float], AlarmRule], Iterator[Finding | None]], str]] = {
    "reward_collapse": ("reward/mean", _falls, "--sort reward"),
    "clip_ratio": ("response/clip_ratio", _above, "--finish length"),
    "repetition": ("response/repetition_overlong", _above, "--finish length"),
    "length": ("response/length_mean", _grows, "--sort length --desc"),
    "kl_jump": ("kd/kl_unmasked", _jumps, "--sort kl_mean --desc"),
    "entropy_jump": ("entropy", _jumps, ""),
    "entropy_collapse": ("entropy", _shrinks, ""),
    "engine_gap": ("engine/logprob_gap_mean", _above, ""),
    "timeouts": ("verdict/timeout", _above, "--verdict timeout"),
}
"""Rule → its metric, its condition, and what shows the responses behind it."""
