"""The comparison of a sweep's cells, or of any runs, as files: an HTML page, Markdown, CSV and JSON.

It can be written at any time, also while the runs go on."""

import json
from contextlib import suppress
from pathlib import Path

from kdrl_core.config import Recipe, load_recipe
from kdrl_core.errors import RecipeError
from kdrl_core.ledger import replace_file
from kdrl_core.look.sweeps.aggregate import build_table
from kdrl_core.look.sweeps.dynamics import read_dynamics
from kdrl_core.look.sweeps.page import render_markdown, render_page
from kdrl_core.look.sweeps.results import SweepResults, read_results_of
from kdrl_core.look.sweeps.state import SweepPaths, cell_status, read_record
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
    return read_results_of(name, spec.description, spec.recipe, statuses, claims=spec.claims, recipes=recipes)


def write_sweep_report(name: str) -> SweepTable:
    """Write the report of a started sweep to its folder and return its tables."""
    return write_comparison(read_sweep(name), SweepPaths.of(name).report, stem="sweep")


def write_comparison(results: SweepResults, folder: Path, *, stem: str) -> SweepTable:
    """Write `<stem>.html`, `.md`, `.csv` and `.json`, replacing existing ones, and return the tables.

    Raises:
        StorageError: the folder cannot be written.
    """
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
