"""TensorBoard, MLflow and W&B. Each client is imported only when it is opened, for a new or a known run."""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from kdrl_core.config import TrackerName, dump_recipe
from kdrl_core.config.changes import leaf_fields
from kdrl_core.config.paths import artifacts_root
from kdrl_core.ledger import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The numbers of one step of a stage, or of an evaluation."""

    group: str
    """Stage or `summary`; the prefix of every name."""
    step: int
    """Within its stage, from 0."""
    global_step: int
    """Over all stages, ascending."""
    time_ms: int
    """Time of publication since the epoch, so that a point sent again is the same."""
    values: Mapping[str, float]


@dataclass(slots=True, kw_only=True)
class Sent:
    """What a tracker has received of a run."""

    identity: str | None = None
    """The tracker's id of the run."""
    steps: dict[str, int] = field(default_factory=dict)
    """Stage → steps that were sent."""
    evaluations: list[str] = field(default_factory=list)
    """Labels."""


class Tracker(Protocol):
    """One client, open for one run."""

    run_id: str | None
    """The tracker's id of the run; None if the tracker has no ids."""

    def log(self, point: Point) -> None:
        """Send a point."""
        ...

    def summarize(self, values: Mapping[str, float], time_ms: int) -> None:
        """Send numbers of the whole run; `time_ms` as in a point."""
        self.log(Point(group="summary", step=0, global_step=0, time_ms=time_ms, values=values))

    def flush(self) -> bool:
        """Write everything sent so far. Returns True if a kill can no longer lose any of it."""
        return True

    def close(self, *, complete: bool) -> None:
        """Close the client. `complete`: everything was sent. The run may be opened again."""
        ...


_MAX_PARAM_CHARS = 6_000
"""Of an MLflow parameter."""


class TensorBoardTracker(Tracker):
    """Event files in `tracking/tensorboard/<group>/` of the run: `tensorboard --logdir artifacts/runs`."""

    run_id: str | None = None

    def __init__(self, run: Run, sent: Sent) -> None:
        self._run = run
        self._steps = dict(sent.steps)
        self._writers: dict[str, Any] = {}

    def log(self, point: Point) -> None:
        writer = self._writers.get(point.group) or self._open(point.group)
        for name, value in point.values.items():
            writer.add_scalar(name, value, point.step, walltime=point.time_ms / 1000.0)

    def flush(self) -> bool:
        for writer in self._writers.values():
            writer.flush()
        return True

    def close(self, *, complete: bool) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _open(self, group: str) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        folder, first = self._run.paths.tracking / "tensorboard" / group, self._steps.get(group, 0)
        is_stage = group in self._run.recipe.stages
        # Void the points that a killed process wrote from the next step on; they are written again.
        writer = SummaryWriter(str(folder), purge_step=first if is_stage and folder.is_dir() else None)
        if is_stage and first == 0:
            writer.add_text("recipe", f"```yaml\n{dump_recipe(self._run.recipe)}```", 0)
        self._writers[group] = writer
        return writer


class MLflowTracker(Tracker):
    """A run of an MLflow experiment. Points carry the time of their publication, so that one sent twice counts once."""

    def __init__(self, run: Run, sent: Sent) -> None:
        from mlflow import MlflowClient

        config = run.recipe.tracking
        default = artifacts_root() / "tracking" / "mlflow.db"
        if config.mlflow_uri is None:
            default.parent.mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(tracking_uri=config.mlflow_uri or f"sqlite:///{default}")
        self.run_id: str | None = sent.identity or self._create(run, config.project)
        self._client.update_run(self.run_id, status="RUNNING")

    def log(self, point: Point) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(f"{point.group}/{name}", value, point.time_ms, point.step) for name, value in point.values.items()
        ]
        self._client.log_batch(self.run_id, metrics=metrics)

    def close(self, *, complete: bool) -> None:
        self._client.set_terminated(self.run_id, status="FINISHED" if complete else "KILLED")

    def _create(self, run: Run, project: str) -> str:
        from mlflow.entities import Param

        found = self._client.get_experiment_by_name(project)
        experiment = found.experiment_id if found is not None else self._client.create_experiment(project)
        # An earlier process may have failed after it created the run and before it noted the id: find that run.
        identity = _identity(run)
        begun = self._client.search_runs([experiment], filter_string=f"tags.`kdrl.id` = '{identity}'", max_results=1)
        if begun:
            run_id = str(begun[0].info.run_id)
        else:
            made = self._client.create_run(experiment, run_name=run.name, tags={"kdrl.id": identity})
            run_id = str(made.info.run_id)
        fields = leaf_fields(run.recipe)
        params = [Param(name, str(value)[:_MAX_PARAM_CHARS]) for name, value in fields.items()]
        self._client.log_batch(run_id, params=params)
        return run_id


class WandbTracker(Tracker):
    """A W&B run in offline mode, in `tracking/wandb/` of the run: `wandb sync` sends it. Nothing is sent from here."""

    def __init__(self, run: Run, sent: Sent) -> None:
        import wandb

        self.run_id: str | None = sent.identity or _identity(run)
        folder = run.paths.tracking
        folder.mkdir(parents=True, exist_ok=True)
        # W&B names its folders by the second, and would overwrite one of the same second.
        while (folder / "wandb" / f"offline-run-{datetime.now():%Y%m%d_%H%M%S}-{self.run_id}").exists():  # noqa: DTZ005
            time.sleep(0.1)
        self._run = wandb.init(
            project=run.recipe.tracking.project,
            name=run.name,
            id=self.run_id,
            resume="allow",
            mode="offline",
            dir=str(folder),
            config=leaf_fields(run.recipe),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )

    def log(self, point: Point) -> None:
        values = {f"{point.group}/{name}": value for name, value in point.values.items()}
        self._run.log({**values, f"{point.group}/step": point.step}, step=point.global_step)

    def summarize(self, values: Mapping[str, float], time_ms: int) -> None:
        self._run.summary.update({f"summary/{name}": value for name, value in values.items()})

    def flush(self) -> bool:
        """W&B's own service decides when it writes; it writes everything when the run is closed."""
        return False

    def close(self, *, complete: bool) -> None:
        self._run.finish(exit_code=0 if complete else 1)


def _identity(run: Run) -> str:
    """An id that every process of a run computes alike; a new run of the same name has another."""
    return hashlib.sha256(f"{run.name} {run.started_at}".encode()).hexdigest()[:12]


CLIENTS: dict[TrackerName, Callable[[Run, Sent], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "mlflow": MLflowTracker,
    "wandb": WandbTracker,
}
"""How each tracker is opened: with the run, and what was sent of it."""
