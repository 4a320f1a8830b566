"""The report of one run: report.html (self-contained), report.md and summary.json."""

import json
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from jinja2 import Environment, PackageLoader, select_autoescape

from kdrl_core.config import dump_recipe
from kdrl_core.data import FilterReport
from kdrl_core.ledger import Run, find_intact, inputs_of, is_published, publish_directory, verify_published
from kdrl_core.ledger.graph import REPORT
from kdrl_core.ledger.labels import final_labels
from kdrl_core.look.reporting.figures import dynamics_figure
from kdrl_core.look.reporting.summary import summarize
from kdrl_core.look.reporting.tables import tables_of
from kdrl_core.tables.schemas import read_table

_NUM_SAMPLES = 3


def write_report(run: Run) -> Path:
    """Publish the report of a run whose models are all evaluated."""
    for label in final_labels(run):
        verify_published(run.paths.evaluation(label))
    find_intact(run.paths.report, is_exact=False)
    publish_directory(run.paths.report, lambda folder: render_report(run, folder), inputs=inputs_of(run, REPORT.node()))
    return run.paths.report


def render_report(run: Run, folder: Path) -> None:
    """Write the report's files to an existing folder."""
    environment = Environment(
        loader=PackageLoader("kdrl_core.look.reporting"), autoescape=select_autoescape(["html.j2"]), trim_blocks=True
    )
    summary = summarize(run)
    context: dict[str, Any] = {
        "summary": summary,
        "tables": tables_of(summary),
        "filters": _filter_reports(run),
        "samples": _samples(run),
        "recipe_yaml": dump_recipe(run.recipe),
        "manifest": json.loads(run.paths.manifest.read_text(encoding="utf-8")),
    }
    figure = dynamics_figure(run).to_html(
        full_html=False, include_plotlyjs=True, config={"responsive": True, "displaylogo": False}, div_id="dynamics"
    )
    html = environment.get_template("report.html.j2").render(**context, figure=figure)
    markdown = environment.get_template("report.md.j2").render(**context)
    (folder / "report.html").write_text(html, encoding="utf-8")
    (folder / "report.md").write_text(markdown, encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(summary.to_json(), indent=1) + "\n", encoding="utf-8")


def _filter_reports(run: Run) -> dict[str, FilterReport]:
    content = json.loads(run.paths.filter_report.read_text(encoding="utf-8"))
    return {stage: FilterReport.from_json(values) for stage, values in content.items()}


def _samples(run: Run) -> list[dict[str, Any]]:
    """A few responses of the finished student: the first right and the first wrong ones."""
    path = run.paths.evaluation(run.recipe.stages[-1])
    if not is_published(path):
        return []
    table = read_table(path / "responses.parquet")
    rows: list[dict[str, Any]] = []
    for right in (1.0, 0.0):
        rows += table.filter(pc.equal(table["accuracy_reward"], right)).slice(0, _NUM_SAMPLES).to_pylist()
    return rows
