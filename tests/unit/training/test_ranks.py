"""How a step is dealt to ranks, what is said to them, and who may call back. Without DeepSpeed."""

import base64
import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from parity.ranks import make_batch, with_topk

from kdrl_core import process_guard
from kdrl_core.training import rank_group
from kdrl_core.training.deepspeed_trainer import deal_batches, most_memory
from kdrl_core.training.deepspeed_worker import let_segments_grow
from kdrl_core.training.messages import RankWork, pack, share_of, unpack
from kdrl_core.training.rank_group import Reply, hang_up
from kdrl_core.training.torch_trainer import totals_of


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(1, 5))
def test_every_rank_has_as_many_passes_and_every_row_is_in_one(sizes: list[int], ranks: int) -> None:
    rows = iter(range(sum(sizes)))
    batches = [[next(rows) for _ in range(size)] for size in sizes]
    dealt, idle = deal_batches(batches, ranks=ranks)
    assert len({len(passes) for passes in dealt}) == 1
    real = [passes[: len(passes) - n] for passes, n in zip(dealt, idle, strict=True)]
    assert sorted(row for passes in real for part in passes for row in part) == list(range(sum(sizes)))
    assert all(part for passes in dealt for part in passes)
    assert sum(idle) == 0 or all(len(part) == 1 for passes in dealt for part in passes)


def test_dealing_golden() -> None:
    assert deal_batches([[1, 2], [0]], ranks=1) == ([[[1, 2], [0]]], [0])
    assert deal_batches([[4, 1], [2, 3, 0]], ranks=2) == ([[[4, 1]], [[2, 3, 0]]], [0, 0])
    # three batches for two ranks: the longest is halved
    assert deal_batches([[4, 1], [2, 3], [0]], ranks=2) == ([[[4, 1], [3]], [[2], [0]]], [0, 0])
    # one response for three ranks: two of them go through it for company
    assert deal_batches([[0]], ranks=3) == ([[[0]], [[0]], [[0]]], [0, 1, 1])


def test_a_connection_is_hung_up_while_another_thread_waits_for_it() -> None:
    """As Ctrl-C does while a checkpoint is saved. The ranks of other hosts end when they notice."""
    here, there = (Connection(end.detach()) for end in socket.socketpair())
    waiting = threading.Thread(target=wait, args=([here], 20.0))
    waiting.start()
    time.sleep(0.1)
    hang_up(here)
    assert there.poll(10.0)
    with pytest.raises(EOFError):
        there.recv_bytes()
    waiting.join(10.0)
    assert not waiting.is_alive()
    hang_up(here)  # once more does nothing
    there.close()


@pytest.mark.parametrize("has_topk", [False, True])
def test_work_survives_the_socket(has_topk: bool) -> None:
    batch = with_topk(make_batch(0)) if has_topk else replace(make_batch(0), rollout_logprobs=None)
    totals = totals_of(batch)
    work = share_of(batch, [[5, 2], [7]], num_idle=1, totals=totals)
    header, arrays = unpack(work.pack({"command": "update"}))
    assert header["command"] == "update"
    found = RankWork.unpack(header, arrays)
    assert found.passes == [[0, 1], [2]]
    assert found.num_idle == 1
    assert found.totals.tokens == totals.tokens
    rows = [5, 2, 7]
    assert found.totals.group_tokens == (
        None if totals.group_tokens is None else [totals.group_tokens[r] for r in rows]
    )
    for index, row in enumerate(rows):
        for name in ("prompt_token_ids", "token_ids"):
            assert list(getattr(found.batch.sequences[index], name)) == getattr(batch.sequences[row], name)
        assert found.batch.advantages[index] == batch.advantages[row]
        assert found.batch.kd_weights[index] == batch.kd_weights[row]
        for name in ("teacher_logprobs", "ref_logprobs", "rollout_logprobs", "topk_ids", "topk_logprobs"):
            ours, theirs = getattr(found.batch, name), getattr(batch, name)
            assert (ours is None) == (theirs is None)
            assert theirs is None or np.array_equal(ours[index], theirs[row])
    assert found.batch.objective == batch.objective
    assert (found.totals.kd_tokens, found.totals.num_groups) == (totals.kd_tokens, totals.num_groups)


def test_numbers_that_are_not_finite_survive() -> None:
    header, _ = unpack(pack({"grad_norm": float("nan"), "metrics": {"loss/total": float("-inf")}}))
    assert np.isnan(header["grad_norm"])
    assert header["metrics"]["loss/total"] == -np.inf


