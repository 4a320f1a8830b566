"""The report of one run: report.html (self-contained), report.md and summary.json.

Its figure shows each metric as a faint raw line with its exponential moving average over it (Figures 2–5).
"""

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, select_autoescape
from plotly.subplots import make_subplots

from kdrl_core.boxes.make import Product, box
from kdrl_core.config import dump_recipe
from kdrl_core.config.paths import read_json
from kdrl_core.data import FilterReport
from kdrl_core.evaluation.results import read_results
from kdrl_core.ledger import Run, checkpoint_label, is_published
from kdrl_core.ledger.graph import REPORT
from kdrl_core.look.reporting.run_summary import filter_table, sample_responses, seconds_of, summarize, tables_of
from kdrl_core.tables.files import load_metrics

_NUM_SAMPLES = 3


@box(REPORT)
def report(run: Run) -> Product:
    """The report of a run whose models are all evaluated."""
    return Product(content=lambda folder: render_report(run, folder))


def render_report(run: Run, folder: Path) -> None:
    """Write the report's files to an existing folder."""
    environment = Environment(
        loader=PackageLoader("kdrl_core.look.reporting"), autoescape=select_autoescape(["html.j2"]), trim_blocks=True
    )
    summary = summarize(run)
    context: dict[str, Any] = {
        "summary": summary,
        "tables": tables_of(summary),
        "filters": filter_reports(run),
        "filter_table": filter_table,
        "samples": sample_responses(run, _NUM_SAMPLES),
        "recipe_yaml": dump_recipe(run.recipe),
        "manifest": read_json(run.paths.manifest),
    }
    figure = dynamics_figure(run).to_html(
        full_html=False, include_plotlyjs=False, config={"responsive": True, "displaylogo": False}, div_id="dynamics"
    )
    html = environment.get_template("report.html.j2").render(**context, figure=figure, plotly=plotly_js())
    markdown = environment.get_template("report.md.j2").render(**context)
    (folder / "report.html").write_text(html, encoding="utf-8")
    (folder / "report.md").write_text(markdown, encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(summary.to_json(), indent=1) + "\n", encoding="utf-8")


def plotly_js() -> str:
    """The script that draws a page's figures: Plotly's build with lines and bars, a quarter of the whole library."""
    return files(__package__).joinpath("static/plotly-basic.min.js").read_text(encoding="utf-8")


def filter_reports(run: Run) -> dict[str, FilterReport]:
    """The filter's counts by stage."""
    content = read_json(run.paths.filter_report)
    return {stage: FilterReport.from_json(values) for stage, values in content.items()}


_PANELS = [
    ("reward/mean", "training reward"),
    ("response/length_mean", "response length, tokens"),
    ("response/clip_ratio", "clip ratio"),
    ("kd/kl_unmasked", "KL to teacher, unmasked tokens"),
    ("entropy", "entropy, nats"),
    ("accuracy", "periodic accuracy, %"),
    ("beta", "β, weight of the KL to the teacher"),
    ("seconds", "seconds of a step"),
]
_SFT_PANEL = ("loss/sft", "SFT loss, nats a token")
_COLORS = {"stage1": "#7a869a", "stage2": "#2a78d6"}
_EMA = 0.8
LOOK: dict[str, Any] = {
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(128,128,128,0.06)",
    "font": {"family": "system-ui, sans-serif", "size": 12},
}
"""Layout of every figure."""


def ema(values: Sequence[float], *, weight: float = _EMA) -> list[float]:
    """Exponential moving average, debiased at its start. The paper does not name its weight; 0.8 is kdrl's choice."""
    smoothed, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        smoothed.append(total / norm)
    return smoothed


def dynamics_figure(run: Run) -> go.Figure:
    """One panel per metric. Stages follow each other on the step axis."""
    has_sft = any(run.recipe.stage(stage).objective == "sft" for stage in run.recipe.stages)
    panels = [*_PANELS, _SFT_PANEL] if has_sft else _PANELS
    num_rows = -(-len(panels) // 2)
    titles = [title for _, title in panels]
    figure = make_subplots(rows=num_rows, cols=2, subplot_titles=titles, vertical_spacing=0.3 / num_rows)
    offset = 0
    for stage in run.recipe.stages:
        rows = load_metrics(run, stage)
        for position, (name, _) in enumerate(panels):
            where = {"row": position // 2 + 1, "col": position % 2 + 1}
            if name == "accuracy":
                _add_accuracy(figure, run, stage, offset, where)
                continue
            values = [seconds_of(row) if name == "seconds" else row.get(name) for row in rows]
            known = {offset + row["step"]: value for row, value in zip(rows, values, strict=True) if value is not None}
            if known:  # a step of cut responses alone has no metrics of the loss
                _add_line(figure, stage, list(known), list(known.values()), where)
        offset += len(rows)
    for axis in figure.select_xaxes(lambda axis: axis.plotly_name != "xaxis"):
        axis.matches = "x"  # one step axis for all panels, so that they can be compared
    figure.update_xaxes(title_text="step", row=num_rows)
    figure.update_layout(
        height=80 + 260 * num_rows,
        margin={"l": 48, "r": 16, "t": 48, "b": 40},
        **LOOK,
        legend={"orientation": "h", "y": 1.08},
    )
    for annotation in figure.layout.annotations:
        annotation.font.size = 13
    return figure


def _add_line(figure: go.Figure, stage: str, steps: list[int], values: list[float], where: dict[str, int]) -> None:
    first = not any(trace.legendgroup == stage for trace in figure.data)  # one legend entry a stage
    line = {"color": _COLORS[stage]}
    common: dict[str, Any] = {"x": steps, "mode": "lines", "line": line, "legendgroup": stage}
    figure.add_trace(go.Scatter(y=values, opacity=0.25, showlegend=False, name=f"{stage} raw", **common), **where)
    figure.add_trace(go.Scatter(y=ema(values), showlegend=first, name=stage, **common), **where)


def _add_accuracy(figure: go.Figure, run: Run, stage: str, offset: int, where: dict[str, int]) -> None:
    points = []
    for step in range(1, run.recipe.stage(stage).steps + 1):
        path = run.paths.evaluation(checkpoint_label(stage, step))
        if is_published(path):
            benchmarks = read_results(path)["benchmarks"].values()
            points.append((offset + step, 100 * sum(b["accuracy"] for b in benchmarks) / len(benchmarks)))
    if points:
        steps, values = zip(*points, strict=True)
        figure.add_trace(
            go.Scatter(
                x=list(steps),
                y=list(values),
                mode="lines+markers",
                line={"color": _COLORS[stage]},
                legendgroup=stage,
                showlegend=False,
                name=stage,
            ),
            **where,
        )
