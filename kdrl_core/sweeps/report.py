"""The report of a sweep as files: sweep.html, sweep.md, sweep.csv, sweep.json. Made anew at any time, also while it
runs."""

import json

from kdrl_core.ledger import replace_file
from kdrl_core.sweeps.dynamics import read_dynamics
from kdrl_core.sweeps.page import render_page
from kdrl_core.sweeps.results import SweepResults, read_results_of
from kdrl_core.sweeps.state import SweepPaths, cell_status, read_record
from kdrl_core.sweeps.table import SweepTable, build_table


def read_sweep(name: str) -> SweepResults:
    """What a started sweep has come to so far. Raises RunError if it was not started."""
    record, paths = read_record(name), SweepPaths.of(name)
    statuses = [cell_status(paths, cell) for cell in record.cells]
    return read_results_of(name, record.spec.description, record.spec.recipe, statuses)


def write_sweep_report(name: str) -> SweepTable:
    """Write the report of a started sweep to its folder and return its tables."""
    results = read_sweep(name)
    table = build_table(results)
    folder = SweepPaths.of(name).report
    files = {
        "sweep.html": render_page(table, results, read_dynamics(results)),
        "sweep.md": table.to_markdown(),
        "sweep.csv": table.to_csv(),
        "sweep.json": json.dumps(table.to_json(), indent=1, ensure_ascii=False) + "\n",
    }
    for file, text in files.items():
        replace_file(folder / file, text.encode())
    return table
