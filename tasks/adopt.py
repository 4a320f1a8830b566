"""Other runs ─▶ adopt ─▶ what they have done already of the same work."""

from collections.abc import Sequence

from prefect import task

from kdrl_core.boxes.sharing import adopt_parts
from kdrl_core.ledger import open_run_dir
from tasks.boxes import STEP_OPTIONS


def adopt(run_dir: str, donors: Sequence[str] | None) -> None:
    """Take over the parts that `donors` have finished and the run has not; no task without donors."""
    if donors:
        adopt_from(run_dir, list(donors))


@task(name="adopt", **STEP_OPTIONS)
def adopt_from(run_dir: str, donors: list[str]) -> dict[str, str]:
    """Returns part → run that it was taken over from."""
    return adopt_parts(open_run_dir(run_dir), donors)
