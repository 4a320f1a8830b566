"""What several tests share."""

import gc
import http.client
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from kdrl_core.verify import Verifier

MARK = "KDRL_TEST_MARK"
"""Environment variable by which a test finds the processes of a program it started."""

_PATIENCE_S = 10.0


def script(name: str) -> ModuleType:
    """benchmarks/<name>.py, which is in no package."""
    file = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@contextmanager
def small_disk(folder: Path, *, mib: int) -> Iterator[Path]:
    """A real file system of so many MiB at `folder`; the test is skipped where none can be mounted."""
    folder.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("only root can mount a small tmpfs")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:  # lazy: a writer that failed may hold its file
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def benchmarks(*names: str, samples: int, max_problems: int) -> str:
    """An override: some of the miniature's benchmarks in place of all, and few problems of each."""
    fields = f"samples: {samples}, max_problems: {max_problems}"
    rows = (f"{{name: {name}, file: 'builtin:miniature/benchmarks/{name}.jsonl', {fields}}}" for name in names)
    return f"evaluation.benchmarks=[{', '.join(rows)}]"


TINY = [
    "stage1.steps=2",
    "stage2.steps=3",
    *(f"{stage}.{field}" for stage in ("stage1", "stage2") for field in ("prompts_per_step=4", "mini_batch_prompts=4")),
    *(f"{stage}.{field}" for stage in ("stage1", "stage2") for field in ("group_size=4", "evaluate_every=2")),
    *(f"{stage}.max_response_tokens=32" for stage in ("stage1", "stage2")),
    benchmarks("test", "validation", samples=1, max_problems=8),
    "evaluation.max_context_tokens=40",
]
"""Overrides that make the miniature a matter of seconds."""


_freeze = gc.freeze


def keep_from_gc() -> None:
    """No collection looks at what there is now."""
    gc.collect()
    _freeze()


class KeptVerifier(Verifier):
    """Outlives those who close it, so that its workers import math-verify once for many tests."""

    def close(self) -> None:
        """Do nothing; `Verifier.close(kept)` ends it."""

    def share(self, patch: pytest.MonkeyPatch) -> None:
        """Training and evaluations in this process have it for theirs."""
        from kdrl_core.boxes import session
        from kdrl_core.evaluation import answering

        for module in (session, answering):
            patch.setattr(module, "Verifier", lambda **_: self)


def left_behind(mark: str) -> list[str]:
    """Command lines of live processes that inherited `KDRL_TEST_MARK=mark` from a program under test.

    The guard of a program ends a moment after it, so a few seconds are given.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while (found := _marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def _marked(mark: str) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def assert_only_private_servers(mark: str) -> None:
    """Programs that inherited `KDRL_TEST_MARK=mark` listen on loopback alone, and Prefect's API allows no web page of
    another origin to read it."""
    servers = set()
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get(MARK) == mark:
                sockets = process.net_connections(kind="inet")
                servers |= {(s.laddr.ip, s.laddr.port) for s in sockets if s.status == psutil.CONN_LISTEN}
    assert {ip for ip, _ in servers} == {"127.0.0.1"}
    allowed = []
    for ip, port in servers:
        connection = http.client.HTTPConnection(ip, port, timeout=10)
        with suppress(http.client.RemoteDisconnected):  # a worker listens to its flow runs, and speaks no HTTP
            connection.request("GET", "/api/health", headers={"Origin": "http://evil.example"})
            allowed.append(connection.getresponse().getheader("access-control-allow-origin"))
        connection.close()
    assert allowed == [None]
