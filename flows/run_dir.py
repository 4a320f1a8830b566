"""`run_dir`, the parameter of the stage flows: whoever may start a deployment gives it, so it may not lead anywhere."""

from pathlib import Path

from kdrl_core.errors import RunError
from kdrl_core.ledger import Run, artifacts_root, open_run
from tasks.secrets import register_blocks


def open_own_run(run_dir: str | Path) -> Run:
    """Open a run by its folder, which has to be one of this worker's artifacts; its recipe may name Prefect blocks.

    Raises:
        RunError: it lies elsewhere, or as `open_run` does. Nothing was written.
    """
    register_blocks()
    runs = artifacts_root() / "runs"
    folder = Path(run_dir).absolute()
    if folder.parent != runs:
        raise RunError(
            f"run_dir {str(run_dir)!r} is no run of {runs}; give the folder of one, "
            "or set KDRL_ARTIFACTS for the worker to the folder that has its runs/"
        )
    return open_run(folder.name)
