"""One finished tiny run for the tests that only look at it, and one Verifier for all runs."""

from collections.abc import Iterator

import pytest
from crash.tiny_run import finish, open_tiny, train
from support import KeptVerifier

from kdrl_core.ledger import Run
from kdrl_core.steps import session
from kdrl_core.steps.session import close_sessions
from kdrl_core.verify import Verifier


@pytest.fixture(scope="session")
def kept_verifier() -> Iterator[Verifier]:
    verifier = KeptVerifier(workers=1)
    yield verifier
    Verifier.close(verifier)


@pytest.fixture
def fast_sessions(kept_verifier: Verifier, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sessions that share the Verifier; closed before and after the test."""
    close_sessions()
    monkeypatch.setattr(session, "Verifier", lambda **_: kept_verifier)
    yield
    close_sessions()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Both stages, evaluation, export and report. Not to be changed."""
    run = open_tiny(tmp_path_factory.mktemp("finished"), "whole")
    train(run)
    finish(run)
    yield run
    close_sessions()
