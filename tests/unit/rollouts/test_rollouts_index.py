"""The index: incremental, rebuilt where files changed, safe with several readers, and no part of the run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rollout_runs import make_run, part_path, publish, step_table, write_step

from kdrl_core.boxes.check import check_run
from kdrl_core.ledger import Run, open_run, published_below, sweep_temporaries
from kdrl_core.look.rollouts import index as index_module
from kdrl_core.look.rollouts.index import RunIndex
from kdrl_core.look.rollouts.query import RolloutFilter, RolloutStore
from kdrl_core.look.rollouts.sources import StepFiles


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps whose files are read, in no order."""
    found: list[int] = []
    original = index_module.index_step

    def counting(files: StepFiles) -> object:
        found.append(files.step)
        return original(files)

    monkeypatch.setattr(index_module, "index_step", counting)
    return found


def rows(index: RunIndex) -> int:
    return sum(pq.ParquetFile(file).metadata.num_rows for file in index.files)


def test_each_step_is_read_once(run: Run, read: list[int]) -> None:
    index = RunIndex(run.paths.root)
    assert index.refresh()
    assert (sorted(read), rows(index)) == ([0, 1, 2], 18)
    read.clear()
    assert not index.refresh()
    assert RunIndex(run.paths.root).refresh()  # new to this one
    assert read == []
    write_step(run, "stage2", 3)
    assert index.refresh()
    assert (read, rows(index)) == ([3], 24)


def test_a_step_under_way_is_read_again_alone(run: Run, read: list[int]) -> None:
    write_step(run, "stage2", 3, until="rollouts")
    index = RunIndex(run.paths.root)
    index.refresh()
    assert len(index.files) == 2
    read.clear()
    publish(run, "stage2", 3, "rewards", step_table("rewards", 3))
    index.refresh()
    assert (read, rows(index)) == ([3], 24)


def test_changed_and_lost_steps_are_told_by_size_and_time(run: Run, read: list[int]) -> None:
    index = RunIndex(run.paths.root)
    index.refresh()
    read.clear()
    os.utime(part_path(run.paths, "stage2", 1, "rewards"), ns=(1, 1))
    index.refresh()
    assert (read, rows(index)) == ([1], 18)
    for part in ("rollouts", "rewards", "teacher", "update"):
        part_path(run.paths, "stage2", 0, part).unlink()
    read.clear()
    index.refresh()
    assert (read, rows(index), [step.step for step in index.steps]) == ([], 12, [1, 2])


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "catalog.json").write_text("{"),
        lambda folder: (folder / "catalog.json").write_text('{"version": "0", "segments": []}'),
        lambda folder: (folder / "catalog.json").write_text('{"version": "1.1", "segments": [{"file": 3}]}'),
        lambda folder: (folder / "catalog.json").unlink(),
        lambda folder: next(folder.glob("segment-*")).unlink(),
        lambda folder: next(folder.glob("segment-*")).write_bytes(b"torn"),
        lambda folder: replaced(folder / "catalog.json", "segment-", "../../../segment-"),
        lambda folder: replaced(folder / "catalog.json", "step=000001", "step=000001/../../.."),
    ],
)
def test_a_harmed_index_is_made_again(run: Run, read: list[int], harm: Callable[[Path], object]) -> None:
    RunIndex(run.paths.root).refresh()
    read.clear()
    harm(run.paths.root / ".index")
    index = RunIndex(run.paths.root)
    index.refresh()
    assert (sorted(read), rows(index)) == ([0, 1, 2], 18)


def replaced(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    "ask",
    [
        lambda store: len(store.page().rows),
        lambda store: store.page(RolloutFilter(text="number")).total,
        lambda store: store.sql("from rollouts").num_rows,
    ],
)
def test_a_segment_that_lost_its_bytes_is_made_again(
    run: Run, read: list[int], ask: Callable[[RolloutStore], int]
) -> None:
    RunIndex(run.paths.root).refresh()
    (segment,) = (run.paths.root / ".index").glob("segment-*")
    segment.write_bytes(bytes(segment.stat().st_size))  # as a crash of the machine leaves it
    read.clear()
    with RolloutStore.open(["small"]) as store:
        assert ask(store) == 18
        assert sorted(read) == [0, 1, 2]


