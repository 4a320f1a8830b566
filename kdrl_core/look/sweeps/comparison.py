"""The comparison of a sweep's cells, or of any runs, as files: an HTML page that needs no network, Markdown, CSV
and JSON. It can be written at any time, also while the runs go on.

Runs that differ only in their seed are one variant.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from kdrl_core.config import Recipe, TrackingConfig, config_hash, load_recipe
from kdrl_core.config.alarms import AlarmsConfig
from kdrl_core.errors import RecipeError, RunError
from kdrl_core.ledger import Run, open_run, replace_file
from kdrl_core.look.reporting.run_report import plotly_js
from kdrl_core.look.sweeps.aggregate import build_table
from kdrl_core.look.sweeps.claims import claims_of
from kdrl_core.look.sweeps.dynamics import SweepDynamics, read_dynamics
from kdrl_core.look.sweeps.figures import color_of, dash_of, panels_of
from kdrl_core.look.sweeps.results import SweepResults, read_results_of
from kdrl_core.look.sweeps.state import CellStatus, SweepPaths, cell_status, list_started, read_record, state_of
from kdrl_core.look.sweeps.table import SweepTable


def read_sweep(name: str) -> SweepResults:
    """The results of a started sweep so far. Raises RunError if it was not started."""
    record, paths = read_record(name), SweepPaths.of(name)
    statuses = [cell_status(paths, cell) for cell in record.cells]
    recipes: dict[str, Recipe] = {}
    for cell in record.cells:
        if cell.variant not in recipes:
            with suppress(RecipeError):  # lost or edited: a run that has begun has its own copy
                recipes[cell.variant] = load_recipe(paths.recipe(cell.run))
    spec = record.spec
    judged = claims_of(spec.claims, spec.judged_on, {cell.variant: recipes.get(cell.variant) for cell in record.cells})
    return read_results_of(name, spec.description, spec.recipe, statuses, judged=judged, recipes=recipes)


def write_sweep_report(name: str) -> SweepTable:
    """Write the report of a started sweep to its folder and return its tables."""
    return write_comparison(read_sweep(name), SweepPaths.of(name).report, stem="sweep")


def write_comparison(results: SweepResults, folder: Path, *, stem: str) -> SweepTable:
    """Write `<stem>.html`, `.md`, `.csv` and `.json`, replacing existing ones, and return the tables. Raises
    StorageError if the folder cannot be written."""
    table, dynamics = build_table(results), read_dynamics(results)
    files = {
        f"{stem}.html": render_page(table, results, dynamics),
        f"{stem}.md": render_markdown(table, results, dynamics),
        f"{stem}.csv": table.to_csv(),
        f"{stem}.json": json.dumps(table.to_json(), indent=1, ensure_ascii=False) + "\n",
    }
    for file, text in files.items():
        replace_file(folder / file, text.encode())
    return table


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
        "plotly": plotly_js(),
    }
    return environment.get_template("sweep.html.j2").render(**context)


def render_markdown(table: SweepTable, results: SweepResults, dynamics: SweepDynamics) -> str:
    """The page without its figures. Texts of models and data are in code blocks, so that they cannot act as markup."""
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


_SAME = {"seed": 0, "name": "recipe", "description": "", "alarms": AlarmsConfig(), "tracking": TrackingConfig()}
"""Fields in which the runs of one variant may differ."""


def read_runs(names: Sequence[str], labels: Mapping[str, str] | None = None) -> SweepResults:
    """The results of runs so far, finished or not. `names` are in the order of their variants. `labels`: run → name of
    its variant; default: the run's name, or for several seeds the first run's name without its number.

    Raises RunError if a run does not exist, a label names a run that is not in `names`, one variant gets two labels, or
    two variants get the same label.
    """
    labels = labels or {}
    for name in labels:
        if name not in names:
            raise RunError(f"--label {name}=…: '{name}' is not among the runs of the report; name it as well")
    runs = [_open(name) for name in dict.fromkeys(names)]
    statuses, recipes = [], {}
    for label, group in _variants(runs, labels):
        recipes[label] = group[0].recipe
        for run in group:
            state, detail = state_of(run.name)
            statuses.append(CellStatus(run=run.name, variant=label, seed=run.recipe.seed, state=state, detail=detail))
    recipe = ", ".join(dict.fromkeys(run.recipe.name for run in runs))
    title = _listed(dict.fromkeys(status.variant for status in statuses), "variants", max_chars=80)
    listed = _listed([run.name for run in runs], "runs", max_chars=200)
    return read_results_of(title, listed if listed != title else "", recipe, statuses, recipes=recipes)


def _listed(names: Collection[str], what: str, *, max_chars: int) -> str:
    text = ", ".join(names)
    return text if len(text) <= max_chars else f"{len(names)} {what}"


def _open(name: str) -> Run:
    try:
        return open_run(name)
    except RunError:
        if name in list_started():
            raise RunError(f"'{name}' is a sweep, not a run; for its report: kdrl sweep report {name}") from None
        raise


def _variants(runs: Sequence[Run], labels: Mapping[str, str]) -> list[tuple[str, list[Run]]]:
    """Runs by recipe, with the label of each recipe. A second run of the same recipe and seed is another variant."""
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        same = config_hash(run.recipe.model_copy(update=_SAME))
        turn = sum(run.recipe.seed == other.recipe.seed for key, g in groups.items() if key[0] == same for other in g)
        groups.setdefault((same, turn), []).append(run)
    found = [(_label(group, labels), group) for group in groups.values()]
    taken = [label for label, _ in found]
    for label in labels.values():
        if taken.count(label) > 1:
            raise RunError(f"--label: '{label}' would be the name of two variants; give one of them another")
    return [(label if taken.count(label) == 1 else group[0].name, group) for label, group in found]


def _label(group: Sequence[Run], labels: Mapping[str, str]) -> str:
    given = list(dict.fromkeys(labels[run.name] for run in group if run.name in labels))
    if len(given) > 1:
        raise RunError(
            f"--label: '{given[0]}' and '{given[1]}' are for runs of one variant, which differ in their seed alone; "
            "give one of them"
        )
    if given:
        return given[0]
    if len(group) == 1:
        return group[0].name
    return re.sub(r"[-_.]*(seed)?[-_.]*\d+$", "", group[0].name) or group[0].name
