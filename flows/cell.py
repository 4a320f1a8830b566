"""The program of a sweep's cell: `python -m flows.cell FLOW_RUN_ID`. Prefect is imported here, without the settings of
files in the working directory if its server is private."""

import sys

from flows.private_prefect import without_foreign_files

with without_foreign_files():
    import prefect.context  # noqa: F401 (reads the settings)

from flows.running_cells import run_cell

if __name__ == "__main__":
    sys.exit(run_cell(sys.argv[1]))
