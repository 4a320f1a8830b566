"""Shared by all tests: nothing outside the temporary folder is read or written, and torch keeps to one thread."""

import gc
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.update({"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "HF_HUB_OFFLINE": "1"})
for name in ("PREFECT_API_URL", "PREFECT_HOME", "KDRL_ARTIFACTS"):
    os.environ.pop(name, None)
# A shell's background job ignores SIGINT, and `nohup` SIGHUP; so would the programs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

_LONGEST = (
    "crash/test_crash_kill.py",
    "unit/verify/test_verify_pool.py",
    "e2e/test_demo.py",
    "e2e/test_signals.py",
    "unit/boxes/test_steps_resume.py",
    "crash/test_damage.py",
    "parity/test_parity_deepspeed.py",
    "unit/cli/test_cli_verify.py",
    "unit/ui/test_ui_pages.py",
    "flows/test_alarms.py",
    "flows/test_cancelling.py",
    "unit/verify/test_verify_agreement.py",
    "flows/test_full_pipeline.py",
    "unit/tracking/test_tracking.py",
    "unit/ledger/test_ledger_graph.py",
    "unit/engines/test_http_scorer.py",
    "unit/data/test_data_qwen.py",
    "unit/data/test_data_assets.py",
    "unit/security/test_security_looking.py",
    "unit/cli/test_cli_prefect.py",
    "unit/cli/test_cli_evaluate.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker is left alone with one of them at the end."""
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_collection_finish() -> None:
    """Take what has been imported out of the garbage collector's sight: a collection would take a second. vLLM collects
    dozens of times, and would bring it all back."""
    from support import keep_from_gc

    keep_from_gc()
    gc.freeze = gc.unfreeze = lambda: None


@pytest.fixture
def artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An artifacts folder of the test's own."""
    folder = tmp_path / "artifacts"
    monkeypatch.setenv("KDRL_ARTIFACTS", str(folder))
    return folder


@pytest.fixture(scope="session")
def prefect_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of Prefect: to make it takes ten seconds of each start. Made once for all workers."""
    from filelock import FileLock

    from flows.private_prefect import private_environment

    folder = tmp_path_factory.getbasetemp()
    home = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "prefect"
    home.mkdir(exist_ok=True)
    with FileLock(home / "made.lock"):
        if not (home / "made").exists():
            command = [str(Path(sys.executable).with_name("prefect")), "server", "database", "upgrade", "--yes"]
            environment = private_environment(home, 0, os.environ)
            subprocess.run(command, cwd=home, env=environment, check=True, capture_output=True)
            (home / "made").touch()
    return home / "prefect.db"


@pytest.fixture(autouse=True)
def core_log_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """By caplog, also where flows have been imported, which take the log of kdrl_core to themselves."""
    monkeypatch.setattr(logging.getLogger("kdrl"), "propagate", True)


@pytest.fixture
def own_estimators() -> Iterator[None]:
    """Estimators that a test registers or loads are unknown to the next one."""
    from kdrl_core.objectives.kinds import ESTIMATORS
    from kdrl_core.objectives.kl import KL_ESTIMATORS

    known = set(ESTIMATORS)
    yield
    for added in set(ESTIMATORS) - known:
        del ESTIMATORS[added], KL_ESTIMATORS[added]


@pytest.fixture(scope="session")
def kept_verifier() -> Iterator[Any]:
    """One Verifier for all runs of this process."""
    from support import KeptVerifier

    from kdrl_core.verify import Verifier

    verifier = KeptVerifier(workers=1)
    yield verifier
    Verifier.close(verifier)


@pytest.fixture
def fast_sessions(kept_verifier: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sessions that share the Verifier; closed before and after the test."""
    from kdrl_core.boxes import session

    session.close_sessions()
    kept_verifier.share(monkeypatch)
    yield
    session.close_sessions()


@pytest.fixture(scope="session")
def r1_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """R1-Distill-Qwen's tokenizer, with the real vocabulary. Not to be changed."""
    return _qwen(tmp_path_factory, "r1-distill")


@pytest.fixture(scope="session")
def qwen_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2.5's tokenizer, with the real vocabulary. Not to be changed."""
    return _qwen(tmp_path_factory, "qwen2.5")


def _qwen(tmp_path_factory: pytest.TempPathFactory, kind: str) -> Path:
    from kdrl_core.models.qwen_tokenizer import build_qwen_tokenizer

    path = tmp_path_factory.mktemp(kind)
    build_qwen_tokenizer(kind).save_pretrained(path)
    return path
