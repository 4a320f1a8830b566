"""Run names, paths in recipes, run directories: none leads out of its folder, and links in a run are not followed."""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kdrl_core.config import load_recipe
from kdrl_core.config.paths import resolve_path
from kdrl_core.errors import KdrlError, RecipeError, RunError
from kdrl_core.ledger import (
    Run,
    RunPaths,
    create_run,
    open_run,
    publish_directory,
    publish_file,
    run_lock,
    sweep_temporaries,
)

BAD_NAMES = [
    *(
        "",
        ".",
        "..",
        "../x",
        "a/..",
        "a/b",
        "/etc",
        "/",
        "a\\b",
        "..\\x",
        "C:\\x",
        "c:x",
        "a..b",
        "~",
        "~root",
        "$HOME",
    ),
    *("a\x00b", "a\n", "\na", "a\nb", "a\r", "a\tb", "a b", " a", "a ", ".hidden", "-rf", "--help", "_x", "a*", "a?"),
    *(
        "a%2e%2e",
        "\u0430",
        "\uff41",
        "é",
        "\u2024\u2024",
        "\u2215etc",
        "a\u202eb",
        "١",
        "x" * 101,
        "a\x1b[2J",
        "a;b",
        "a|b",
    ),
]  # Cyrillic a, full-width a, one-dot leaders, division slash, right-to-left override, an Arabic digit


def everything_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_run_name_is_one_plain_folder_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDRL_ARTIFACTS", str(tmp_path / "artifacts"))
    recipe = load_recipe("miniature")
    for attempt in (lambda: RunPaths.of(name), lambda: create_run(name, recipe), lambda: open_run(name)):
        with pytest.raises(RunError, match="is not allowed: use letters, digits") as caught:
            attempt()
        assert str(caught.value).isprintable()
    with pytest.raises(KdrlError):
        resolve_path(f"run:{name}")
    with pytest.raises(RecipeError, match="'name'"):
        load_recipe("miniature", ["name=" + json.dumps(f"{name}/")])  # recipe names go into default run names
    assert everything_below(tmp_path) == []


