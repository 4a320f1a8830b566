"""A live display of a run, read from its files, by the process that runs it or by any other."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flows.cli.printed_tables import alarm_line
from flows.cli.shared import PlainConsole
from kdrl_core.alarms import Alarm, load_alarms
from kdrl_core.boxes.make import read_progress
from kdrl_core.errors import KdrlError
from kdrl_core.ledger import Run, RunPaths, lock_holder, open_run_dir
from kdrl_core.tables.files import load_metrics

_INTERVAL_S = 0.5
_RECENT_STEPS = 10
_Loaded = TypeVar("_Loaded")


@contextmanager
def watching(paths: RunPaths, console: PlainConsole, *, with_alarms: bool = False) -> Iterator[None]:
    """Show a run while the context is open: a live table on a terminal, a line per step elsewhere. `with_alarms`: also
    lines for alarms. Leave it off in the process that runs: its log has the alarms."""
    stop = threading.Event()
    show = _show_table if console.is_terminal else _show_lines
    thread = threading.Thread(target=show, args=(RunView(paths), console, stop, with_alarms), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _show_table(view: "RunView", console: PlainConsole, stop: threading.Event, _: bool) -> None:
    started, is_last = time.monotonic(), False
    with Live(console=console, auto_refresh=False) as live:
        while not is_last:
            is_last = stop.wait(_INTERVAL_S)
            live.update(view.render(time.monotonic() - started), refresh=True)


def _show_lines(view: "RunView", console: PlainConsole, stop: threading.Event, with_alarms: bool) -> None:
    is_last = False
    while not is_last:
        is_last = stop.wait(_INTERVAL_S)
        for line in view.new_lines():
            console.say(line)
        for alarm in view.new_alarms() if with_alarms else ():
            console.say(alarm_line(alarm))


class RunView:
    """The state of a run as text. Reads its metrics only when they have changed."""

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths
        self._run: Run | None = None
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._stamps: dict[str, tuple[int, int]] = {}
        self._alarms: dict[str, list[Alarm]] = {}
        self._printed: dict[str, int] = {}
        self._told: dict[str, int] = {}
        self._last_phase = ""

    def refresh(self) -> None:
        if self._run is None:
            if not self._paths.manifest.is_file():
                return
            try:
                self._run = open_run_dir(self._paths.root)
            except KdrlError:
                return
            for stage in self._run.recipe.stages:  # steps from before are not reported one by one
                self._printed[stage] = len(self._load(load_metrics, stage, []))
        for stage in self._run.recipe.stages:
            stamp = _changed(self._paths.metrics(stage)), _changed(self._paths.alarms(stage))
            if stamp != self._stamps.get(stage):
                self._stamps[stage] = stamp
                self._rows[stage] = self._load(load_metrics, stage, self._rows.get(stage, []))
                self._alarms[stage] = self._load(load_alarms, stage, self._alarms.get(stage, []))

    def _load(self, load: Callable[[Run, str], list[_Loaded]], stage: str, known: list[_Loaded]) -> list[_Loaded]:
        assert self._run is not None
        try:
            return load(self._run, stage)
        except KdrlError:  # damaged: the stage rebuilds them when it is opened
            return known

    def new_lines(self) -> list[str]:
        """One line per step or phase since the last call."""
        was_new = self._run is None
        self.refresh()
        lines = []
        for stage, printed in self._printed.items():
            if was_new and printed:
                lines.append(f"{stage}: steps 0 to {printed - 1} are published already, reused")
        for stage, rows in self._rows.items():
            for row in rows[self._printed.get(stage, 0) :]:
                lines.append(self._step_line(stage, row))
            self._printed[stage] = len(rows)
        progress = read_progress(self._paths)
        if progress and (not progress["stage"].startswith("stage") or progress["phase"].startswith("sampling")):
            phase = f"{progress['stage']} {progress['phase']}"
            if phase != self._last_phase:
                lines.append(f"{phase} …")
            self._last_phase = phase
        return lines

    def new_alarms(self) -> list[Alarm]:
        """Alarms raised since the last call (on the first call: all), as of the last refresh."""
        found = [alarm for stage, raised in self._alarms.items() for alarm in raised[self._told.get(stage, 0) :]]
        self._told.update({stage: len(raised) for stage, raised in self._alarms.items()})
        return found

    def render(self, elapsed_s: float) -> RenderableType:
        """The live table."""
        self.refresh()
        if self._run is None:
            return Text(f"starting … {elapsed_s:.0f} s")
        table = Table(box=None, padding=(0, 2))
        for column in ("stage", "", "step", "reward", "length", "clip", "tokens/s", "left"):
            table.add_column(column, justify="left" if column in ("stage", "") else "right")
        for stage in self._run.recipe.stages:
            table.add_row(*self._stage_cells(stage))
        progress = read_progress(self._paths) or {}
        done = f" {progress['done']}/{progress['total']}" if progress.get("done") is not None else ""
        now = f"{progress.get('stage', '')} {progress.get('phase', '')}{done}"
        last = [alarm_line(raised[-1]) for raised in self._alarms.values() if raised][-1:]
        return Group(table, *last, Text(f"{self._paths.name} · {elapsed_s:.0f} s · {now}", style="dim"))

    def _stage_cells(self, stage: str) -> list[RenderableType]:
        assert self._run is not None
        rows, total = self._rows.get(stage, []), self._run.recipe.stage(stage).steps
        bar = ProgressBar(total=total, completed=len(rows), width=24)
        if not rows:
            return [stage, bar, f"0/{total}", "", "", "", "", ""]
        row = rows[-1]
        left = (total - len(rows)) * self._seconds_per_step(rows)
        return [
            stage,
            bar,
            f"{len(rows)}/{total}",
            f"{row['reward/mean']:.3f}" if "reward/mean" in row else f"loss {row['loss/sft']:.3f}",
            f"{row['response/length_mean']:.1f}",
            f"{row['response/clip_ratio']:.3f}" if "response/clip_ratio" in row else "",
            f"{_tokens_per_s(row):,.0f}",
            f"{left:.0f} s" if left < 600 else f"{left / 60:.0f} min",
        ]

    def _step_line(self, stage: str, row: dict[str, Any]) -> str:
        assert self._run is not None
        total = self._run.recipe.stage(stage).steps
        left = (total - row["step"] - 1) * self._seconds_per_step(self._rows[stage])
        if "loss/sft" in row:
            quality, clip = f"loss {row['loss/sft']:.4f}", f"epoch {row['sft/epoch']:.2f}"
        else:
            quality, clip = f"reward {row['reward/mean']:.3f}", f"clip {row['response/clip_ratio']:.3f}"
        return (
            f"{stage} step {row['step']}/{total}  {quality}  length {row['response/length_mean']:.1f}  {clip}  "
            f"{_tokens_per_s(row):,.0f} tokens/s  {left:.0f} s left"
        )

    @staticmethod
    def _seconds_per_step(rows: list[dict[str, Any]]) -> float:
        recent = rows[-_RECENT_STEPS:]
        return sum(v for row in recent for name, v in row.items() if name.startswith("time/")) / len(recent)


def _tokens_per_s(row: dict[str, Any]) -> float:
    """Tokens/s of sampling; in an SFT step, which does not sample, of the update."""
    return float(row.get("throughput/rollout_tokens_per_s", row.get("throughput/update_tokens_per_s", 0.0)))


def _changed(path: Path) -> int:
    """When a file changed, ns since the epoch; 0 if there is none."""
    return path.stat().st_mtime_ns if path.is_file() else 0


def follow(paths: RunPaths, console: PlainConsole) -> None:
    """Show a run of another process until no process works on it."""
    with watching(paths, console, with_alarms=True):
        while lock_holder(paths.lock) is not None:
            time.sleep(_INTERVAL_S)
