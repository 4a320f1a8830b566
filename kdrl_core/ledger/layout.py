"""Every path of a run, in one place.

A *step* k counts from 0. It starts from the policy after k updates, which is checkpoint `step-<k>`; its update makes
checkpoint `step-<k+1>`. So the rollouts of `step=000012` were sampled from `checkpoints/<stage>/step-000012`.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from kdrl_core.errors import RunError

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def artifacts_root() -> Path:
    """`$KDRL_ARTIFACTS`, or `artifacts/` in the current folder."""
    return Path(os.environ.get("KDRL_ARTIFACTS", "artifacts")).absolute()


def validate_run_name(name: str) -> str:
    """`name` if it is one plain folder name, else RunError: run names never lead out of the artifacts folder."""
    if not _RUN_NAME.fullmatch(name) or ".." in name:
        raise RunError(
            f"run name {name!r} is not allowed: use letters, digits, '.', '_' and '-', at most 100, "
            "starting with a letter or digit and without '..'"
        )
    return name


def checkpoint_label(stage: str, step: int) -> str:
    """Name of a checkpoint's evaluation."""
    return f"{stage}-step-{step:06d}"


@dataclass(frozen=True, slots=True)
class RunPaths:
    """The files of one run, all below `root`."""

    root: Path

    @classmethod
    def of(cls, run_name: str, artifacts: Path | None = None) -> "RunPaths":
        """Paths of a run by name. Raises RunError for a name that is not one plain folder name."""
        return cls((artifacts or artifacts_root()) / "runs" / validate_run_name(run_name))

    @property
    def name(self) -> str:
        """The run's name."""
        return self.root.name

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
        return self.root / "data" / "pool.parquet"

    @property
    def filter_report(self) -> Path:
        """What the filter kept and dropped, by rule and stage."""
        return self.root / "data" / "filter.json"

    def step(self, stage: str, step: int) -> Path:
        """The hive partition of one step."""
        return self.root / "rollouts" / f"stage={stage}" / f"step={step:06d}"

    def rollouts(self, stage: str, step: int) -> Path:
        """Responses of a step."""
        return self.step(stage, step) / "rollouts.parquet"

    def teacher(self, stage: str, step: int) -> Path:
        """The teacher's logprobs of a step's responses."""
        return self.step(stage, step) / "teacher.parquet"

    def reference(self, stage: str, step: int) -> Path:
        """The frozen initial policy's logprobs of a step's responses."""
        return self.step(stage, step) / "reference.parquet"

    def rewards(self, stage: str, step: int) -> Path:
        """Verdicts of a step."""
        return self.step(stage, step) / "rewards.parquet"

    def update(self, stage: str, step: int) -> Path:
        """Per response: advantage, KL, KD mask, as the update used them. Its manifest ends the step."""
        return self.step(stage, step) / "update.parquet"

    def metrics(self, stage: str) -> Path:
        """One row per step: everything that a rerun reproduces bit by bit."""
        return self.root / "metrics" / f"stage={stage}" / "metrics.parquet"

    def timings(self, stage: str) -> Path:
        """One row per step: seconds by phase, tokens per second."""
        return self.root / "metrics" / f"stage={stage}" / "timings.parquet"

    def checkpoint(self, stage: str, step: int) -> Path:
        """The policy after `step` updates, with optimiser and scheduler."""
        return self.root / "checkpoints" / stage / f"step-{step:06d}"

    def evaluation(self, label: str) -> Path:
        """Results and responses of one evaluated model."""
        return self.root / "evaluation" / label

    @property
    def report(self) -> Path:
        """The final report."""
        return self.root / "report"

    @property
    def student(self) -> Path:
        """The finished student: an ordinary Hugging Face model directory."""
        return self.root / "student"

    @property
    def scratch(self) -> Path:
        """Unpublished working files; may be deleted at any time while nobody works on the run."""
        return self.root / ".scratch"
