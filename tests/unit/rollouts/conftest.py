"""A small run of three whole steps."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from rollout_runs import make_run

from kdrl_core.ledger import Run
from kdrl_core.look.rollouts.query import RolloutStore


@pytest.fixture
def run(artifacts: Path) -> Run:
    """Three steps of stage2, of six responses each."""
    return make_run(artifacts)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutStore]:
    """Such a run, opened once. Not to be changed."""
    run = make_run(tmp_path_factory.mktemp("whole"))
    with RolloutStore.open([run.paths.root]) as opened:
        yield opened


@pytest.fixture
def store(run: Run) -> Iterator[RolloutStore]:
    """The run, opened."""
    with RolloutStore.open([run.name]) as opened:
        yield opened
