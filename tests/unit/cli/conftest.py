"""The installed program, with its artifacts below the test's folder."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked import Forked

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    """Where the program would put its runs; not made yet."""
    return tmp_path / "artifacts"


@pytest.fixture(scope="session")
def forked() -> Iterator[Forked]:
    """A process that has imported what commands import."""
    with Forked() as programs:
        yield programs


@pytest.fixture
def cli(forked: Forked, tmp_path: Path, artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """`cli("run", "--name", …)`: run the program and give back exit code, stdout and stderr."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "KDRL_"))}
    environment |= {"KDRL_ARTIFACTS": str(artifacts), "NO_COLOR": "1", "COLUMNS": "200", "TERM": "dumb"}

    def call(*arguments: str, cwd: Path = tmp_path, **extra: str) -> "subprocess.CompletedProcess[str]":
        folder = tmp_path_factory.getbasetemp()
        return forked.run(arguments, folder, cwd=cwd, environment={**environment, **extra}, timeout_s=120)

    return call
