"""The report of one run: report.html (self-contained), report.md and summary.json."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from kdrl_core.boxes.make import Product, box
from kdrl_core.config import dump_recipe
from kdrl_core.data import FilterReport
from kdrl_core.ledger import Run
from kdrl_core.ledger.graph import REPORT
from kdrl_core.look.reporting.figures import dynamics_figure
from kdrl_core.look.reporting.run_summary import sample_responses, summarize
from kdrl_core.look.reporting.tables import tables_of

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
        "filters": _filter_reports(run),
        "samples": sample_responses(run, _NUM_SAMPLES),
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
