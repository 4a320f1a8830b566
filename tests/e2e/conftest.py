"""Prefect's empty database for the programs under test."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def artifacts(artifacts: Path, prefect_database: Path) -> Path:
    """An artifacts folder of the test's own, with such a database."""
    home = artifacts / "prefect"
    home.mkdir(parents=True)
    shutil.copy(prefect_database, home)
    return artifacts