def call(address: tuple[str, int], key: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return rank_group.call_back({"address": address, "key": key})


@pytest.mark.parametrize("key", ["right", "wrong"])
def test_only_who_knows_the_key_is_let_in(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        caller = threading.Thread(
            target=lambda: found.append(rank_group._authenticate(server.accept()[0], b"right")), daemon=True
        )
        caller.start()
        environment = {"RANK": "1", "WORLD_SIZE": "2"}
        if key == "right":
            connection = call(server.getsockname(), key, environment, monkeypatch)
            caller.join(10)
            hello, _ = unpack(found[0].recv_bytes())
            assert (hello["rank"], hello["world_size"], hello["pid"]) == (1, 2, os.getpid())
            connection.close()
            found[0].close()
        else:
            with pytest.raises(Exception, match="digest"):
                call(server.getsockname(), key, environment, monkeypatch)
            caller.join(10)
            assert found == [None]


def test_a_silent_caller_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_group, "_HANDSHAKE_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        started = time.monotonic()
        assert rank_group._authenticate(server.accept()[0], b"key") is None
        assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (1, "status 1"),
        (247, "signal SIGKILL, which"),
        (137, "signal SIGKILL, which"),
        (-9, "signal SIGKILL, which"),
        (139, "signal SIGSEGV"),
        (-15, "signal SIGTERM"),
        (245, "signal SIGSEGV"),
    ],
)
def test_exit_statuses_are_told_in_words(code: int, text: str) -> None:
    assert process_guard.how_ended(code).startswith(text)


def test_a_ranks_memory_grows_in_segments_unless_the_user_says_otherwise() -> None:
    """It is decided before torch is imported, which reads the variable."""
    nothing: dict[str, str] = {}
    let_segments_grow(nothing)
    assert nothing == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    own = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}
    let_segments_grow(own)
    assert own == {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}
    program = "import sys, kdrl_core.training.deepspeed_worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_step_reports_the_rank_that_needs_most_memory() -> None:
    headers = [
        {"memory/peak_gib": 3.5, "memory/reserved_gib": 4.0},
        {"memory/peak_gib": 3.0, "memory/reserved_gib": 5.0},
    ]
    replies = [Reply(header={"memory": header}, arrays={}) for header in headers]
    assert most_memory(replies) == {"memory/peak_gib": 3.5, "memory/reserved_gib": 5.0}
    assert most_memory([Reply(header={"memory": {}}, arrays={})] * 2) == {}


def test_the_launcher_is_deepspeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    here = rank_group.launch_command(tmp_path / "spec", num_ranks=2, hostfile=None, master_port=29_000, device="cuda")
    assert here[1:3] == ["-m", "deepspeed.launcher.launch"]
    world = next(part for part in here if part.startswith("--world_info=")).removeprefix("--world_info=")
    assert json.loads(base64.urlsafe_b64decode(world)) == {"localhost": ["4", "6"]}
    there = rank_group.launch_command(tmp_path / "spec", num_ranks=16, hostfile="hosts", master_port=29_000)
    assert there[1:5] == ["-m", "deepspeed.launcher.runner", "--hostfile", "hosts"]


def test_a_guarded_command_ends_with_its_program() -> None:
    """The program starts the guard and is killed; the command, which ignores everything, ends all the same."""
    command = [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"]
    script = (
        "import os, subprocess, sys, time\n"
        f"guard = [sys.executable, '-I', {process_guard.__file__!r}, str(os.getpid()), *{command!r}]\n"
        "print(subprocess.Popen(guard, start_new_session=True).pid, flush=True); time.sleep(600)\n"
    )
    program = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None
    guard = psutil.Process(int(program.stdout.readline()))
    deadline = time.monotonic() + 10
    while not (children := guard.children()) and time.monotonic() < deadline:
        time.sleep(0.02)
    program.kill()
    program.communicate()
    gone, alive = psutil.wait_procs([guard, *children], timeout=10)
    assert len(gone) == 2
    assert not alive


@pytest.mark.parametrize(("body", "status"), [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_a_guard_ends_as_its_command(body: str, status: int) -> None:
    guard = [sys.executable, "-I", process_guard.__file__, str(os.getpid()), sys.executable, "-c", body]
    assert subprocess.run(guard, check=False, timeout=20).returncode == status
