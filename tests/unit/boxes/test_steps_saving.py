"""A checkpoint that is saved beside the next rollouts, as with trainers whose ranks are processes of their own."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crash.tiny_run import differing, open_tiny, train, train_step

from kdrl_core.boxes import step as step_module
from kdrl_core.boxes.check import check_run
from kdrl_core.boxes.make import make
from kdrl_core.boxes.session import close_sessions, stage_session
from kdrl_core.boxes.stage import checkpoint_steps
from kdrl_core.boxes.step import rollout
from kdrl_core.errors import EngineError
from kdrl_core.ledger import Run, is_published, manifest_of, published_below, run_lock
from kdrl_core.training.torch_trainer import TorchTrainer

pytestmark = pytest.mark.usefixtures("fast_sessions", "aside")

SHORT = ["stage1=null", "stage2.steps=2"]
_WAIT_S = 20.0


@pytest.fixture
def aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer in this process saves as one with ranks. It rests meanwhile, so reading its weights is safe."""
    monkeypatch.setattr(TorchTrainer, "saves_aside", True)


def while_sampling(monkeypatch: pytest.MonkeyPatch, inside: Callable[[], None]) -> None:
    """Have `inside` called when a step begins to sample."""
    sample = step_module.generate_for

    def sampling(*arguments: Any, **options: Any) -> Any:
        inside()
        return sample(*arguments, **options)

    monkeypatch.setattr(step_module, "generate_for", sampling)


def soon(happens: Callable[[], bool]) -> bool:
    """Wait for something that another thread does; whether it has happened."""
    deadline = time.monotonic() + _WAIT_S
    while not (is_so := happens()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return is_so


def inputs_of(run: Run) -> dict[str, dict[str, str]]:
    return {run.paths.relative(path): manifest_of(path).inputs for path in published_below(run.paths.root)}


def test_it_is_saved_while_the_next_responses_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = open_tiny(tmp_path / "plain", "r", SHORT)
    with monkeypatch.context() as patched:
        patched.setattr(TorchTrainer, "saves_aside", False)
        train(plain)
    run = open_tiny(tmp_path / "aside", "r", SHORT)
    sampled: list[int] = []
    save = TorchTrainer.save

    def saving(trainer: TorchTrainer, path: Path) -> Any:
        assert trainer.step == run.recipe.stage("stage2").steps or soon(lambda: trainer.step in sampled)
        return save(trainer, path)

    def sampling() -> None:
        step = len(sampled)
        sampled.append(step)
        assert not is_published(run.paths.checkpoint("stage2", step))
        assert step == 0 or soon(lambda: is_published(run.paths.checkpoint("stage2", step)))
        assert not is_published(run.paths.rollouts("stage2", step))

    while_sampling(monkeypatch, sampling)
    monkeypatch.setattr(TorchTrainer, "save", saving)
    train(run)
    assert sampled == [0, 1]
    assert differing(run, plain) == []
    assert inputs_of(run) == inputs_of(plain)
    assert "checkpoints/stage2/step-000001" in inputs_of(run)["rollouts/stage=stage2/step=000001/rollouts.parquet"]
    assert check_run(run).findings == []


def test_it_is_saved_when_the_engine_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_tiny(tmp_path, "r", SHORT)
    with run_lock(run.paths.lock):
        train(run, until=("stage2", 0))
        train_step(run, "stage2", 0)
        assert checkpoint_steps(run, "stage2") == []

        def fail() -> None:
            raise EngineError("the engine died")

        while_sampling(monkeypatch, fail)
        with pytest.raises(EngineError, match="the engine died"):
            make(stage_session(run.paths.root, "stage2"), rollout, 1)
        assert checkpoint_steps(run, "stage2") == [1]
        assert not is_published(run.paths.rollouts("stage2", 1))


def test_a_failed_save_fails_the_step_and_an_interrupt_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_tiny(tmp_path, "r", SHORT)
    closed = threading.Event()

    def saving(trainer: TorchTrainer, path: Path) -> Any:
        assert is_interrupted is False or closed.wait(_WAIT_S)
        raise EngineError("a rank died")

    monkeypatch.setattr(TorchTrainer, "save", saving)
    monkeypatch.setattr(TorchTrainer, "close", lambda trainer: closed.set())
    with run_lock(run.paths.lock):
        train(run, until=("stage2", 0))
        for is_interrupted, told in ((False, EngineError), (True, KeyboardInterrupt)):
            train_step(run, "stage2", 0)

            def interrupt(interrupted: bool = is_interrupted) -> None:
                if interrupted:
                    raise KeyboardInterrupt

            with monkeypatch.context() as patched:
                while_sampling(patched, interrupt)
                with pytest.raises(told):
                    make(stage_session(run.paths.root, "stage2"), rollout, 1)
            close_sessions()
        assert closed.is_set()
        assert checkpoint_steps(run, "stage2") == []
        assert list(run.paths.root.rglob(".tmp-*")) == []
        assert not is_published(run.paths.rollouts("stage2", 1))


@pytest.mark.parametrize("is_locked", [True, False])
def test_between_steps_it_is_saved_under_the_lock_alone(tmp_path: Path, is_locked: bool) -> None:
    """Another process may work on the run once the lock is free."""
    run = open_tiny(tmp_path, "r", SHORT)
    with run_lock(run.paths.lock):
        train(run, until=("stage2", 0))
        train_step(run, "stage2", 0)
        if is_locked:
            close_sessions()
    close_sessions()
    assert checkpoint_steps(run, "stage2") == ([1] if is_locked else [])
    assert json.loads((run.paths.step("stage2", 0) / "_update.manifest.json").read_text())
