"""What docs/architecture.md answers under "How do I add", done once for an objective, a rollout engine and a command.

An estimator is added in boxes/test_steps_estimator.py, an artifact with its box and task in boxes/test_make.py.
"""

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
