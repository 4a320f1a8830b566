"""The installed program in a process of its own, with its artifacts below the test's folder."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

KDRL = Path(sys.executable).with_name("kdrl")

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    """Where the program would put its runs; not made yet."""
    return tmp_path / "artifacts"


@pytest.fixture
def cli(tmp_path: Path, artifacts: Path) -> Cli:
    """`cli("run", "--name", …)`: run the program and give back exit code, stdout and stderr."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "KDRL_"))}
    environment |= {"KDRL_ARTIFACTS": str(artifacts), "NO_COLOR": "1", "COLUMNS": "200", "TERM": "dumb"}

    def call(*arguments: str, cwd: Path = tmp_path, **extra: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [KDRL, *arguments],
            cwd=cwd,
            env={**environment, **extra},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return call
