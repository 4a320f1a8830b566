"""One finished tiny run for the tests that only look at it."""

from collections.abc import Iterator

import pytest
from crash.tiny_run import finish, open_tiny, train

from kdrl_core.boxes.session import close_sessions
from kdrl_core.ledger import Run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Both stages, evaluation, export and report. Not to be changed."""
    run = open_tiny(tmp_path_factory.mktemp("finished"), "whole")
    train(run)
    finish(run)
    yield run
    close_sessions()
