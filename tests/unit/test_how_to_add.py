"""What docs/architecture.md answers under "How do I add", done once for an objective, a rollout engine, a reward
and a command.

An estimator is added in boxes/test_steps_estimator.py, an artifact with its box and task in boxes/test_make.py.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from crash.tiny_run import open_tiny, rows, train
from typer.testing import CliRunner

from flows.cli import app
from flows.cli.shared import errors, out
from kdrl_core.boxes import builders
from kdrl_core.engines.from_recipe import rollout_engine
from kdrl_core.engines.protocols import OnFinished, RolloutEngine
from kdrl_core.objectives.kinds import OBJECTIVES, ObjectiveKind
from kdrl_core.types import Rollout, RolloutRequest

ONE_STAGE = ["stage1=null", "stage2.steps=2"]


@pytest.mark.usefixtures("fast_sessions")
def test_an_objective_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Distillation alone, on the responses that failed: a combination that the paper does not have."""
    row = ObjectiveKind(teacher="scores", distils=True, is_masked=True)
    monkeypatch.setitem(OBJECTIVES, "rkl_on_failures", row)
    run = open_tiny(tmp_path, "r", [*ONE_STAGE, "stage2.objective=rkl_on_failures", "stage2.kd_masking=response"])
    train(run)
    for step in range(2):
        update, rewards = rows(run.paths.update("stage2", step)), rows(run.paths.rewards("stage2", step))
        assert {row["advantage"] for row in update} == {0.0}
        assert [row["kd_weight"] for row in update] == [float(row["reward"] == 0.0) for row in rewards]
    assert run.paths.checkpoint("stage2", 2).is_dir()


class Counting:
    """A rollout engine around another one, which counts what it was asked for."""

    def __init__(self, inner: RolloutEngine) -> None:
        self.inner, self.asked = inner, 0

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        *,
        on_finished: OnFinished | None = None,
        max_response_tokens: int | None = None,
    ) -> list[Rollout]:
        self.asked += len(requests)
        return self.inner.generate(requests, on_finished=on_finished, max_response_tokens=max_response_tokens)

    def load_weights(self, checkpoint_dir: Path) -> None:
        self.inner.load_weights(checkpoint_dir)

    def sleep(self) -> None:
        self.inner.sleep()

    def close(self) -> None:
        self.inner.close()


@pytest.mark.usefixtures("fast_sessions")
def test_an_engine_is_a_class_that_the_session_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Counting] = []

    def counting(*arguments: Any, **options: Any) -> Counting:
        made.append(Counting(rollout_engine(*arguments, **options)))
        return made[-1]

    monkeypatch.setattr(builders, "rollout_engine", counting)
    run = open_tiny(tmp_path, "r", ONE_STAGE)
    train(run)
    assert [engine.asked for engine in made] == [2 * 4 * 4]  # steps × prompts × responses


REWARD = {
    "config/answers.py": (
        '    require_format: bool = Field(True, description="multiply by the format reward")\n',
        '    unformatted: float = Field(0.0, description="reward of a right answer in the wrong format")\n',
    ),
    "verify/screening.py": (
        "    require_format: bool\n",
        "    unformatted: float\n",
        "    accuracy = 1.0 if outcome.kind is VerdictKind.CORRECT else 0.0\n",
        "    if form.kind is not None and accuracy:\n"
        "        return Verdict(\n"
        "            kind=form.kind, reward=options['unformatted'], format_reward=0.0, accuracy_reward=1.0,\n"
        "            extracted=form.answer, reason='right, in the wrong format',\n"
        "        )\n",
    ),
}
"""File → lines of it, each followed by what is added behind it."""
REWARDED = """
import sys
from pathlib import Path
from crash.tiny_run import open_tiny, rows, train
from kdrl_core.boxes.session import stage_session

run = open_tiny(Path(sys.argv[1]), "r", ["stage1=null", "stage2.steps=1", "reward.unformatted=0.25"])
train(run)
rewards = rows(run.paths.rewards("stage2", 0))
options = stage_session(run.paths.root, "stage2").verdict_options(rows(run.paths.rollouts("stage2", 0))[0]["prompt"])
verifier = stage_session(run.paths.root, "stage2").verifier
print(*(verifier.verify(text, "4", **options).reward for text in (r"\\boxed{4}", r"\\boxed{5}")))
print(all(row["reward"] == (0.25 if row["format_reward"] == 0 else 1) * row["accuracy_reward"] for row in rewards))
"""


def test_a_switch_of_the_reward_is_a_field_and_two_lines(tmp_path: Path) -> None:
    """A right answer in the wrong format gets a quarter: in a copy of the core with these lines added."""
    root = Path(__file__).parent.parent.parent
    core = tmp_path / "kdrl_core"
    shutil.copytree(root / "kdrl_core", core, ignore=shutil.ignore_patterns("__pycache__"))
    for name, lines in REWARD.items():
        text = (core / name).read_text()
        for anchor, added in zip(lines[::2], lines[1::2], strict=True):
            assert text.count(anchor) == 1
            text = text.replace(anchor, anchor + added)
        (core / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", REWARDED, str(tmp_path / "artifacts")],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{root}:{root / 'tests'}", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0.25", "0.0", "True"]


def test_a_command_is_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "registered_commands", list(app.registered_commands))

    @app.command()
    def hello(name: str) -> None:
        """Greet a run."""
        with errors():
            out.print(f"hello {name}")

    found = CliRunner().invoke(app, ["hello", "mine"])
    assert (found.exit_code, "hello mine" in found.output) == (0, True)
    assert "Greet a run." in CliRunner().invoke(app, ["--help"]).output
