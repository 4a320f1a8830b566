"""Prefect's empty database for the programs under test: to make it takes ten seconds of each start."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows.private_prefect import private_environment


@pytest.fixture(scope="session")
def prefect_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("prefect")
    subprocess.run(
        [Path(sys.executable).with_name("prefect"), "server", "database", "upgrade", "--yes"],
        cwd=home,
        env=private_environment(home, 0, os.environ),
        check=True,
        capture_output=True,
    )
    return home / "prefect.db"


@pytest.fixture
def artifacts(artifacts: Path, prefect_database: Path) -> Path:
    """An artifacts folder of the test's own, with such a database."""
    home = artifacts / "prefect"
    home.mkdir(parents=True)
    shutil.copy(prefect_database, home)
    return artifacts
