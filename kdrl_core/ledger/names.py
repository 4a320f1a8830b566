"""Names in a run: the paths of its files and the seeds of its draws, both by stage and step.

A *step* k counts from 0. It starts from the policy after k updates, which is checkpoint `step-<k>`; its update makes
checkpoint `step-<k+1>`. So the rollouts of `step=000012` were sampled from `checkpoints/<stage>/step-000012`.

Every draw is a function of (seed, stage, step, prompt, sample), never of what was drawn before. So a run that is killed
anywhere and resumed draws the same numbers as one that was not.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from kdrl_core.config.paths import artifacts_root, validate_run_name
from kdrl_core.ledger import graph
from kdrl_core.ledger.artifact import EVERY, Artifact

_RUNS = "runs"
_OF_A_RUN = ("recipe.yaml", "manifest.json", "run.lock")


def place_of(path: Path) -> str | None:
    """The path of an artifact in its run, `rollouts/stage=…/…`; None if it is not in a run."""
    path = path.absolute()
    for root in path.parents:
        if root.parent.name == _RUNS and any((root / name).is_file() for name in _OF_A_RUN):
            return path.relative_to(root).as_posix()
    return None


def stage_and_step(place: str) -> tuple[str | None, int | None]:
    """Stage and step that a path in a run belongs to; None where it belongs to none."""
    for path in (PurePosixPath(place), *PurePosixPath(place).parents):
        if (node := graph.node_at(str(path))) is not None:
            return node.stage, node.at if node.row.per == "step" and isinstance(node.at, int) else None
        if (step := graph.STEP.find(str(path))) is not None and isinstance(step.at, int):
            return step.stage, step.at
    return None, None


def _of_step(row: Artifact) -> Callable[["RunPaths", str, int], Path]:
    return lambda paths, stage, step: paths.root / row.place(stage, step)


def _of_stage(row: Artifact) -> Callable[["RunPaths", str], Path]:
    return lambda paths, stage: paths.root / row.place(stage)


@dataclass(frozen=True, slots=True)
class RunPaths:
    """The files of one run, all below `root`."""

    root: Path

    @classmethod
    def of(cls, run_name: str, artifacts: Path | None = None) -> "RunPaths":
        """Paths of a run by name. Raises RunError for a name that is not one plain folder name."""
        return cls((artifacts or artifacts_root()) / _RUNS / validate_run_name(run_name))

    @property
    def name(self) -> str:
        """The run's name."""
        return self.root.name

    def relative(self, path: Path) -> str:
        """`path` as manifests and users write it: relative to the run's folder."""
        return path.relative_to(self.root).as_posix()

    @property
    def recipe(self) -> Path:
        """The frozen recipe."""
        return self.root / "recipe.yaml"

    @property
    def manifest(self) -> Path:
        """Config hash, versions, seed, history of the run."""
        return self.root / "manifest.json"

    @property
    def lock(self) -> Path:
        """The file that a working process holds."""
        return self.root / "run.lock"

    @property
    def pool(self) -> Path:
        """The problems that remain after filtering, of every stage."""
        return self.root / graph.POOL.place()

    @property
    def filter_report(self) -> Path:
        """What the filter kept and dropped, by rule and stage."""
        return self.root / graph.FILTER_REPORT.place()

    def begun_steps(self, stage: str) -> list[int]:
        """Steps that have a folder, ascending."""
        folders = self.root.glob(graph.STEP.place(stage, EVERY))
        found = (graph.STEP.find(self.relative(path)) for path in folders)
        return sorted(node.at for node in found if node is not None and isinstance(node.at, int))

    step = _of_step(graph.STEP)
    """The hive partition of one step."""
    rollouts = _of_step(graph.ROLLOUTS)
    """Responses of a step."""
    teacher = _of_step(graph.TEACHER)
    """The teacher's logprobs of a step's responses."""
    reference = _of_step(graph.REFERENCE)
    """The frozen initial policy's logprobs of a step's responses."""
    rewards = _of_step(graph.REWARDS)
    """Verdicts of a step."""
    update = _of_step(graph.UPDATE)
    """Per response: advantage, KL, KD mask, as the update used them. Its manifest ends the step."""
    checkpoint = _of_step(graph.CHECKPOINT)
    """The policy after `step` updates, with optimiser and scheduler."""
    sample_rollouts = _of_step(graph.SAMPLE_ROLLOUTS)
    """The teacher's responses to one shard of the pool, for SFT."""
    sample_rewards = _of_step(graph.SAMPLE_REWARDS)
    """Verdicts of one shard's responses."""
    sft_dataset = _of_stage(graph.SFT_DATASET)
    """The teacher's right responses: what SFT trains on."""
    metrics = _of_stage(graph.METRICS)
    """One row per step: everything that a rerun reproduces bit by bit."""
    timings = _of_stage(graph.TIMINGS)
    """One row per step: seconds by phase, tokens per second."""
    alarms = _of_stage(graph.ALARMS)
    """One row per alarm that the stage's steps raised; not there if there were none."""

    def evaluation(self, label: str) -> Path:
        """Results and responses of one evaluated model."""
        return self.root / graph.EVALUATION.place(at=label)

    @property
    def report(self) -> Path:
        """The final report."""
        return self.root / graph.REPORT.place()

    @property
    def student(self) -> Path:
        """The finished student: an ordinary Hugging Face model directory."""
        return self.root / graph.STUDENT.place()

    @property
    def tracking(self) -> Path:
        """What was sent to trackers, and the files of trackers that write to the run."""
        return self.root / "tracking"

    @property
    def scratch(self) -> Path:
        """Unpublished working files; may be deleted at any time while nobody works on the run."""
        return self.root / ".scratch"


