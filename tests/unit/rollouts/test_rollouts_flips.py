"""Single flipped bits in the index of a run, and in its files: figures are right, or damage is named."""

import logging
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from rollout_runs import make_run, part_path

from kdrl_core.ledger import Run
from kdrl_core.look.rollouts.index import RunIndex
from kdrl_core.look.rollouts.query import RolloutFilter, RolloutStore
from kdrl_core.look.ui.app import create_app

FLIPS = 9
"""In each file, at random places. Below them, as many in the last bytes, where Parquet has its footer."""
SQL = "select step, count(*), sum(reward), sum(length), sum(kl_sum), max(seed) from rollouts group by 1 order by 1"
OURS = "select stage, avg(advantage) a, max(response_preview) p from rows group by 1"
ADDRESSES = (
    "/api/steps",
    "/api/rollouts?sort=kl_mean&descending=true",
    "/api/rollouts?text=number&limit=2",
    "/api/rollout?run=small&stage=stage2&step=1&prompt_id=q-b&sample=1",
    "/api/prompt?run=small&prompt_id=q-b",
)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """A run with an index, and the figures of it. Not to be changed."""
    run = make_run(tmp_path_factory.mktemp("flips"))
    RunIndex(run.paths.root).refresh()
    return run.paths.root, figures(run.paths.root)


@pytest.fixture
def copied(indexed: tuple[Path, list[Any]], tmp_path: Path) -> Path:
    """A copy of the run that may be harmed."""
    return Path(shutil.copytree(indexed[0], tmp_path / "small"))


def figures(root: Path) -> list[Any]:
    """What the commands and the pages show of a run."""
    with RolloutStore.open([root]) as store:
        client = TestClient(create_app(store), base_url="http://127.0.0.1:1", raise_server_exceptions=False)
        return [
            store.steps(),
            store.sql(SQL).to_pylist(),
            store.page(RolloutFilter(verdicts=("wrong",)), sort="length").rows,
            store.aggregate(RolloutFilter(), OURS),
            *(client.get(address).json() for address in ADDRESSES),
        ]


def flips(content: bytes, seed: int) -> Iterator[bytes]:
    draw = random.Random(seed)
    places = [draw.randrange(8 * len(content)) for _ in range(FLIPS)]
    places += [8 * len(content) - 1 - draw.randrange(8 * min(len(content), 600)) for _ in range(FLIPS)]
    for place in places:
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        yield bytes(flipped)


def of_kdrl(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What kdrl logged; flows, once imported, pass it on to Prefect's log."""
    return [record for record in caplog.records if record.name == "kdrl"]


@pytest.mark.parametrize("pattern", ["catalog.json", "segment-*.parquet"])
def test_a_flipped_bit_in_the_index_changes_no_figure(
    copied: Path, indexed: tuple[Path, list[Any]], pattern: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied / ".index"
    kept = {file.name: file.read_bytes() for file in folder.iterdir()}
    (name,) = [file.name for file in folder.glob(pattern)]
    for number, flipped in enumerate(flips(kept[name], seed=len(pattern))):
        for file in folder.iterdir():
            file.unlink()
        for other, content in kept.items():
            (folder / other).write_bytes(flipped if other == name else content)
        caplog.clear()
        assert figures(copied) == indexed[1], f"flip {number} of {name}"
        told = [record.message for record in of_kdrl(caplog) if record.levelno >= logging.WARNING]
        assert len(told) == 1, told
        assert f"index {folder}: {name} is not as it was written" in told[0]
        assert "made anew" in told[0]


def test_a_bit_that_flips_while_a_run_is_open_changes_no_figure(copied: Path, indexed: tuple[Path, list[Any]]) -> None:
    with RolloutStore.open([copied]) as store:
        assert store.sql(SQL).to_pylist() == indexed[1][1]
        (segment,) = (copied / ".index").glob("segment-*")
        segment.write_bytes(next(flips(segment.read_bytes(), seed=3)))
        assert store.sql(SQL).to_pylist() == indexed[1][1]
        assert store.page(limit=1000).total == 18


def test_a_damaged_segment_is_not_carried_over(copied: Path, indexed: tuple[Path, list[Any]]) -> None:
    """A step has changed, so the segment's other rows would be written anew, with a new checksum."""
    (segment,) = (copied / ".index").glob("segment-*")
    segment.write_bytes(next(flips(segment.read_bytes(), seed=4)))
    os.utime(copied / "rollouts/stage=stage2/step=000001/rewards.parquet", ns=(1, 1))
    assert figures(copied) == indexed[1]


def test_only_what_is_damaged_of_an_index_is_made_anew(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from kdrl_core.look.rollouts import index as module

    monkeypatch.setattr(module, "_STEPS_AT_ONCE", 1)
    RunIndex(run.paths.root).refresh()
    segments = sorted((run.paths.root / ".index").glob("segment-*"))
    assert len(segments) == 3
    segments[0].write_bytes(next(flips(segments[0].read_bytes(), seed=5)))
    read: list[int] = []
    original = module.index_step
    monkeypatch.setattr(module, "index_step", lambda files: (read.append(files.step), original(files))[1])
    with RolloutStore.open([run.name]) as store:
        assert store.page().total == 18
    assert len(read) == 1
    assert len([one for one in of_kdrl(caplog) if "made anew" in one.message]) == 1


def test_an_intact_index_beside_a_damaged_one_stays(copied: Path, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    with RolloutStore.open([copied, run.paths.root]) as store:
        assert store.page().total == 36
        before = sorted((run.paths.root / ".index").iterdir())
        (segment,) = (copied / ".index").glob("segment-*")
        segment.write_bytes(next(flips(segment.read_bytes(), seed=6)))
        assert store.page().total == 36
    assert sorted((run.paths.root / ".index").iterdir()) == before
    assert [str(copied) in one.message for one in of_kdrl(caplog) if "made anew" in one.message] == [True]


def test_a_damaged_index_in_a_folder_of_others_is_told_once_and_made_elsewhere(
    copied: Path,
    indexed: tuple[Path, list[Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (segment,) = (copied / ".index").glob("segment-*")
    segment.write_bytes(next(flips(segment.read_bytes(), seed=8)))
    before = sorted((copied / ".index").iterdir())
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and Path(path) != copied / ".index")
    assert figures(copied) == indexed[1]
    assert sorted((copied / ".index").iterdir()) == before
    told = [one.message for one in of_kdrl(caplog) if "made anew" in one.message]
    assert len(told) == 1
    assert f"index {copied / '.index'}: {segment.name} is not as it was written" in told[0]


@pytest.mark.parametrize("part", ["rollouts", "rewards", "teacher", "update"])
def test_a_flipped_bit_in_a_file_of_the_run_is_named(run: Run, part: str) -> None:
    path = part_path(run.paths, "stage2", 1, part)
    content = path.read_bytes()
    for number, flipped in enumerate(flips(content, seed=7)):
        if number % 4:
            continue
        path.write_bytes(flipped)
        with RolloutStore.open([run.name]) as store:
            assert [(one.path, "sha256" in one.problem) for one in store.damaged] == [(path, True)]
            found = store.sql("select count(*) n, count(reward) r, count(response) t from rollouts").to_pylist()
            lost = {"rollouts": (12, 12, 12), "rewards": (18, 12, 18)}.get(part, (18, 18, 18))
            assert tuple(found[0].values()) == lost
    path.write_bytes(content)
    with RolloutStore.open([run.name]) as store:
        assert store.damaged == []
