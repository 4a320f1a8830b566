"""Ranks that fall silent or cannot come up, and a program that dies before its ranks.

A rank that is killed: test_parity_deepspeed.py, at the end of what its ranks do, because to start some takes so long.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from parity.ranks import make_batch, needs_deepspeed, processes_of, rank_processes, ranks
from tiny_run import open_tiny, rows, train
from torch.utils import cpp_extension

from kdrl_core.boxes.check import check_run
from kdrl_core.boxes.session import close_sessions
from kdrl_core.config import resolve_path
from kdrl_core.errors import EngineError
from kdrl_core.ledger import manifest_of
from kdrl_core.models.loading import load_tokenizer
from kdrl_core.training.extensions import KernelBaton

pytestmark = needs_deepspeed

_PROGRAM = """
import os, time
from pathlib import Path
from kdrl_core.config import resolve_path
from parity.ranks import ranks
with ranks(resolve_path("builtin:miniature/student"), None, Path(os.environ["RANKS"])):
    print("ready", flush=True)
    time.sleep(600)
"""

STUDENT = resolve_path("builtin:miniature/student")


def wait_until(is_so: Callable[[], bool], *, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline, f"not within {within_s} s"
        time.sleep(0.05)


@pytest.mark.slow
def test_ranks_end_with_a_program_that_is_killed(tmp_path: Path) -> None:
    """One rank is stopped, and so could not end by itself."""
    folder = tmp_path / "ranks"
    program = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RANKS": str(folder)},
    )
    try:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        assert len(processes_of(folder)) == 4  # guard, launcher, ranks
        rank_processes(folder)[0].suspend()
    finally:
        program.kill()
        program.communicate()
    wait_until(lambda: processes_of(folder) == [], within_s=10)


def test_ranks_that_do_not_come_up_in_time(tmp_path: Path) -> None:
    started = time.monotonic()
    with (
        pytest.raises(EngineError, match=r"ranks \[0, 1\] of 2 did not call back in time; .* trainer.start_timeout_s"),
        ranks(STUDENT, None, tmp_path / "ranks", start_timeout_s=0.5),
    ):
        pass
    assert time.monotonic() - started < 5
    assert processes_of(tmp_path / "ranks") == []


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where DeepSpeed's communication is built by the ranks of this test: a copy of what there is of it."""
    name = "deepspeed_shm_comm"
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    folder = tmp_path / "extensions" / name
    for found in [*Path(root).glob(name), *Path(root).glob(f"*/{name}")][:1]:
        shutil.copytree(found, folder)  # with its times, so that nothing is built again
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder.parent))
    return folder


@pytest.mark.slow
def test_ranks_start_after_others_were_killed_while_they_built(tmp_path: Path, built: Path) -> None:
    """PyTorch's lock is a file: whoever is killed while holding it leaves it for ever."""
    (built / "lock").touch()
    with ranks(STUDENT, load_tokenizer(STUDENT), tmp_path / "ranks") as trainer:
        trainer.update(make_batch(0))
    assert (built / "lock").exists()  # not ours to delete
    assert (built / "lock.kernel").exists()
    assert list(built.glob("*.so"))


@pytest.mark.slow
def test_ranks_that_wait_say_for_what(tmp_path: Path, built: Path) -> None:
    lock = KernelBaton(str(built / "lock"))
    lock.try_acquire()
    try:
        with (
            pytest.raises(
                EngineError, match=r"(?s)\[0, 1\] of 2 gave no answer within 30 s; .*extensions.py.*try_acquire"
            ),
            ranks(STUDENT, None, tmp_path / "ranks", start_timeout_s=30.0),
        ):
            pass
    finally:
        lock.release()


@pytest.mark.slow
def test_a_run_whose_trainer_is_deepspeed(artifacts: Path, fast_sessions: None) -> None:
    """Trained here by one process, there by two ranks from its checkpoint on: the trainer may change on resume."""
    name, last = "ranks", ["stage1=null", "stage2.steps=3"]
    run = open_tiny(artifacts, name, last)
    train(run, until=("stage2", 1))
    changed = ["trainer.engine=deepspeed", "trainer.ranks=2", "trainer.zero_stage=3", "trainer.start_timeout_s=300"]
    run = open_tiny(artifacts, name, [*last, *changed])
    train(run)
    close_sessions()
    assert not run.paths.scratch.exists()
    found = rows(run.paths.metrics("stage2"))
    assert [row["step"] for row in found] == [0, 1, 2]
    assert all(row["engine/logprob_gap_max"] < 1e-4 for row in found)
    assert (run.paths.checkpoint("stage2", 3) / "trainer" / "state.json").is_file()
    assert check_run(run).findings == []
    saved_aside = "checkpoints/stage2/step-000002"
    assert (
        manifest_of(run.paths.rollouts("stage2", 2)).inputs[saved_aside]
        == manifest_of(run.paths.root / saved_aside).sha256
    )


@pytest.mark.slow
def test_a_silent_rank_is_given_up(tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    with ranks(STUDENT, None, folder, step_timeout_s=3.0) as trainer:
        rank_processes(folder)[0].suspend()
        started = time.monotonic()
        with pytest.raises(EngineError, match=r"gave no answer within 3 s; raise trainer.step_timeout_s"):
            trainer.update(make_batch(0))
        assert time.monotonic() - started < 6
        assert processes_of(folder) == []


@pytest.mark.slow
def test_closing_ends_a_save_in_another_thread(tmp_path: Path) -> None:
    """As an interrupt does; the save itself would never end."""
    folder = tmp_path / "ranks"
    with ranks(STUDENT, None, folder) as trainer, ThreadPoolExecutor(1) as thread:
        rank_processes(folder)[0].suspend()
        saved = thread.submit(trainer.save, tmp_path)
        time.sleep(0.5)
        assert not saved.done()
        started = time.monotonic()
        trainer.close()
        assert saved.exception(5.0) is not None
        assert time.monotonic() - started < 5
        assert processes_of(folder) == []


@pytest.mark.slow
def test_a_launcher_that_is_killed_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    with ranks(STUDENT, None, folder) as trainer:
        launcher = rank_processes(folder)[0].parent()
        assert launcher is not None
        launcher.kill()
        with pytest.raises(EngineError, match=r"rank \d .* ended with signal SIGKILL"):
            trainer.update(make_batch(0))


@pytest.mark.slow
def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(EngineError, match=rf"(?s)start: rank 0 .* failed: .*{port}.*(EADDRINUSE|already in use)"),
            ranks(STUDENT, None, tmp_path / "ranks", master_port=port),
        ):
            pass


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    with (
        pytest.raises(EngineError, match=r"start: rank \d .* failed: ModelError: .*nowhere"),
        ranks(tmp_path / "nowhere", None, tmp_path / "ranks"),
    ):
        pass
