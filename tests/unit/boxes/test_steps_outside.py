"""A run goes on with the models and code that it began with, from wherever it is resumed; else it says what differs."""

import shutil
from pathlib import Path

import pytest
from crash.tiny_run import TINY, open_tiny, train, train_step
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flows.cli import app
from kdrl_core.boxes.evaluate import evaluate_model
from kdrl_core.boxes.filter import filter_run
from kdrl_core.boxes.session import close_sessions
from kdrl_core.boxes.sharing import adopt_parts, parts_of
from kdrl_core.config import load_recipe, resolve_path
from kdrl_core.errors import RunError
from kdrl_core.ledger import Run, create_run, outside_of, run_lock

pytestmark = pytest.mark.usefixtures("fast_sessions")

WEIGHTS = "model.safetensors"
OVERRIDES = [*TINY, "stage1=null", "stage2.steps=2", "teacher.path=models/teacher"]


def put_teacher(folder: Path, *, scale: float = 1.0) -> Path:
    """A teacher in a folder's `models/teacher`; with another scale, another one."""
    teacher = folder / "models" / "teacher"
    shutil.copytree(resolve_path("builtin:miniature/teacher"), teacher)
    weights = {name: weight * scale for name, weight in load_file(teacher / WEIGHTS).items()}
    save_file(weights, teacher / WEIGHTS, metadata={"format": "pt"})
    return teacher


@pytest.fixture
def begun(artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run after its first step, whose teacher was given by a relative path."""
    put_teacher(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    run = open_tiny(artifacts, "r", OVERRIDES[len(TINY) :])
    train(run, until=("stage2", 1))
    return run


def teacher_logprobs(run: Run, step: int) -> bytes:
    return run.paths.teacher("stage2", step).read_bytes()


def test_a_run_resumed_from_another_folder_keeps_its_teacher(
    begun: Run, artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = create_run("whole", load_recipe("miniature", OVERRIDES), artifacts=artifacts)
    train(undisturbed)
    put_teacher(tmp_path / "elsewhere", scale=0.5)
    monkeypatch.chdir(tmp_path / "elsewhere")
    close_sessions()
    resumed = create_run("r", load_recipe(begun.paths.recipe), artifacts=artifacts)
    train(resumed)
    assert teacher_logprobs(resumed, 1) == teacher_logprobs(undisturbed, 1)


def test_another_teacher_in_its_place_is_refused_wherever_a_run_is_opened(begun: Run, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "here" / "models")
    put_teacher(tmp_path / "here", scale=0.5)
    with run_lock(begun.paths.lock), pytest.raises(RunError, match=r"teacher\.path=.*: model\.safetensors has sha256"):
        train_step(begun, "stage2", 1)
    with pytest.raises(RunError, match=r"teacher\.path="):
        evaluate_model(begun, "teacher")
    for command in (["resume", "r"], ["run", "--recipe", str(begun.paths.recipe), "--name", "r"]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 1
        assert "run r began with other files than are there now: teacher.path=" in done.output
    assert CliRunner().invoke(app, ["status", "r"]).exit_code == 0
    begun.paths.pool.unlink()
    with pytest.raises(RunError, match=r"teacher\.path="):
        filter_run(begun)


def test_check_reads_models_again_and_names_a_changed_or_missing_one(begun: Run, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["check", "r"])
    assert done.exit_code == 0
    assert "places outside of the run compared: all as published" in done.output
    shutil.rmtree(tmp_path / "here" / "models")
    put_teacher(tmp_path / "here", scale=0.5)
    done = CliRunner().invoke(app, ["check", "r", "--json"])
    assert done.exit_code == 1
    assert "teacher.path: model.safetensors has sha256" in done.output
    assert '"remedy": "restoring it"' in done.output
    (tmp_path / "here" / "models" / "teacher" / WEIGHTS).unlink()
    (tmp_path / "here" / "models" / "teacher" / f"{WEIGHTS}.index.json").write_text("{")
    done = CliRunner().invoke(app, ["check", "r", "--json"])
    assert "teacher.path: " in done.output
    assert "model.safetensors.index.json cannot be read" in done.output
    assert '"remedy": "restoring it"' in done.output
    shutil.rmtree(tmp_path / "here" / "models")
    assert "teacher.path: is missing" in CliRunner().invoke(app, ["check", "r", "--json"]).output


def test_runs_share_work_by_the_content_of_their_models(
    begun: Run, artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(begun)
    for name, scale in (("same", 1.0), ("other", 0.5)):
        put_teacher(tmp_path / name, scale=scale)
        monkeypatch.chdir(tmp_path / name)
        run = create_run(name, load_recipe("miniature", OVERRIDES), artifacts=artifacts)
        assert "stage2" in [part.name for part in parts_of(run.recipe, outside_of(run))]
        with run_lock(run.paths.lock):
            assert adopt_parts(run, ["r"]).get("stage2") == ("r" if scale == 1.0 else None)


def test_two_functions_of_a_file_are_different_work(artifacts: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def one(r):\n    return r\n\n\ndef two(r):\n    return 2 * r\n")
    keys = []
    for name in ("one", "two"):
        recipe = load_recipe("miniature", [f"stage2.kl_estimator={tmp_path}/mine.py:{name}"])
        run = create_run(name, recipe, artifacts=artifacts)
        keys.append({part.name: part.key for part in parts_of(run.recipe, outside_of(run))})
    assert keys[0]["stage1"] == keys[1]["stage1"]
    assert keys[0]["stage2"] != keys[1]["stage2"]
