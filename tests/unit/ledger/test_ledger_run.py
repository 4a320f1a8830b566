"""Runs and their lock: names, the frozen recipe, who may change it, and who may work on it."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from kdrl_core.config import Recipe, config_hash, dump_recipe, load_recipe
from kdrl_core.errors import DamagedArtifactError, RunError, RunLockedError
from kdrl_core.ledger import (
    RunPaths,
    artifacts_root,
    create_run,
    list_runs,
    lock_holder,
    open_run,
    open_run_dir,
    publish_file,
    run_lock,
    validate_run_name,
    verify_published,
)


def changed(*overrides: str) -> Recipe:
    """The miniature with the fields that these tests look at set to known values, and then `overrides`."""
    known = ["stage2.steps=40", "stage2.learning_rate=5e-4", "stage2.beta.init=0.1"]
    return load_recipe("miniature", [*known, *overrides])


@pytest.fixture
def recipe() -> Recipe:
    return changed()


@pytest.mark.parametrize("name", ["a", "demo-20260131-1200", "A.b_c-1", "7", "x" * 100])
def test_plain_names_are_allowed(name: str) -> None:
    assert validate_run_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "/abs", "a\\b", "a..b", ".hidden", "-flag", "a b", "a\n", "é", "x" * 101, "a\0"],
)
def test_names_that_could_lead_elsewhere_are_refused(name: str, tmp_path: Path, recipe: Recipe) -> None:
    for refused in (lambda: validate_run_name(name), lambda: create_run(name, recipe, artifacts=tmp_path)):
        with pytest.raises(RunError, match=r"is not allowed: use letters, digits") as caught:
            refused()
        assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match="is not allowed"):
        open_run(name, artifacts=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_new_run_has_recipe_and_manifest(tmp_path: Path, recipe: Recipe) -> None:
    run = create_run("one", recipe, artifacts=tmp_path)
    assert run.paths.root == tmp_path / "runs" / "one"
    assert load_recipe(run.paths.recipe) == recipe
    manifest = json.loads(run.paths.manifest.read_text())
    assert manifest["config_hash"] == config_hash(recipe)
    assert (manifest["run"], manifest["recipe"], manifest["seed"], manifest["history"]) == ("one", "miniature", 0, [])
    assert {"kdrl", "python", "torch", "prefect"} <= set(manifest["versions"])
    assert run.started_at == manifest["created_at"]
    assert open_run("one", artifacts=tmp_path) == run == open_run_dir(run.paths.root)


def test_creating_a_run_again_opens_it(tmp_path: Path, recipe: Recipe) -> None:
    first = create_run("one", recipe, artifacts=tmp_path)
    before = first.paths.manifest.read_bytes()
    assert create_run("one", recipe, artifacts=tmp_path) == first
    assert first.paths.manifest.read_bytes() == before


def test_a_changed_recipe_is_refused_with_the_fields(tmp_path: Path, recipe: Recipe) -> None:
    run = create_run("one", recipe, artifacts=tmp_path)
    before = run.paths.manifest.read_bytes(), run.paths.recipe.read_bytes()
    other = changed("stage2.learning_rate=1e-4", "stage2.beta.init=0.2", "description=harmless")
    with pytest.raises(RunError) as caught:
        create_run("one", other, artifacts=tmp_path)
    message = str(caught.value)
    assert "stage2.learning_rate: 0.0005 → 0.0001; stage2.beta.init: 0.1 → 0.2" in message
    refused, _, safe = message.partition("Safe to change are ")
    assert "description" not in refused
    assert safe.startswith("description, stage?.evaluate_every, stage?.checkpoint.*, verification.workers")
    assert safe.endswith("and more steps in the last stage")
    assert "Use another run name" in message
    assert (run.paths.manifest.read_bytes(), run.paths.recipe.read_bytes()) == before


def test_a_safe_change_is_taken_and_recorded(tmp_path: Path, recipe: Recipe) -> None:
    run = create_run("one", recipe, artifacts=tmp_path)
    for steps in (60, 80):
        run = create_run("one", changed(f"stage2.steps={steps}"), artifacts=tmp_path)
        assert run.recipe.stage("stage2").steps == steps
    manifest = json.loads(run.paths.manifest.read_text())
    assert [entry["changes"] for entry in manifest["history"]] == [["stage2.steps: 40 → 60"], ["stage2.steps: 60 → 80"]]
    assert all(entry["at"] for entry in manifest["history"])
    assert manifest["config_hash"] == config_hash(run.recipe)
    assert "announced_config_hash" not in manifest
    assert open_run("one", artifacts=tmp_path) == run


def test_a_recipe_edited_by_hand_is_refused(tmp_path: Path, recipe: Recipe) -> None:
    run = create_run("one", recipe, artifacts=tmp_path)
    run.paths.recipe.write_text(dump_recipe(changed("stage2.steps=60")))
    for again in (lambda: open_run("one", artifacts=tmp_path), lambda: create_run("one", recipe, artifacts=tmp_path)):
        with pytest.raises(RunError, match=r"recipe\.yaml was changed by hand.*Undo the change"):
            again()
    run.paths.recipe.write_text("# only a comment more\n" + dump_recipe(recipe))
    assert open_run("one", artifacts=tmp_path) == run


def test_going_back_by_hand_after_a_safe_change_is_refused(tmp_path: Path, recipe: Recipe) -> None:
    create_run("one", recipe, artifacts=tmp_path)
    run = create_run("one", changed("stage2.steps=60"), artifacts=tmp_path)
    run.paths.recipe.write_text(dump_recipe(recipe))
    with pytest.raises(RunError, match="changed by hand"):
        open_run("one", artifacts=tmp_path)


@pytest.mark.parametrize("failing_call", [1, 2, 3])
def test_a_crash_while_changing_the_recipe_leaves_a_run_that_opens(
    failing_call: int, tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kdrl_core.ledger.run as module

    create_run("one", recipe, artifacts=tmp_path)
    calls, original = [0], module.replace_file

    def failing(path: Path, content: bytes) -> None:
        calls[0] += 1
        if calls[0] == failing_call:
            raise KeyboardInterrupt
        original(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(module, "replace_file", failing)
        with pytest.raises(KeyboardInterrupt):
            create_run("one", changed("stage2.steps=60"), artifacts=tmp_path)
    assert open_run("one", artifacts=tmp_path).recipe.stage("stage2").steps in (40, 60)
    run = create_run("one", changed("stage2.steps=80"), artifacts=tmp_path)
    assert open_run("one", artifacts=tmp_path) == run
    assert "announced_config_hash" not in json.loads(run.paths.manifest.read_text())


@pytest.mark.parametrize("content", ["", "[]", "{", "null"])
def test_a_damaged_run_manifest_is_told(content: str, tmp_path: Path, recipe: Recipe) -> None:
    run = create_run("one", recipe, artifacts=tmp_path)
    run.paths.manifest.write_text(content)
    with pytest.raises(RunError, match=r"manifest\.json .*restore it from a backup"):
        open_run("one", artifacts=tmp_path)


def test_a_missing_recipe_is_told(tmp_path: Path, recipe: Recipe) -> None:
    create_run("one", recipe, artifacts=tmp_path).paths.recipe.unlink()
    with pytest.raises(RunError, match=r"recipe\.yaml is missing; .*: kdrl run --recipe RECIPE --name one"):
        open_run("one", artifacts=tmp_path)
    with pytest.raises(RunError, match=r"recipe\.yaml is missing"):
        create_run("one", changed("seed=7"), artifacts=tmp_path)
    assert create_run("one", recipe, artifacts=tmp_path).recipe == recipe
    assert open_run("one", artifacts=tmp_path).recipe == recipe


@pytest.mark.parametrize("content", [None, "", "{"])
def test_a_lost_manifest_is_written_anew_from_the_recipe(content: str | None, tmp_path: Path, recipe: Recipe) -> None:
    run = create_run("one", recipe, artifacts=tmp_path)
    publish_file(run.paths.pool, lambda path: path.write_text("rows") and None)
    if content is None:
        run.paths.manifest.unlink()
    else:
        run.paths.manifest.write_text(content)
    with pytest.raises(RunError, match=r"manifest\.json .*written anew: kdrl run --recipe .* --name one"):
        open_run("one", artifacts=tmp_path)
    with pytest.raises(RunError, match=r"started with another recipe: seed: 0 → 7"):
        create_run("one", changed("seed=7"), artifacts=tmp_path)
    assert create_run("one", recipe, artifacts=tmp_path).recipe == recipe
    assert open_run("one", artifacts=tmp_path).recipe == recipe
    verify_published(run.paths.pool)


def test_artifacts_of_nobody_knows_what_are_not_gone_on_with(tmp_path: Path, recipe: Recipe) -> None:
    run = create_run("one", recipe, artifacts=tmp_path)
    publish_file(run.paths.pool, lambda path: path.write_text("rows") and None)
    run.paths.manifest.unlink()
    run.paths.recipe.unlink()
    with pytest.raises(RunError, match=r"holds artifacts, but no readable recipe\.yaml or manifest\.json says"):
        create_run("one", recipe, artifacts=tmp_path)
    verify_published(run.paths.pool)


def test_an_unknown_run_names_the_known_ones(tmp_path: Path, recipe: Recipe) -> None:
    with pytest.raises(RunError, match=r"no run 'nosuch' in .*; there are none yet; start one with kdrl run"):
        open_run("nosuch", artifacts=tmp_path)
    create_run("one", recipe, artifacts=tmp_path)
    with pytest.raises(RunError, match=r"no run 'nosuch' in .*; runs here: one"):
        open_run("nosuch", artifacts=tmp_path)


def test_runs_are_listed_oldest_first(tmp_path: Path, recipe: Recipe) -> None:
    assert list_runs(tmp_path) == []
    for name, created in (("b", "2026-01-01"), ("c", "2026-01-03"), ("a", "2026-01-02")):
        manifest = create_run(name, recipe, artifacts=tmp_path).paths.manifest
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "created_at": created}))
    (tmp_path / "runs" / "no-run").mkdir()
    assert list_runs(tmp_path) == ["b", "a", "c"]


def test_artifacts_lie_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KDRL_ARTIFACTS", raising=False)
    assert artifacts_root() == tmp_path / "artifacts"
    monkeypatch.setenv("KDRL_ARTIFACTS", str(tmp_path / "elsewhere"))
    assert RunPaths.of("one").root == tmp_path / "elsewhere" / "runs" / "one"


def test_inputs_are_verified_when_they_are_named(tmp_path: Path, recipe: Recipe) -> None:
    run = create_run("one", recipe, artifacts=tmp_path)
    manifest = publish_file(run.paths.pool, lambda path: path.write_text("pool") and None)
    assert run.inputs(run.paths.pool) == {"data/pool.parquet": manifest.sha256}
    run.paths.pool.write_text("poll")
    with pytest.raises(DamagedArtifactError, match=r"pool\.parquet is damaged"):
        run.inputs(run.paths.pool)


def test_every_path_of_a_run_is_below_its_folder_and_its_own(tmp_path: Path) -> None:
    paths = RunPaths.of("one", tmp_path)
    files = [paths.recipe, paths.manifest, paths.lock, paths.pool, paths.filter_report, paths.report, paths.student]
    for stage in ("stage1", "stage2"):
        files += [paths.metrics(stage), paths.timings(stage), paths.evaluation(stage)]
        for step in (0, 12):
            files += [paths.rollouts(stage, step), paths.teacher(stage, step), paths.reference(stage, step)]
            files += [paths.rewards(stage, step), paths.update(stage, step), paths.checkpoint(stage, step)]
    assert len(set(files)) == len(files)
    assert all(file.is_relative_to(paths.root) for file in files)
    # The layout of DESIGN.md, read as one hive-partitioned dataset.
    assert paths.rollouts("stage2", 12).relative_to(paths.root).as_posix() == (
        "rollouts/stage=stage2/step=000012/rollouts.parquet"
    )
    assert paths.checkpoint("stage2", 12).relative_to(paths.root).as_posix() == "checkpoints/stage2/step-000012"


HOLD = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from kdrl_core.ledger import run_lock
    with run_lock(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(60)
    """
)


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "one" / "run.lock"


