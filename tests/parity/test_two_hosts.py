"""Ranks on two hosts of a DeepSpeed hostfile, over SSH: they train as one process does, and end together."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from parity.ranks import gaps, make_batch, needs_deepspeed, plain_trainer, rank_processes, ranks, train
from two_hosts import NAMES, TwoHosts, processes_on, two_hosts, why_not

from kdrl_core.config import resolve_path
from kdrl_core.errors import EngineError
from kdrl_core.models.loading import load_tokenizer

pytestmark = [
    pytest.mark.slow,
    needs_deepspeed,
    pytest.mark.skipif(why_not() is not None, reason=f"two hosts on this machine: {why_not()}"),
]
STUDENT = resolve_path("builtin:miniature/student")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    with two_hosts(tmp_path_factory.mktemp("hosts") / "two") as hosts, pytest.MonkeyPatch.context() as patch:
        for name, value in hosts.environment.items():
            patch.setenv(name, value)
        yield hosts


def places(folder: Path) -> dict[str, str]:
    """Rank → the host that it runs on."""
    on = {pid: name for name in NAMES for pid in processes_on(name)}
    return {rank: on[pid] for rank, pid in rank_ids(folder).items()}


def rank_ids(folder: Path) -> dict[str, int]:
    """Rank → process id."""
    started = [(process.pid, process.environ()) for process in rank_processes(folder)]
    return {environment["RANK"]: pid for pid, environment in started if "RANK" in environment}


def nothing_is_left() -> None:
    """Hosts hear of an end over the wire; one may still be starting its rank."""
    deadline = time.monotonic() + 30
    while any(processes_on(name) for name in NAMES) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [processes_on(name) for name in NAMES] == [set(), set()]


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_ranks_on_two_hosts_train_as_one_process(zero_stage: int, hosts: TwoHosts, tmp_path: Path) -> None:
    tokenizer: Any = load_tokenizer(STUDENT)
    batches = [make_batch(seed) for seed in range(2)]
    expected = train(plain_trainer(STUDENT, tokenizer), batches)
    folder = tmp_path / "ranks"
    with ranks(STUDENT, tokenizer, folder, zero_stage=zero_stage, hostfile=str(hosts.hostfile)) as trainer:
        assert places(folder) == {"0": NAMES[0], "1": NAMES[1]}
        found = gaps(train(trainer, batches), expected)
    print(f"two hosts, ZeRO-{zero_stage}: {found}")
    assert max(found.values()) < 1e-4
    nothing_is_left()


def test_a_rank_killed_on_another_host_ends_all(hosts: TwoHosts, tmp_path: Path) -> None:
    folder = tmp_path / "ranks"
    with ranks(STUDENT, load_tokenizer(STUDENT), folder, hostfile=str(hosts.hostfile)) as trainer:
        trainer.update(make_batch(0))
        victim = rank_ids(folder)["1"]
        os.kill(victim, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(EngineError, match=rf"update at step 1: rank 1 \(pid {victim} on {NAMES[1]}\)"):
            trainer.update(make_batch(1))
        assert time.monotonic() - started < 30
    nothing_is_left()


def test_a_host_that_cannot_be_reached_is_told(hosts: TwoHosts, tmp_path: Path) -> None:
    unknown = tmp_path / "hosts"
    unknown.write_text(f"{NAMES[0]} slots=1\nkdrl-node-9 slots=1\n")
    with (
        pytest.raises(EngineError, match=r"(?s)ranks \[1\] of 2 did not call back in time; .*kdrl-node-9") as told,
        ranks(STUDENT, load_tokenizer(STUDENT), tmp_path / "ranks", hostfile=str(unknown), start_timeout_s=30.0),
    ):
        pass
    print(told.value)
    nothing_is_left()
