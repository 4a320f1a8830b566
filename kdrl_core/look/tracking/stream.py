"""Sends each tracker what a run has newly published, in order, and notes in `tracking/<name>.json` what was sent."""

import atexit
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

from kdrl_core.config import TrackerName
from kdrl_core.config.paths import read_json
from kdrl_core.errors import KdrlError
from kdrl_core.evaluation.results import read_results
from kdrl_core.ledger import Run, checkpoint_step, is_published, manifest_of, replace_file
from kdrl_core.ledger.graph import evaluated_labels
from kdrl_core.look.tracking.clients import CLIENTS, Point, Sent, Tracker
from kdrl_core.tables.files import load_metrics

_logger = logging.getLogger("kdrl")

Metrics = Callable[[str], list[dict[str, Any]]]
"""Stage → its metrics, read on demand."""


@dataclass(slots=True)
class _Stream:
    """One tracker of one run, opened with its first point."""

    run: Run
    name: TrackerName
    sent: Sent
    tracker: Tracker | None = None
    has_failed: bool = False

    def catch_up(self, metrics: Metrics) -> None:
        points, finals = list(_points(self.run, self.sent, metrics)), _finals(self.run, self.sent)
        if not points and not finals:
            return
        if self.tracker is None:
            self.tracker = CLIENTS[self.name](self.run, self.sent)
            self.sent.identity = self.tracker.run_id
            self._note()
        for point, note in points:
            self.tracker.log(point)
            note(self.sent)
        for label in finals:
            self.tracker.summarize(_summary(self.run, label), _moment(self.run.paths.evaluation(label)))
            self.sent.evaluations.append(label)
        if self.tracker.flush():
            self._note()

    def close(self) -> None:
        if self.tracker is not None:
            self.tracker.close(complete=set(evaluated_labels(self.run.recipe)) <= set(self.sent.evaluations))
            self.tracker = None
            self._note()

    def give_up(self) -> None:
        """Call after a fault: the next points go through a new client."""
        tracker, self.tracker, self.sent = self.tracker, None, _read(self.run, self.name)
        if tracker is not None:
            with suppress(Exception):
                tracker.close(complete=False)

    def _note(self) -> None:
        replace_file(_cursor(self.run, self.name), (json.dumps(asdict(self.sent), indent=1) + "\n").encode())


# Streams of this process. They are closed at its end, if no flow has closed them.
_streams: dict[tuple[Path, TrackerName], _Stream] = {}


def track(run: Run) -> None:
    """Send the trackers of the recipe what the run has published since the last call.

    A tracker that fails gives one warning. It gets what it missed when it works again.
    """
    metrics = cache(partial(load_metrics, run))  # once for all trackers
    for name in run.recipe.tracking.trackers:
        key = run.paths.root, name
        stream = _streams.get(key) or _streams.setdefault(key, _Stream(run, name, _read(run, name)))
        try:
            stream.catch_up(metrics)
            stream.has_failed = False
        except Exception as error:  # whatever a foreign client raises: training goes on
            if not stream.has_failed:
                _logger.warning(
                    "%s: %s (%s); training goes on, and what is missing is sent when it works again",
                    name,
                    " ".join(str(error).split())[:300] or "failed",
                    type(error).__name__,
                )
            stream.has_failed = True
            stream.give_up()


def close_tracking() -> None:
    """Close every tracker of this process. A run that goes on opens them again."""
    while _streams:
        _, stream = _streams.popitem()
        try:
            stream.close()
        except Exception as error:
            _logger.warning("%s: %s (%s) at its end", stream.name, " ".join(str(error).split()), type(error).__name__)


atexit.register(close_tracking)


def _cursor(run: Run, name: str) -> Path:
    return run.paths.tracking / f"{name}.json"


def _read(run: Run, name: str) -> Sent:
    with suppress(OSError, ValueError, TypeError):
        return Sent(**read_json(_cursor(run, name)))
    return Sent()


def _points(run: Run, sent: Sent, metrics: Metrics) -> Iterator[tuple[Point, Callable[[Sent], None]]]:
    """Points that are published and not sent, in the order of steps; each with a function that notes it as sent."""
    before = 0
    for stage in run.recipe.stages:
        found = [*_steps(run, stage, sent, metrics), *_periodic(run, stage, sent)]
        for step, values, note in sorted(found, key=lambda one: one[0]):  # stable: an evaluation follows its step
            moment = _moment(run.paths.update(stage, step))
            yield Point(group=stage, step=step, global_step=before + step, time_ms=moment, values=values), note
        before += run.recipe.stage(stage).steps


_Found = tuple[int, dict[str, float], Callable[[Sent], None]]


def _steps(run: Run, stage: str, sent: Sent, metrics: Metrics) -> Iterator[_Found]:
    first = sent.steps.get(stage, 0)
    for row in metrics(stage) if first < run.recipe.stage(stage).steps else ():
        step = int(row["step"])
        if step >= first:
            values = {n: float(v) for n, v in row.items() if n != "step" and isinstance(v, int | float)}
            yield step, values, lambda noted, step=step: noted.steps.update({stage: step + 1})  # type: ignore[misc]


def _periodic(run: Run, stage: str, sent: Sent) -> Iterator[_Found]:
    """Periodic evaluations of a stage, each at the step whose update made the evaluated model."""
    for path in sorted(run.paths.evaluation(stage).parent.glob(f"{stage}-step-*")):  # also of an earlier evaluate_every
        label, step = path.name, checkpoint_step(path.name, stage)
        if step is not None and label not in sent.evaluations and is_published(path):
            values = {f"evaluation/{n}": float(one["accuracy"]) for n, one in read_results(path)["benchmarks"].items()}
            yield step - 1, values, lambda noted, label=label: noted.evaluations.append(label)  # type: ignore[misc]


def _finals(run: Run, sent: Sent) -> list[str]:
    labels = [label for label in evaluated_labels(run.recipe) if label not in sent.evaluations]
    return [label for label in labels if is_published(run.paths.evaluation(label))]


def _summary(run: Run, label: str) -> dict[str, float]:
    benchmarks = read_results(run.paths.evaluation(label))["benchmarks"]
    return {f"{label}/{name}": float(one["accuracy"]) for name, one in benchmarks.items()}


def _moment(artifact: Path) -> int:
    """Time of publication, ms since the epoch; 0 if the manifest is lost."""
    with suppress(KdrlError, ValueError):
        return int(datetime.fromisoformat(manifest_of(artifact).created_at).timestamp() * 1000)
    return 0
