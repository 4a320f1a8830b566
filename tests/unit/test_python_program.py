"""`kdrl.run` around a program that is as short as can be: errors, a stop, Ctrl-C. tests/e2e starts the real one."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import kdrl_core as kdrl
from kdrl_core.errors import RecipeError, RunError, Stopped
from kdrl_core.look.python import program

Put = Callable[[str], None]


@pytest.fixture
def put(tmp_path: Path, artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Makes a shell script the program that is started."""
    script = tmp_path / "kdrl"
    monkeypatch.setattr(program, "_PROGRAM", [str(script)])

    def put(text: str) -> None:
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)

    return put


def test_it_is_the_command_with_the_overrides_as_texts(
    put: Put, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(f'printf "%s\\n" "$@" > {tmp_path}/arguments; echo step 1; echo step 2 >&2')
    steps = type("Number", (), {"item": lambda self: 3})()  # as those of NumPy and torch
    changes = {"stage2.steps": steps, "stage2.beta": None, "stage1.learning_rate": 1e-6, "stage2.objective": "grpo"}
    run = kdrl.run("miniature", changes, name="mine")
    assert (run.name, run.path.parent.name) == ("mine", "runs")
    assert (tmp_path / "arguments").read_text().splitlines() == [
        *("run", "--recipe", "miniature", "--name", "mine", "--set", "stage2.steps=3", "--set", "stage2.beta=null"),
        *("--set", "stage1.learning_rate=1e-06", "--set", 'stage2.objective="grpo"'),
    ]
    assert capsys.readouterr().err == "step 1\nstep 2\n"
    assert kdrl.run("miniature", ["stage2.steps=3"]).name.startswith("miniature-20")


def test_a_bad_recipe_or_name_starts_nothing(put: Put, tmp_path: Path) -> None:
    put(f"touch {tmp_path}/started")
    with pytest.raises(RecipeError, match="did you mean 'miniature'"):
        kdrl.run("miniatur")
    with pytest.raises(RecipeError, match=r"stage2\.stepz"):
        kdrl.run("miniature", {"stage2.stepz": 3})
    with pytest.raises(RecipeError, match=r"override \('stage2.steps', 3\): give a text such as"):
        kdrl.run("miniature", [("stage2.steps", 3)])  # type: ignore[list-item]
    with pytest.raises(RunError, match="not allowed"):
        kdrl.run("miniature", name="../mine")
    assert not (tmp_path / "started").exists()


def test_an_error_of_the_program_is_raised_with_its_text(put: Put) -> None:
    put('echo "error: run mine is in use by pid 7; wait for it" >&2; exit 1')
    with pytest.raises(RunError, match=r"^run mine is in use by pid 7; wait for it$"):
        kdrl.run(name="mine")
    put("kill -9 $$")
    with pytest.raises(RunError, match="signal SIGKILL"):
        kdrl.run(name="mine")
    put("exit 130")
    with pytest.raises(Stopped, match="run mine was stopped"):
        kdrl.run(name="mine")


def test_ctrl_c_stops_the_program_in_order(put: Put, tmp_path: Path) -> None:
    put(f"trap 'touch {tmp_path}/ended; exit 130' TERM; touch {tmp_path}/ready; sleep 20 & wait")

    def interrupt() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        kdrl.run(name="mine")
    assert (tmp_path / "ended").exists()


def test_on_a_terminal_the_program_shows_itself(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = os.openpty()
    put("test -t 2 && test -t 1 && echo a progress bar; exit 1")
    with os.fdopen(slave, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        with pytest.raises(RunError, match=r"^run mine failed, status 1; its last lines say why$"):
            kdrl.run(name="mine")
        assert os.read(master, 99) == b"a progress bar\r\n"
    os.close(master)
