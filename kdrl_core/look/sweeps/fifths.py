"""A metric over the course of a stage, in five means: each over a fifth of the steps.

    first fifth   second   third   fourth   last
    early = second    growth = last − first    early growth = second − first    late growth = last − fourth

A mean over a fifth evens out the noise of single steps. A lowest or highest step would not do: it lies below or above
the mean by chance alone.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

OF_SOME = {"response/repetition_overlong": "response/clip_ratio", "kd/kl_unmasked": "kd/active_frac"}
"""Metric that is a mean over some responses or tokens → metric with their share. If that is 0, the mean is void."""

Fifths = tuple[float | None, float | None, float | None, float | None, float | None]
"""Means over the first to the last fifth of the steps; None where the metric is missing or void in all of them."""

SPANS: dict[str, Callable[[Fifths], float | None]] = {
    "": lambda fifths: fifths[4],
    "early": lambda fifths: fifths[1],
    "growth": lambda fifths: _minus(fifths[4], fifths[0]),
    "early_growth": lambda fifths: _minus(fifths[1], fifths[0]),
    "late_growth": lambda fifths: _minus(fifths[4], fifths[3]),
}
"""What a claim may measure of a metric, by the word before its name: `growth:response/length_mean`."""


def fifths_of(rows: Sequence[Mapping[str, float]]) -> dict[str, Fifths]:
    """Metric → its five means. `rows` are the steps of a stage in order. A fifth has at least one step; of fewer than
    five steps, fifths overlap."""
    size = max(1, len(rows) // 5)
    starts = [round(place * (len(rows) - size) / 4) for place in range(5)]
    parts = [rows[start : start + size] for start in starts]
    names = sorted({name for row in rows for name in row} - {"step"})
    found = {name: [_mean(part, name) for part in parts] for name in names}
    return {
        name: (first, second, third, fourth, last)
        for name, (first, second, third, fourth, last) in found.items()
        if any(value is not None for value in found[name])
    }


def says_something(row: Mapping[str, float], metric: str) -> bool:
    """Whether a step's metric is not void. The repetition rate of cut responses is void if none was cut."""
    return metric not in OF_SOME or row.get(OF_SOME[metric]) != 0.0


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> float | None:
    if not all(name in row for row in rows):
        return None
    values = [row[name] for row in rows if says_something(row, name)]
    return fmean(values) if values else None


def _minus(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right
