"""Every path of a run, in one place.

A *step* k counts from 0. It starts from the policy after k updates, which is checkpoint `step-<k>`; its update makes
checkpoint `step-<k+1>`. So the rollouts of `step=000012` were sampled from `checkpoints/<stage>/step-000012`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from kdrl_core.config.paths import artifacts_root, validate_run_name


def checkpoint_label(stage: str, step: int) -> str:
    """Name of a checkpoint's evaluation."""
    return f"{stage}-step-{step:06d}"


def checkpoint_step(label: str, stage: str) -> int | None:
    """The step of `checkpoint_label`; None for any other name."""
    head, _, digits = label.rpartition("-step-")
    return int(digits) if head == stage and digits.isdecimal() else None


_RUNS = "runs"
_OF_A_RUN = ("recipe.yaml", "manifest.json", "run.lock")
_STEP = re.compile(r"step=(\d{6,})")


def place_of(path: Path) -> str | None:
    """The path of an artifact in its run, `rollouts/stage=…/…`; None if it lies in no run."""
    path = path.absolute()
    for root in path.parents:
        if root.parent.name == _RUNS and any((root / name).is_file() for name in _OF_A_RUN):
            return path.relative_to(root).as_posix()
    return None


def stage_and_step(place: str) -> tuple[str | None, int | None]:
    """Stage and step that a path in a run belongs to, or None for what belongs to none."""
    parts = place.split("/")
    if parts[0] == "checkpoints" and len(parts) > 2:
        return parts[1], _number(parts[2].removeprefix("step-"))
    named = dict(part.split("=", 1) for part in parts if "=" in part)
    return named.get("stage"), _number(named.get("step", ""))


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


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

    def begun_steps(self, stage: str) -> list[int]:
        """Steps that have a folder, ascending."""
        found = (_STEP.fullmatch(path.name) for path in self.step(stage, 0).parent.glob("step=*"))
        return sorted(int(match[1]) for match in found if match)

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

    def sample_rollouts(self, stage: str, shard: int) -> Path:
        """The teacher's responses to one shard of the pool, for SFT."""
        return self._samples(stage) / f"shard={shard:06d}" / "rollouts.parquet"

    def sample_rewards(self, stage: str, shard: int) -> Path:
        """Verdicts of one shard's responses."""
        return self._samples(stage) / f"shard={shard:06d}" / "rewards.parquet"

    def sft_dataset(self, stage: str) -> Path:
        """The teacher's right responses: what SFT trains on."""
        return self._samples(stage) / "dataset.parquet"

    def _samples(self, stage: str) -> Path:
        return self.root / "samples" / f"stage={stage}"

    def metrics(self, stage: str) -> Path:
        """One row per step: everything that a rerun reproduces bit by bit."""
        return self.root / "metrics" / f"stage={stage}" / "metrics.parquet"

    def timings(self, stage: str) -> Path:
        """One row per step: seconds by phase, tokens per second."""
        return self.root / "metrics" / f"stage={stage}" / "timings.parquet"

    def alarms(self, stage: str) -> Path:
        """One row per alarm that the stage's steps raised; not there if there were none."""
        return self.root / "metrics" / f"stage={stage}" / "alarms.parquet"

    def checkpoint(self, stage: str, step: int) -> Path:
        """The policy after `step` updates, with optimiser and scheduler."""
        return self.root / "checkpoints" / stage / f"step-{step:06d}"

    def evaluation(self, label: str) -> Path:
        """Results and responses of one evaluated model."""
        return self.root / "evaluation" / label

    @property
    def tracking(self) -> Path:
        """What was sent to trackers, and the files of those that keep theirs here."""
        return self.root / "tracking"

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
