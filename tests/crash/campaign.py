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
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq
from crash.damage import damage_index, damage_journal, damage_something
from crash.lives import Kind, Life, Lives, Trouble
from crash.tiny_run import WORKERS_TIMEOUT_S, figures, for_workers, label, open_tiny, results

from kdrl_core.ledger import Run, lock_holder

SPARSE = [
    "stage2.steps=5",
    "stage2.checkpoint.every=2",
    "evaluation.benchmarks=[{name: validation, file: 'builtin:miniature/benchmarks/validation.jsonl'}]",
    "evaluation.benchmarks.0.max_problems=4",
]
"""Stage 1 checkpoints every step; stage 2 does not, and replays the steps since."""

_RANDOM = "a random instant"
_RANDOM_SHARE = 0.25
_DAMAGE_SHARE = 0.3
_WITH_WORKERS = 5
"""Each fifth run has answers that need workers, which are killed and suspended, and measures a label. All are cancelled
now and then. Each second one saves its checkpoints beside the next rollouts."""


@dataclass(slots=True)
class Report:
    """What a campaign did and found."""

    points: list[str] = field(default_factory=list)
    """Every fault point of an undisturbed run, in the order in which it passes them first."""
    killed_at: Counter[str] = field(default_factory=Counter)
    """Kills by fault point, or `a random instant`."""
    damaged: int = 0
    """Artifacts damaged between a death and the next life."""
    indexes_damaged: int = 0
    journals_damaged: int = 0
    troubles: Counter[str] = field(default_factory=Counter)
    """Lives that were suspended for longer than an answer may take, with all that they had started; workers killed;
    lives that were cancelled."""
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
            f"besides             {self.indexes_damaged} indexes and {self.journals_damaged} journals damaged, "
            f"{self.troubles['suspend']} lives suspended, {self.troubles['kill workers']} workers killed, "
            f"{self.troubles['cancel']} lives cancelled",
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
        harder = [*SPARSE, *for_workers(folder)]

        @cache
        def whole_harder() -> Run:
            run = open_tiny(folder / "undisturbed-workers", "tiny", harder)
            assert lives.live(folder / "undisturbed-workers", "tiny").finished
            return run

        while report.kills < kills or report.missed:
            report.runs += 1
            artifacts = folder / f"run-{report.runs}"
            is_harder = report.runs % _WITH_WORKERS == 0
            lives.saves_aside = report.runs % 2 == 0
            run = open_tiny(artifacts, "tiny", harder if is_harder else SPARSE)
            before = report.kills
            _finish_with_kills(lives, run, artifacts, report, passes, life.seconds, kills, rng)
            assert report.kills > before, f"nothing can be killed at {sorted(report.missed)}"
            _compare(run, whole_harder() if is_harder else whole, report)
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
        trouble = _trouble(run, whole_s, rng)
        healing = sorted(report.healing_points, key=lambda point: report.killed_at[point]) if is_damaged else []
        if report.kills >= kills and not report.missed:
            life = lives.live(artifacts, run.name, trouble=trouble)
        elif rng.random() < _RANDOM_SHARE:
            life = lives.live(artifacts, run.name, after_s=rng.uniform(0.0, whole_s / 4), trouble=trouble)
            _count(life, _RANDOM, report)
        elif healing and rng.random() < 0.8:
            life = lives.live(artifacts, run.name, die_at=healing[0], trouble=trouble)
            _count(life, healing[0], report)
        else:
            ahead = report.points[far:] + report.points[:far]
            point = min(ahead, key=lambda point: report.killed_at[point])
            # Seldom passed: the first time. Often passed: a little way into the run.
            skip = rng.randrange(1 + passes[point] // 12)
            life = lives.live(artifacts, run.name, die_at=point, skip=skip, trouble=trouble)
            _count(life, point, report)
        report.healing_points |= set(life.points) - set(report.points)
        if trouble is not None:
            came = {"suspend": life.troubled > 0, "kill workers": life.troubled, "cancel": life.stopped}
            report.troubles[trouble.kind] += came[trouble.kind]
        if life.finished:
            return
        far = max([far, *(report.points.index(point) for point in life.points if point in report.points)])
        assert lock_holder(run.paths.lock) is None  # the kernel's lock ends with its holder
        is_damaged = rng.random() < _DAMAGE_SHARE and damage_something(run, rng)
        report.damaged += is_damaged
        report.indexes_damaged += rng.random() < _DAMAGE_SHARE and damage_index(run, rng)
        report.journals_damaged += rng.random() < _DAMAGE_SHARE and damage_journal(run, rng)


def _trouble(run: Run, whole_s: float, rng: random.Random) -> Trouble | None:
    """What comes over the next life. Only where answers need workers are there some to kill, and deadlines to miss."""
    needs_workers = run.recipe.verification.timeout_s == WORKERS_TIMEOUT_S
    if rng.random() < (0.3 if needs_workers else 0.7):
        return None
    kind: Kind = rng.choice(("kill workers", "suspend", "cancel")) if needs_workers else "cancel"
    return Trouble(kind=kind, after_s=rng.uniform(0.5, whole_s / 2), seconds=WORKERS_TIMEOUT_S + 1)


def _count(life: Life, point: str, report: Report) -> None:
    if life.killed:
        report.killed_at[point] += 1


def _compare(run: Run, whole: Run, report: Report) -> None:
    ours, theirs = results(run), results(whole)
    report.bytes_compared += sum((run.paths.root / name).stat().st_size for name in ours)
    tables = [name for name in ours if name.endswith(".parquet")]
    report.rows_compared += sum(pq.read_metadata(run.paths.root / name).num_rows for name in tables)
    report.lost += [f"run {report.runs}: {name}" for name in theirs if name not in ours]
    report.surplus += [f"run {report.runs}: {name}" for name in ours if name not in theirs]
    report.differences += [f"run {report.runs}: {name}" for name in ours if ours[name] != theirs.get(name)]
    if [step | {"run": ""} for step in figures(run)] != [step | {"run": ""} for step in figures(whole)]:
        report.differences.append(f"run {report.runs}: figures of its index")
    if run.recipe.verification.timeout_s == WORKERS_TIMEOUT_S and label(run).read_bytes() != label(whole).read_bytes():
        report.differences.append(f"run {report.runs}: its labels")
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
