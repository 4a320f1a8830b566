"""The crash test: kill a run at every fault point and at random instants, resume it, compare it with one left alone.

    make crash-test KILLS=200

Weights, optimiser state, every Parquet table and every metric must be the same bytes: nothing lost, nothing twice.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
from crash.damage import damage_something
from crash.lives import Life, Lives
from crash.tiny_run import open_tiny, results

from kdrl_core.ledger import Run, lock_holder

SPARSE = ["stage2.steps=5", "stage2.checkpoint.every=2"]
"""Stage 1 checkpoints every step; stage 2 does not, and replays the steps since."""

_RANDOM = "a random instant"
_RANDOM_SHARE = 0.25
_DAMAGE_SHARE = 0.3


@dataclass(slots=True)
class Report:
    """What a campaign did and found."""

    points: list[str] = field(default_factory=list)
    """Every fault point of an undisturbed run, in the order in which it passes them first."""
    killed_at: Counter[str] = field(default_factory=Counter)
    """Kills by fault point, or `a random instant`."""
    damaged: int = 0
    """Artifacts damaged between a death and the next life."""
    healing_points: set[str] = field(default_factory=set)
    """Fault points that only lives after damage pass."""
    runs: int = 0
    bytes_compared: int = 0
    rows_compared: int = 0
    """Of Parquet tables."""
    lost: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def kills(self) -> int:
        return self.killed_at.total()

    @property
    def missed(self) -> set[str]:
        """Points at which nothing was killed."""
        return set(self.points) - set(self.killed_at)

    def lines(self) -> list[str]:
        """The figures, for people."""
        covered = len(self.points) - len(self.missed)
        healing = len(self.healing_points & set(self.killed_at))
        return [
            f"kills               {self.kills} in {self.runs} runs, {self.killed_at[_RANDOM]} at random instants",
            f"resumes             {self.kills}, {self.damaged} of them after damage to an artifact",
            f"fault points        {covered} of {len(self.points)} covered",
            f"while healing       {healing} of {len(self.healing_points)} covered",
            f"bytes compared      {self.bytes_compared:,}, {self.rows_compared:,} rows of tables",
            f"files lost, surplus {len(self.lost)}, {len(self.surplus)}",
            f"files that differ   {len(self.differences)}",
            f"temporary leftovers {len(self.leftovers)}",
            f"time                {self.seconds:.0f} s",
            *(f"  not killed: {point}" for point in sorted(self.missed)),
            *(f"  lost: {name}" for name in self.lost),
            *(f"  surplus: {name}" for name in self.surplus),
            *(f"  differs: {name}" for name in self.differences),
        ]


def campaign(folder: Path, *, kills: int, seed: int, show: bool = False) -> Report:
    """Kill at least `kills` times, and until every fault point was hit; finish each run and compare it."""
    started = time.monotonic()
    rng = random.Random(seed)
    report = Report()
    with Lives() as lives:
        whole = open_tiny(folder / "undisturbed", "tiny", SPARSE)
        life = lives.live(folder / "undisturbed", "tiny")
        assert life.finished
        report.points = list(dict.fromkeys(life.points))
        passes = Counter(life.points)
        while report.kills < kills or report.missed:
            report.runs += 1
            artifacts = folder / f"run-{report.runs}"
            run = open_tiny(artifacts, "tiny", SPARSE)
            before = report.kills
            _finish_with_kills(lives, run, artifacts, report, passes, life.seconds, kills, rng)
            assert report.kills > before, f"nothing can be killed at {sorted(report.missed)}"
            _compare(run, whole, report)
            shutil.rmtree(artifacts)
            report.seconds = time.monotonic() - started
            if show:
                covered = len(report.points) - len(report.missed)
                print(
                    f"run {report.runs}: {report.kills} kills, {covered}/{len(report.points)} points, "
                    f"{len(report.differences)} differences, {report.seconds:.0f} s",
                    flush=True,
                )
    return report


def _finish_with_kills(
    lives: Lives,
    run: Run,
    artifacts: Path,
    report: Report,
    passes: Counter[str],
    whole_s: float,
    kills: int,
    rng: random.Random,
) -> None:
    """Lives of one run until one comes to its end. Each dies where the campaign has killed least.

    Of points killed at equally often, the one is taken that comes next in the run: so one run has many deaths.
    """
    is_damaged = False
    far = 0  # place in `report.points` of the last point that the run has come to
    while True:
        healing = sorted(report.healing_points, key=lambda point: report.killed_at[point]) if is_damaged else []
        if report.kills >= kills and not report.missed:
            life = lives.live(artifacts, run.name)
        elif rng.random() < _RANDOM_SHARE:
            life = lives.live(artifacts, run.name, after_s=rng.uniform(0.0, whole_s / 4))
            _count(life, _RANDOM, report)
        elif healing and rng.random() < 0.8:
            life = lives.live(artifacts, run.name, die_at=healing[0])
            _count(life, healing[0], report)
        else:
            ahead = report.points[far:] + report.points[:far]
            point = min(ahead, key=lambda point: report.killed_at[point])
            # Seldom passed: the first time. Often passed: a little way into the run.
            life = lives.live(artifacts, run.name, die_at=point, skip=rng.randrange(1 + passes[point] // 12))
            _count(life, point, report)
        report.healing_points |= set(life.points) - set(report.points)
        if life.finished:
            return
        far = max(far, *(report.points.index(point) for point in life.points if point in report.points))
        assert lock_holder(run.paths.lock) is None  # the kernel's lock ends with its holder
        is_damaged = rng.random() < _DAMAGE_SHARE and damage_something(run, rng)
        report.damaged += is_damaged


def _count(life: Life, point: str, report: Report) -> None:
    if not life.finished:
        report.killed_at[point] += 1


def _compare(run: Run, whole: Run, report: Report) -> None:
    ours, theirs = results(run), results(whole)
    report.bytes_compared += sum((run.paths.root / name).stat().st_size for name in ours)
    tables = [name for name in ours if name.endswith(".parquet")]
    report.rows_compared += sum(pq.read_metadata(run.paths.root / name).num_rows for name in tables)
    report.lost += [f"run {report.runs}: {name}" for name in theirs if name not in ours]
    report.surplus += [f"run {report.runs}: {name}" for name in ours if name not in theirs]
    report.differences += [f"run {report.runs}: {name}" for name in ours if ours[name] != theirs.get(name)]
    report.leftovers += [str(path) for path in run.paths.root.rglob(".tmp-*")]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Kill a tiny run again and again, resume it, and compare the result.")
    parser.add_argument("--kills", type=int, default=50, help="at least so many; and every fault point is hit")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kdrl-crash-") as folder:
        report = campaign(Path(folder), kills=options.kills, seed=options.seed, show=True)
    print("\n".join(report.lines()))
    sys.exit(bool(report.differences or report.lost or report.surplus or report.leftovers))


if __name__ == "__main__":
    main()