@pytest.fixture
def holder(lock: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_and_told_who_works(lock: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(RunLockedError) as caught, run_lock(lock):
        pass
    message = str(caught.value)
    assert f"run one is in use by pid {holder.pid} on " in message
    assert " since 20" in message
    assert "wait for it, stop it, or use another run name" in message
    assert lock_holder(lock) is not None
    assert f"pid {holder.pid} on " in str(lock_holder(lock))


def test_the_lock_ends_with_its_holder_however_killed(lock: Path, holder: subprocess.Popen[str]) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait(timeout=30)
    assert lock_holder(lock) is None
    with run_lock(lock):
        assert f"pid {os.getpid()} on " in str(lock_holder(lock))
    assert lock_holder(lock) is None


def test_a_running_runs_recipe_cannot_be_changed(
    lock: Path, holder: subprocess.Popen[str], tmp_path: Path, recipe: Recipe
) -> None:
    with pytest.raises(RunLockedError, match=f"pid {holder.pid}"):
        create_run("one", recipe, artifacts=tmp_path)  # the other is about to create it
    holder.kill()
    holder.wait(timeout=30)
    run = create_run("one", recipe, artifacts=tmp_path)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            with pytest.raises(RunLockedError, match=f"pid {process.pid}"):
                create_run("one", changed("stage2.steps=60"), artifacts=tmp_path)
            assert open_run("one", artifacts=tmp_path) == run
        finally:
            process.kill()


def test_the_lock_is_reentrant_and_free_afterwards(lock: Path) -> None:
    with run_lock(lock):
        with run_lock(lock):
            assert lock_holder(lock) is not None
        assert lock_holder(lock) is not None  # the inner one does not let go of the outer
    assert lock_holder(lock) is None


def test_the_lock_is_free_after_an_error(lock: Path) -> None:
    with pytest.raises(ValueError, match="inside"), run_lock(lock):
        raise ValueError("inside")
    assert lock_holder(lock) is None


def test_a_lock_that_is_looked_at_is_still_given(lock: Path) -> None:
    """`kdrl status --watch` takes the lock for moments to see whether it is free: no reason to refuse a run."""
    with run_lock(lock):
        pass
    looker = FileLock(lock, thread_local=False)
    looker.acquire()
    release = threading.Timer(0.03, looker.release)
    release.start()
    with run_lock(lock):
        assert not looker.is_locked
    release.join()


def test_nobody_holds_a_lock_that_was_never_taken(lock: Path) -> None:
    assert lock_holder(lock) is None
    assert not lock.exists()


def test_an_unreadable_holder_file_is_no_obstacle(lock: Path, holder: subprocess.Popen[str]) -> None:
    lock.with_suffix(".holder.json").write_text("[]")
    with pytest.raises(RunLockedError, match="in use by another process"), run_lock(lock):
        pass
