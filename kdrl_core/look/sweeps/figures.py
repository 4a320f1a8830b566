"""The figures of a sweep: accuracies with intervals, training dynamics (Figures 2–5, 7), Figure 6, time by phase.

Figures are small: side by side on a wide screen, one below the other on a phone. The legend group of a trace is the
name of its variant; the page has one legend for all figures.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from kdrl_core.look.reporting.run_report import LOOK, ema
from kdrl_core.look.sweeps.claims import AVERAGE
from kdrl_core.look.sweeps.dynamics import Line, SweepDynamics, VariantDynamics
from kdrl_core.look.sweeps.results import SweepResults, Watched, benchmarks_of, by_label
from kdrl_core.look.sweeps.table import SweepTable

COLORS = ("#3b82d6", "#d9622b", "#2a9d74", "#8e6bc9", "#b8891b", "#cf5a94", "#1f9bb3", "#7d8797")
"""Distinct on white, on black, and for most colour-blind readers. The ninth variant starts again, with dotted lines."""
_DASHES = ("solid", "dot", "dash")
_LABEL_WIDTH = 18
_PANELS = {
    "reward/mean": "training reward",
    "response/length_mean": "response length, tokens",
    "response/clip_ratio": "clip ratio",
    "response/repetition_overlong": "repetition rate in overlong responses",
    "kd/kl_sampled": "KL to the teacher, all tokens (mean of −R)",
    "kd/kl_unmasked": "KL term on unmasked tokens, each by its own estimator",
    "entropy": "entropy, nats",
    "optim/grad_norm": "gradient norm",
    "loss/sft": "SFT loss, nats a token",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One figure of the page."""

    key: str
    title: str
    figure: go.Figure
    is_wide: bool = False


def color_of(position: int) -> str:
    """Colour of a variant, by its position."""
    return COLORS[position % len(COLORS)]


def dash_of(position: int) -> str:
    """Line style of a variant, by its position."""
    return _DASHES[position // len(COLORS) % len(_DASHES)]


def panels_of(table: SweepTable, results: SweepResults, dynamics: SweepDynamics) -> list[Panel]:
    """The figures that have data."""
    found = [_accuracies(table, results.judged.benchmark)]
    found += [
        panel for name, title in _PANELS.items() if (panel := _metric(name, title, dynamics.variants)) is not None
    ]
    labels = [variant.label for variant in dynamics.variants]
    found += [*_watched(results, labels), _final_by_length(results, labels)]
    found.append(_phases(dynamics.variants))
    return [panel for panel in found if panel is not None]


def _accuracies(table: SweepTable, judged_on: str) -> Panel | None:
    """A dot and its interval for each row; reference models are open circles."""
    average = [AVERAGE] if len(table.averaged) > 1 else table.averaged
    name = judged_on if judged_on in table.benchmarks else next(iter([*average, *table.benchmarks]), "")
    rows = [row for row in table.rows if name in row.scores]
    if not rows:
        return None
    figure = go.Figure()
    variants = [row.label for row in table.rows if not row.is_reference]
    for row in reversed(rows):
        score = row.scores[name]
        color = COLORS[-1] if row.is_reference else color_of(variants.index(row.label))
        figure.add_trace(
            go.Scatter(
                x=[100 * score.mean],
                y=[row.label],
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": [100 * (score.high - score.mean)],
                    "arrayminus": [100 * (score.mean - score.low)],
                    "thickness": 2,
                },
                mode="markers",
                marker={"color": color, "size": 10, "symbol": "circle-open" if row.is_reference else "circle"},
                name=row.label,
                legendgroup=row.label,
            )
        )
    what = f"mean of {', '.join(table.averaged)}" if name == AVERAGE else name
    title = f"accuracy, {what}, % with 95 % interval"
    _style(figure, height=110 + 30 * len(rows), x_title="")
    _name_rows(figure, [row.label for row in rows])
    return Panel(key="accuracy", title=title, figure=figure, is_wide=True)


def _final_by_length(results: SweepResults, labels: Sequence[str]) -> Panel | None:
    """A dot for each row, as in Figure 6 left: mean accuracy and length of the final answers; reference models are open
    circles."""
    judged_on = results.judged.benchmark
    rows = {label: [cell.model for cell in results.cells if cell.variant == label] for label in labels}
    references = {label: list(models.values()) for label, (models, _) in by_label(results).items()}
    figure = go.Figure()
    names: dict[str, None] = {}
    for label, models in [*references.items(), *rows.items()]:
        if not models:
            continue
        names |= dict.fromkeys(name for model in models for name in benchmarks_of(model.scores, judged_on))
        is_variant = label in rows
        figure.add_trace(
            go.Scatter(
                x=[float(np.mean([model.length_mean(judged_on) for model in models]))],
                y=[100 * float(np.mean([model.accuracy(judged_on) for model in models]))],
                mode="markers",
                marker={
                    "color": color_of(labels.index(label)) if is_variant else COLORS[-1],
                    "size": 10,
                    "symbol": "circle" if is_variant else "circle-open",
                },
                name=label,
                legendgroup=label,
            )
        )
    if not figure.data:
        return None
    _style(figure, x_title="tokens of the final answers")
    title = f"accuracy on {', '.join(names)}, %, by output length at the end (Figure 6 left)"
    return Panel(key="final-length", title=title, figure=figure)