# --- randomness ------------------------------------------------------------------------------------------------------


def derive_seed(*names: object) -> int:
    """A 64-bit seed from names, e.g. `derive_seed(seed, stage, step, prompt_id, sample)`; equal names, equal seed."""
    message = "\x1f".join(str(name) for name in names)
    return int.from_bytes(hashlib.blake2b(message.encode(), digest_size=8).digest(), "little")


def uniforms(seed: int, count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) from the counter-based generator keyed by `seed`; a longer draw only adds numbers."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


def prompts_of_step(
    problem_ids: Sequence[str], *, seed: int, stage: str, step: int, prompts_per_step: int
) -> list[str]:
    """The problems of one step: a slice of consecutive passes over the pool, each shuffled anew.

    Each pass has every problem once, and no step has a problem twice: if a step spans two passes, the second pass
    ends with the problems that the step already has.

    Raises:
        ValueError: the pool is smaller than a step.
    """
    if len(problem_ids) < prompts_per_step:
        raise ValueError(f"problem_ids: {len(problem_ids)} problems are fewer than prompts_per_step={prompts_per_step}")
    ids = tuple(sorted(problem_ids))
    epoch, offset = divmod(step * prompts_per_step, len(ids))
    chosen = _pass(ids, seed, stage, epoch, prompts_per_step)[offset : offset + prompts_per_step]
    if missing := prompts_per_step - len(chosen):
        chosen += _pass(ids, seed, stage, epoch + 1, prompts_per_step)[:missing]
    return list(chosen)


def _pass(ids: tuple[str, ...], seed: int, stage: str, epoch: int, prompts_per_step: int) -> tuple[str, ...]:
    for earlier in range(epoch):  # each pass depends on the tail of the one before: fill the cache upwards
        _shuffled(ids, seed, stage, earlier, prompts_per_step)
    return _shuffled(ids, seed, stage, epoch, prompts_per_step)


@cache
def _shuffled(ids: tuple[str, ...], seed: int, stage: str, epoch: int, prompts_per_step: int) -> tuple[str, ...]:
    shuffled = sorted(ids, key=lambda problem_id: derive_seed(seed, stage, "epoch", epoch, problem_id))
    carried = (len(ids) * epoch) % prompts_per_step
    if carried:
        tail = set(_shuffled(ids, seed, stage, epoch - 1, prompts_per_step)[-carried:])
        shuffled = [i for i in shuffled if i not in tail] + [i for i in shuffled if i in tail]
    return tuple(shuffled)
