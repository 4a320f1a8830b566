"""The process that does a step for real: `python -m kdrl_core.look.doctor.child SPEC`, SPEC being a JSON file.

Its stdout gets an event per line. What libraries print there goes to stderr in its place. The parent may end this
process at any time, and tells from the last event what was under way. Heavy imports wait until a check needs them.
"""

import faulthandler
import json
import os
import signal
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kdrl_core.config import Recipe, load_recipe
from kdrl_core.look.doctor import needs
from kdrl_core.look.doctor.checks import CheckFailed, Observed, Recorder
from kdrl_core.look.doctor.machine import size_words
from kdrl_core.look.doctor.random_models import own_folder, write_random_models
from kdrl_core.look.doctor.trial import NAME, Trial, make_trial, models_to_try
from kdrl_core.models.devices import Gpu

IMPORTS, PLAN, MEMORY, SPACE = "libraries load", "plan", "host memory", "space for a run"
MODELS, PREFLIGHT, OPEN, CLOSE = "random models", "checks before a run", "run opened", "all processes end"
_START_LIMIT_S = 600.0
_WRITE_LIMIT_S = 1800.0
_BYTES_PER_S = 5e7
"""Slowest reading of weights that a limit allows for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """What the child is told."""

    recipe: Path
    """The recipe as YAML."""
    folder: Path
    """The doctor's folder."""
    gpus: tuple[Gpu, ...]

    def write(self, file: Path) -> None:
        """As JSON."""
        values = {"recipe": str(self.recipe), "folder": str(self.folder), "gpus": [asdict(gpu) for gpu in self.gpus]}
        file.write_text(json.dumps(values), encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> "ChildSpec":
        """What `write` wrote."""
        values = json.loads(file.read_text(encoding="utf-8"))
        gpus = tuple(Gpu(**gpu) for gpu in values["gpus"])
        return cls(recipe=Path(values["recipe"]), folder=Path(values["folder"]), gpus=gpus)


def try_recipe(recipe: Recipe, folder: Path, found: tuple[Gpu, ...], recorder: Recorder) -> None:
    """Every check that needs the models' shapes, or a model."""
    check = recorder.run
    check(IMPORTS, partial(_import, recipe.runtime.device))
    check(PLAN, partial(needs.check_plan, recipe, found), needs=[IMPORTS])
    check(MEMORY, partial(needs.check_host_memory, recipe, found), needs=[IMPORTS])
    check(SPACE, partial(needs.check_space, recipe, folder), needs=[IMPORTS])
    weights: dict[str, int] = {}
    check(MODELS, partial(_write_models, recipe, folder, weights), needs=[IMPORTS], limit_s=_WRITE_LIMIT_S)
    trials: list[Trial] = []
    if check(PREFLIGHT, partial(_preflight, recipe, folder, trials), needs=[MODELS]):
        start_timeout_s = trials[0].recipe.trainer.start_timeout_s
        limit_s = max(weights.values()) / _BYTES_PER_S + max(_START_LIMIT_S, start_timeout_s)
        planned = needs.planned_update_gib(recipe, found)
        _exercise(trials[0], folder, recorder, limit_s=limit_s, planned_gib=planned)


def _exercise(trial: Trial, folder: Path, recorder: Recorder, *, limit_s: float, planned_gib: float | None) -> None:
    """Open a run of the trial's recipe, exercise its stage, close everything."""
    from kdrl_core.boxes.session import StageSession
    from kdrl_core.ledger import create_run, run_lock
    from kdrl_core.look.doctor.exercise import Exercise, WatchedBuilders

    run = create_run(NAME, trial.recipe, artifacts=folder)
    sessions: list[StageSession] = []

    def open_session() -> Observed:
        watched = partial(WatchedBuilders, recorder=recorder, limit_s=limit_s)
        sessions.append(StageSession(run, trial.stage, builders=watched))
        return Observed(says="; ".join(trial.notes) or f"{trial.stage}, in a run of its own")

    def close() -> Observed:
        sessions.pop().close()
        return Observed(says="engines, ranks and workers are closed")

    with run_lock(run.paths.lock):
        try:
            if recorder.run(OPEN, open_session, limit_s=limit_s):
                Exercise(sessions[0], recorder, planned_gib=planned_gib).run(limit_s=limit_s)
                recorder.run(CLOSE, close, limit_s=limit_s)
        finally:
            for session in sessions:
                session.close()


def _import(device: str) -> Observed:
    """A package that is broken, or built for another machine, often fails or crashes here."""
    os.environ.setdefault("DS_ACCELERATOR", device)  # as `load_model` does: transformers may import DeepSpeed
    import torch
    from transformers import AutoModelForCausalLM

    if device == "cuda" and not torch.cuda.is_available():
        raise CheckFailed(
            f"torch {torch.__version__} sees no GPU",
            "compare the driver with torch's CUDA above; in a container pass the GPUs through (docker run --gpus all)",
        )
    return Observed(says=f"{torch.__name__}, {AutoModelForCausalLM.__module__.partition('.')[0]}")


def _write_models(recipe: Recipe, folder: Path, weights: dict[str, int]) -> Observed:
    needs.check_room(recipe, folder)
    models = models_to_try(recipe)
    weights.update(write_random_models(models, folder / "models", seed=recipe.seed))
    shape = {role: "its config.json" if own_folder(model) else "its name" for role, model in models.items()}
    told = [f"{role} {size_words(size)} (shape from {shape[role]})" for role, size in weights.items()]
    return Observed(says=", ".join(told), figures={"bytes": dict(weights)})


def _preflight(recipe: Recipe, folder: Path, trials: list[Trial]) -> Observed:
    """What `kdrl run` checks before it loads anything."""
    from kdrl_core.boxes.preflight import check_inputs

    trial = make_trial(recipe, folder)
    check_inputs(trial.recipe)
    trials.append(trial)
    return Observed(says="those of kdrl run, on the recipe that is tried")


def main(arguments: list[str]) -> int:
    """Run the checks; the exit status says only whether the program came to its end."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # the parent asks for it before it ends a check that hangs
    spec = ChildSpec.read(Path(arguments[0]))
    events_to = os.dup(1)  # no child of this process inherits it
    os.dup2(2, 1)
    with os.fdopen(events_to, "w", buffering=1, encoding="utf-8") as events:

        def emit(event: dict[str, Any]) -> None:
            events.write(json.dumps(event) + "\n")

        emit({"event": "started", "pid": os.getpid()})
        try_recipe(load_recipe(spec.recipe), spec.folder, spec.gpus, Recorder(emit))
        emit({"event": "done"})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
