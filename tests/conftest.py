"""Shared by all tests: nothing outside the temporary folder is read or written, and torch keeps to one thread."""

import os
from pathlib import Path

import pytest

os.environ.update({"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "HF_HUB_OFFLINE": "1"})
for name in ("PREFECT_API_URL", "PREFECT_HOME", "KDRL_ARTIFACTS"):
    os.environ.pop(name, None)


@pytest.fixture
def artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An artifacts folder of the test's own."""
    folder = tmp_path / "artifacts"
    monkeypatch.setenv("KDRL_ARTIFACTS", str(folder))
    return folder