@pytest.mark.parametrize("command", ["run", "resume", "status", "recover"])
def test_no_command_takes_another_name(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.cli import app

    monkeypatch.setenv("KDRL_ARTIFACTS", str(tmp_path / "artifacts"))
    for name in (name for name in BAD_NAMES if name):
        done = CliRunner().invoke(app, [command, *(["--name"] if command == "run" else ["--"]), name])
        assert done.exit_code == 1, name
        assert "is not allowed: use letters, digits" in done.stderr
        assert done.stderr.count("\n") == 1
    assert everything_below(tmp_path) == []


@pytest.mark.parametrize("name", ["..", "../x", "/etc/x", "a\nb", "-rf"])
def test_no_flow_parameter_is_another_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import full_pipeline

    monkeypatch.setenv("KDRL_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setattr(full_pipeline, "require_runnable", lambda recipe: None)
    with pytest.raises(RunError, match="is not allowed"):
        full_pipeline.full_pipeline.fn(recipe="miniature", run_name=name)
    assert everything_below(tmp_path) == []


def names_of_elsewhere(tmp_path: Path) -> Iterator[str]:
    elsewhere = create_run("x", load_recipe("miniature"), artifacts=tmp_path / "elsewhere").paths.root
    create_run("x", load_recipe("miniature"), artifacts=tmp_path / "artifacts")
    (tmp_path / "artifacts" / "runs" / "link").symlink_to(elsewhere.parent)
    runs = tmp_path / "artifacts" / "runs"
    yield str(elsewhere)
    yield os.path.relpath(elsewhere)
    yield f"{runs}/../../elsewhere/runs/x"
    yield f"{runs}/link/x"
    yield f"{runs}/link/../runs/x"
    yield f"{runs}/x/../../../elsewhere/runs/x"
    yield f"{runs}/.."
    yield f"{runs}/x/data"
    yield str(runs)
    yield "/etc"
    yield "/"
    yield ""
    yield "x"
    yield f"{runs}/a\nb"


def test_stage_flows_work_on_runs_of_their_own_artifacts_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may start a deployment says where: without a bound, the worker would lock and write anywhere."""
    from flows.evaluation import evaluation
    from flows.filtering import filtering
    from flows.reporting import reporting
    from flows.sft_stage import sft_stage
    from flows.stage_flows import open_own_run
    from flows.training_stage import training_stage

    monkeypatch.setenv("KDRL_ARTIFACTS", str(tmp_path / "artifacts"))
    for run_dir in names_of_elsewhere(tmp_path):
        before = everything_below(tmp_path)
        for flow in (filtering, evaluation, reporting):
            with pytest.raises(RunError, match=r"is no run of .*; give the folder of one|is not allowed"):
                flow.fn(run_dir)
        for flow in (training_stage, sft_stage):
            with pytest.raises(RunError, match=r"is no run of .*; give the folder of one|is not allowed"):
                flow.fn(run_dir, "stage1")
        assert everything_below(tmp_path) == before
    own = tmp_path / "artifacts" / "runs" / "x"
    monkeypatch.chdir(tmp_path)
    for run_dir in (own, f"{own}/", "artifacts/runs/x"):
        assert open_own_run(run_dir).paths.root == own


@pytest.mark.parametrize(
    "path",
    [
        *("builtin:../x", "builtin:/etc/passwd", "builtin:miniature/../../config/paths.py", "builtin:a\x00b"),
        *("package:json/../os.py", "package:json//etc/passwd", "package:../x", "package:", "package:/etc", "package:."),
        *("package:os/x", "package:__main__/x", "package:antigravity.x/y", "package:json.nosuch/x", "package:\x00/x"),
        *("a\x00b", "a\x1b[2J", "~nosuchuser/x", "run:../x", "run:/etc", "run:"),
    ],
)
def test_a_path_in_a_recipe_stays_below_what_it_names(path: str) -> None:
    import sys

    with pytest.raises((RecipeError, RunError)) as caught:
        resolve_path(path)
    assert str(caught.value).isprintable()
    assert "antigravity" not in sys.modules  # finding a module within it would import it


def test_a_link_out_of_the_assets_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdrl_core.config.paths.ASSETS", tmp_path / "assets")
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "link").symlink_to("/etc")
    with pytest.raises(RecipeError, match="leaves"):
        resolve_path("builtin:link/passwd")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return create_run("mine", load_recipe("miniature"), artifacts=tmp_path / "artifacts")


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """Nothing in the folder changes while the context is open."""

    def contents() -> dict[str, bytes | None]:
        return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}

    before = contents()
    yield
    assert contents() == before


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of the user's, with names that tempt."""
    folder = tmp_path / "outside"
    (folder / ".tmp-mine").mkdir(parents=True)
    for name in ("thesis.tex", ".tmp-1", ".tmp-mine/letter.txt"):
        (folder / name).write_text("dear to somebody")
    return folder


def test_sweeping_a_run_deletes_nothing_that_links_lead_to(run: Run, outside: Path) -> None:
    (run.paths.root / "data").mkdir()
    (run.paths.root / "data" / ".tmp-link").symlink_to(outside)
    (run.paths.root / "data" / ".tmp-file").symlink_to(outside / "thesis.tex")
    (run.paths.root / "rollouts").symlink_to(outside)
    with untouched(outside):
        sweep_temporaries(run.paths.root)


def test_publishing_replaces_a_link_and_not_what_it_leads_to(run: Run, outside: Path) -> None:
    run.paths.pool.parent.mkdir()
    run.paths.pool.symlink_to(outside / "thesis.tex")
    run.paths.student.symlink_to(outside)
    with untouched(outside):
        publish_file(run.paths.pool, lambda path: path.write_text("new") and None)
        publish_directory(run.paths.student, lambda folder: (folder / "config.json").write_text("{}") and None)
    assert not run.paths.pool.is_symlink()
    assert not run.paths.student.is_symlink()


def test_a_lock_that_is_a_link_locks_nothing_else(run: Run, outside: Path) -> None:
    run.paths.lock.unlink(missing_ok=True)
    run.paths.lock.symlink_to(outside / "thesis.tex")
    with untouched(outside), pytest.raises(OSError, match="symbolic links"), run_lock(run.paths.lock):
        pass


def test_nothing_that_a_run_writes_is_writable_for_others(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        run = create_run("mine", load_recipe("miniature"), artifacts=tmp_path / "artifacts")
        publish_file(run.paths.pool, lambda path: path.write_text("x") and None)
        publish_directory(run.paths.student, lambda folder: (folder / "config.json").write_text("{}") and None)
        with run_lock(run.paths.lock):
            modes = {path: path.stat().st_mode for path in [tmp_path, *tmp_path.rglob("*")]}
    finally:
        os.umask(before)
    assert len(modes) > 8
    assert [path for path, mode in modes.items() if mode & (stat.S_IWGRP | stat.S_IWOTH)] == []
