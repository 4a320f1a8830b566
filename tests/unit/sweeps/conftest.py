"""Two finished tiny runs that sweeps could share between."""

import shutil
from pathlib import Path

import pytest
from crash.tiny_run import finish, open_tiny, train
from support import KeptVerifier

from kdrl_core.ledger import Run, open_run

GRPO = ["stage2.objective=grpo"]


@pytest.fixture(scope="session")
def donor_and_alone(tmp_path_factory: pytest.TempPathFactory, kept_verifier: KeptVerifier) -> tuple[Run, Run]:
    """A finished KDRL run, and a finished GRPO run that shared nothing. Not to be changed."""
    folder = tmp_path_factory.mktemp("sharing")
    with pytest.MonkeyPatch.context() as patch:
        kept_verifier.share(patch)
        runs = open_tiny(folder, "kdrl"), open_tiny(folder, "alone", GRPO)
        for run in runs:
            train(run)
            finish(run)
    return runs


@pytest.fixture
def copied_run(donor_and_alone: tuple[Run, Run], tmp_path: Path) -> Run:
    """A copy of the finished KDRL run in a folder of the test's own."""
    source = donor_and_alone[0].paths.root
    shutil.copytree(source, tmp_path / "artifacts" / "runs" / source.name)
    return open_run(source.name, artifacts=tmp_path / "artifacts")