def _metric(name: str, title: str, variants: Sequence[VariantDynamics]) -> Panel | None:
    """The mean over seeds, faint, and its moving average."""
    figure = go.Figure()
    for position, variant in enumerate(variants):
        if name in variant.metrics:
            steps, values = variant.metrics[name]
            _line(figure, position, variant.label, (steps, values), opacity=0.25)
            _line(figure, position, variant.label, (steps, ema(values)))
    if not figure.data:
        return None
    _style(figure, x_title="step of the last stage")
    return Panel(key=name.replace("/", "-"), title=title, figure=figure)


def _watched(results: SweepResults, labels: Sequence[str]) -> list[Panel]:
    """Periodic accuracy by step and, as in Figure 6, by output length and training time. From a variant's finished
    cells; while there are none, from those that have begun."""
    judged_on = results.judged.benchmark
    models = [
        w.model for seeds in (*results.begun.values(), [c.watched for c in results.cells]) for s in seeds for w in s
    ]
    names = dict.fromkeys(name for model in models for name in benchmarks_of(model.scores, judged_on))
    what = f"accuracy in training on {', '.join(names)}, %"
    axes = {
        "accuracy-steps": (f"{what}, by step", "step of the last stage"),
        "accuracy-length": (f"{what}, by output length (Figure 6)", "tokens"),
        "accuracy-time": (f"{what}, by training time (Figure 6)", "seconds of the last stage"),
    }
    figures = {key: go.Figure() for key in axes}
    for position, label in enumerate(labels):
        finished = [cell.watched for cell in results.cells if cell.variant == label]
        begun = [watched for watched in results.begun.get(label, []) if watched]
        points = _points(finished or begun, judged_on)
        for key, axis in zip(axes, ("step", "length", "seconds"), strict=True):
            if points:
                xs, ys = [point[axis] for point in points], [100 * point["accuracy"] for point in points]
                _line(figures[key], position, label, (xs, ys), markers=True)
    found = []
    for key, (title, x_title) in axes.items():
        if figures[key].data:
            _style(figures[key], x_title=x_title)
            found.append(Panel(key=key, title=title, figure=figures[key]))
    return found


def _points(seeds: Sequence[Sequence[Watched]], judged_on: str) -> list[dict[str, float]]:
    """Means over the seeds, at the steps that all of them have evaluated."""
    common = sorted(set.intersection(*({w.step for w in seed} for seed in seeds))) if seeds else []
    found = []
    for step in common:
        watched = [w for seed in seeds for w in seed if w.step == step]
        found.append(
            {
                "step": float(step),
                "length": float(np.mean([w.model.length_mean(judged_on) for w in watched])),
                "seconds": float(np.mean([w.seconds for w in watched])),
                "accuracy": float(np.mean([w.model.accuracy(judged_on) for w in watched])),
            }
        )
    return found


def _phases(variants: Sequence[VariantDynamics]) -> Panel | None:
    """Seconds of the last stage: one bar per variant, one colour per phase."""
    names = sorted(
        {name for variant in variants for name in variant.phases},
        key=lambda name: -sum(variant.phases.get(name, 0.0) for variant in variants),
    )
    if not names:
        return None
    shown = [variant for variant in reversed(variants) if variant.phases]
    figure = go.Figure()
    for position, name in enumerate(names):
        figure.add_trace(
            go.Bar(
                x=[variant.phases.get(name, 0.0) for variant in shown],
                y=[variant.label for variant in shown],
                orientation="h",
                name=name,
                marker={"color": COLORS[position % len(COLORS)], "line": {"width": 0}},
            )
        )
    _style(figure, height=150 + 30 * len(shown), x_title="seconds of the last stage, mean over seeds")
    figure.update_layout(barmode="stack", showlegend=True, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"})
    _name_rows(figure, [variant.label for variant in shown])
    return Panel(key="phases", title="time by phase", figure=figure, is_wide=True)


def _name_rows(figure: go.Figure, labels: Sequence[str]) -> None:
    """Show labels as text, never as dates or numbers, and wrap them, so that a phone has room for the figure."""
    texts = ["<br>".join(textwrap.wrap(label, _LABEL_WIDTH)) for label in labels]
    figure.update_yaxes(type="category", tickmode="array", tickvals=list(labels), ticktext=texts, automargin=True)
    figure.update_layout(margin={"l": 8})


def _line(
    figure: go.Figure, position: int, label: str, line: Line, *, opacity: float = 1.0, markers: bool = False
) -> None:
    figure.add_trace(
        go.Scatter(
            x=line[0],
            y=line[1],
            mode="lines+markers" if markers else "lines",
            line={"color": color_of(position), "width": 2 if opacity == 1.0 else 1, "dash": dash_of(position)},
            opacity=opacity,
            name=label,
            legendgroup=label,
            hoverinfo="skip" if opacity < 1.0 else None,
        )
    )


def _style(figure: go.Figure, *, x_title: str, height: int = 280) -> None:
    figure.update_layout(
        height=height,
        margin={"l": 48, "r": 12, "t": 8, "b": 40},
        **LOOK,
        showlegend=False,
        xaxis={"title": {"text": x_title}},
        hovermode="closest",
    )