def test_many_segments_are_joined(run: Run, read: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "_JOINED", 4)
    index = RunIndex(run.paths.root)
    index.refresh()
    for step in range(3, 10):
        write_step(run, "stage2", step)
        index.refresh()
    assert sorted(read) == [*range(10)]
    assert len(index.files) < 5
    assert rows(index) == 10 * 6
    table = pq.read_table(index.files[0], columns=["step", "row"])
    assert table["step"].to_pylist() == sorted(table["step"].to_pylist())
    monkeypatch.setattr(index_module, "MAX_ROWS", 12)
    for step in range(10, 18):
        write_step(run, "stage2", step)
        index.refresh()
    assert rows(index) == 18 * 6
    assert len(index.files) >= 8 // 2  # none larger than two steps was made of those


def test_what_a_reader_may_still_use_stays_for_a_while(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    index = RunIndex(run.paths.root)
    index.refresh()
    (old,) = index.files
    os.utime(part_path(run.paths, "stage2", 1, "rewards"), ns=(1, 1))
    index.refresh()
    assert old.exists()
    monkeypatch.setattr(index_module, "_KEPT_FOR_S", -1.0)
    write_step(run, "stage2", 3)
    index.refresh()
    assert not old.exists()
    assert rows(index) == 24


def test_the_ledger_passes_the_index_over(run: Run) -> None:
    before = [finding.path for finding in check_run(run).findings], list(published_below(run.paths.root))
    RunIndex(run.paths.root).refresh()
    assert ([finding.path for finding in check_run(run).findings], list(published_below(run.paths.root))) == before
    sweep_temporaries(run.paths.root)
    assert rows(RunIndex(run.paths.root)) == 0
    again = RunIndex(run.paths.root)
    again.refresh()
    assert rows(again) == 18
    assert open_run("small").recipe == run.recipe


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_that_cannot_be_written(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run.paths.root.chmod(0o500)
    try:
        index = RunIndex(run.paths.root)
        index.refresh()
        assert rows(index) == 18
    finally:
        run.paths.root.chmod(0o700)


def test_elsewhere_if_the_run_cannot_hold_it(
    run: Run, read: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (run.paths.root / ".index").write_text("a file stands in its place")
    index = RunIndex(run.paths.root)
    index.refresh()
    assert index.folder.is_relative_to(tmp_path / "cache")
    assert rows(index) == 18
    read.clear()
    RunIndex(run.paths.root).refresh()
    assert read == []
    (tmp_path / "cache" / "kdrl").rename(tmp_path / "gone")
    (tmp_path / "cache" / "kdrl").write_text("and here")
    nowhere = RunIndex(run.paths.root)
    nowhere.refresh()
    assert rows(nowhere) == 18
    assert not nowhere.folder.is_relative_to(tmp_path / "cache")


def test_a_link_in_its_place_is_not_followed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "elsewhere").mkdir()
    (run.paths.root / ".index").symlink_to(tmp_path / "elsewhere")
    index = RunIndex(run.paths.root)
    index.refresh()
    assert rows(index) == 18
    assert index.folder.is_relative_to(tmp_path / "cache")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_two_that_look_at_once_do_the_work_once(artifacts: Path) -> None:
    run = make_run(artifacts, "many", steps=12)
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from kdrl_core.look.rollouts import index as module\n"
        "read, original = [], module.index_step\n"
        "module.index_step = lambda files: (read.append(files.step), original(files))[1]\n"
        "index = module.RunIndex(Path(sys.argv[1]))\n"
        "sys.stdin.readline()\n"
        "index.refresh()\n"
        "print(len(read), sum(step.num_rows for step in index.steps))\n"
    )
    command = [sys.executable, "-c", script, str(run.paths.root)]
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    found = [process.communicate(timeout=60)[0].split() for process in both]
    assert [rows for _, rows in found] == ["72", "72"]
    assert sum(int(read) for read, _ in found) == 12
    catalog = json.loads((run.paths.root / ".index" / "catalog.json").read_text())
    assert sum(len(segment["steps"]) for segment in catalog["segments"]) == 12
