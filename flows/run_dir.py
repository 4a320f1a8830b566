"""`run_dir`, the parameter of the stage flows. Anyone who may start a deployment sets it, so it must be checked."""

from pathlib import Path

from kdrl_core.errors import RunError
from kdrl_core.ledger import Run, artifacts_root, open_run
from tasks.secrets import register_blocks


def open_own_run(run_dir: str | Path) -> Run:
    """Open a run by its folder, which must lie in this worker's artifacts. Its recipe may name Prefect blocks. Raises
    RunError if the folder lies elsewhere, or `open_run` refuses it; nothing is written then."""
    register_blocks()
    runs = artifacts_root() / "runs"
    folder = Path(run_dir).absolute()
    if folder.parent != runs:
        raise RunError(
            f"run_dir {str(run_dir)!r} is no run of {runs}; give the folder of one, "
            "or set KDRL_ARTIFACTS for the worker to the folder that has its runs/"
        )
    return open_run(folder.name)
