"""The report of a sweep as one HTML page that needs no network: tables, figures, recipes, samples."""

import json
import re
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from plotly.offline import get_plotlyjs

from kdrl_core.look.sweeps.dynamics import SweepDynamics
from kdrl_core.look.sweeps.figures import color_of, dash_of, panels_of
from kdrl_core.look.sweeps.results import SweepResults
from kdrl_core.look.sweeps.table import SweepTable


def render_page(table: SweepTable, results: SweepResults, dynamics: SweepDynamics) -> str:
    """The page. For an unfinished sweep it lists what is missing.

    Texts of models and data are escaped: Jinja does so in the page, `_for_script` in the figures' JSON.
    """
    environment = Environment(
        loader=PackageLoader("kdrl_core.look.sweeps"), autoescape=select_autoescape(["html.j2"]), trim_blocks=True
    )
    panels = panels_of(table, results, dynamics)
    context: dict[str, Any] = {
        "table": table,
        "tables": table.tables(),
        "num_cells": len(results.statuses),
        "panels": panels,
        "figures": _for_script({panel.key: json.loads(panel.figure.to_json()) for panel in panels}),
        "legend": [
            (variant.label, color_of(position), dash_of(position)) for position, variant in enumerate(dynamics.variants)
        ],
        "dynamics": dynamics,
        "plotly": get_plotlyjs(),
    }
    return environment.get_template("sweep.html.j2").render(**context)


def render_markdown(table: SweepTable, results: SweepResults, dynamics: SweepDynamics) -> str:
    """The page without its figures. Texts of models and data stand in code blocks, so that none is markup."""
    done = f"{len(table.cells)} of {len(results.statuses)} runs are finished."
    parts = [table.to_markdown().rstrip(), done]
    if dynamics.filters:
        parts.append("## Data filter")
        parts += [part for stage, text in dynamics.filters.items() for part in (f"{stage}:", _block(text))]
    parts.append("## Recipes\n\nFields in which a variant differs from the first one.")
    for position, variant in enumerate(dynamics.variants):
        none = "the first variant" if position == 0 else "none"
        parts += [f"### {_plain(variant.label)}", _block("\n".join(variant.differences) or none)]
    parts.append("## Environment")
    parts += [_block(f"{text}\n{', '.join(runs)}") for text, runs in dynamics.environments.items()]
    parts.append("## Responses")
    for variant in dynamics.variants:
        parts += [f"### {_plain(variant.label)}"] if variant.samples else []
        for row in variant.samples:
            told = f"{row['verdict']} ({row['reason']}), truth {row['ground_truth']}, {row['length']} tokens"
            parts.append(_block(f"{row['benchmark']}: {row['question']}\n{row['response']}\n{told}"))
    return "\n\n".join(parts) + "\n"


def _block(text: str) -> str:
    """A code block. Its fence has more backticks than any run in the text, so the text cannot end it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _plain(label: str) -> str:
    return "".join(f"\\{character}" if character in r"\`*_[]<>#|" else character for character in label)


def _for_script(value: Any) -> str:
    """JSON without characters that could end a script element."""
    text = json.dumps(value, ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
