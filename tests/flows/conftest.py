"""One temporary Prefect server for all flow tests."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.testing import utilities


@pytest.fixture(scope="session", autouse=True)
def prefect_server(prefect_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(prefect_database, folder / "prefect-test.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utilities, "mkdtemp", lambda: str(folder))
        with utilities.prefect_test_harness(server_startup_timeout=120):
            yield
