"""Models, data and code outside of a run: what is recorded of them, and when a run refuses to go on."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdrl_core.config import Recipe, config_hash, dump_recipe, load_recipe, resolve_path
from kdrl_core.config.outside import slots_of
from kdrl_core.errors import RunError
from kdrl_core.ledger import (
    Run,
    create_run,
    identity,
    open_run,
    outside_of,
    require_resumable,
    require_same_recipe,
    settle_outside,
)

CODE = "def hinge(log_ratio):\n    return (-log_ratio).clamp(min=0)\n"
BENCHMARK = '{"id": "1", "problem": "1+1", "answer": "2"}\n'
WEIGHTS = "model.safetensors"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a teacher, a student in two shards, data, a benchmark and an estimator; the current folder."""
    folder = tmp_path / "world"
    shutil.copytree(resolve_path("builtin:miniature/teacher"), folder / "teacher")
    student = folder / "student"
    shutil.copytree(resolve_path("builtin:miniature/student"), student)
    (student / WEIGHTS).unlink()
    for number in (1, 2):
        (student / f"part-{number}.safetensors").write_bytes(b"part %d" % number)
    shards = {"a": "part-1.safetensors", "b": "part-2.safetensors"}
    (student / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "data").mkdir()
    for name in ("one", "two"):
        (folder / "data" / f"{name}.jsonl").write_text(BENCHMARK)
    (folder / "bench.jsonl").write_text(BENCHMARK)
    (folder / "mine.py").write_text(CODE)
    monkeypatch.chdir(folder)
    return folder


def recipe(*overrides: str) -> Recipe:
    return load_recipe(
        "miniature",
        [
            *("student.path=student", "teacher.path=teacher", "stage1.data.files=[data/*.jsonl]"),
            "stage1.data.decontamination={files: [bench.jsonl]}",
            "evaluation.benchmarks=[{name: mine, file: bench.jsonl}]",
            *("evaluation.periodic=[]", "stage2.kl_estimator=mine.py:hinge", *overrides),
        ],
    )


@pytest.fixture
def run(world: Path, tmp_path: Path) -> Run:
    return create_run("one", recipe(), artifacts=tmp_path)


def again(run: Run, **changes: Any) -> Run:
    return create_run(
        "one", recipe(*(f"{field}={value}" for field, value in changes.items())), artifacts=folder_of(run)
    )


def folder_of(run: Run) -> Path:
    return run.paths.root.parent.parent


def test_the_runs_recipe_has_absolute_paths(run: Run, world: Path) -> None:
    told = yaml.safe_load(run.paths.recipe.read_text())
    assert told["student"]["path"] == f"{world}/student"
    assert told["teacher"]["path"] == f"{world}/teacher"
    assert told["stage1"]["data"]["files"] == [f"{world}/data/*.jsonl"]
    assert told["stage1"]["data"]["decontamination"]["files"] == [f"{world}/bench.jsonl"]
    assert told["evaluation"]["benchmarks"][0]["file"] == f"{world}/bench.jsonl"
    assert told["stage2"]["data"]["files"][0].startswith("builtin:")  # does not depend on the folder
    assert (
        open_run("one", artifacts=folder_of(run)).recipe
        == run.recipe
        == create_run("one", recipe(), artifacts=folder_of(run)).recipe
    )


def test_everything_that_the_recipe_names_is_recorded(run: Run) -> None:
    recorded = outside_of(run)
    assert recorded.keys() == slots_of(run.recipe).keys() - {"stage1.kl_estimator", *REFERENCE}
    assert set(recorded["student.path"]["files"]) == {
        *("config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"),
        *("model.safetensors.index.json", "part-1.safetensors", "part-2.safetensors"),
    }
    assert set(recorded["stage1.data.files.0"]["files"]) == {"one.jsonl", "two.jsonl"}
    assert set(recorded["stage2.kl_estimator"]["files"]) == {"mine.py"}


REFERENCE = {"stage1.ref_kl_estimator", "stage2.ref_kl_estimator"}


def test_nothing_is_written_or_read_again_while_nothing_changes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run.paths.manifest.read_bytes()
    monkeypatch.setattr(identity, "_digests", {})
    monkeypatch.setattr(identity, "digest", lambda path: pytest.fail(f"{path} was read again"))
    settle_outside(run)
    assert run.paths.manifest.read_bytes() == before


def flip(path: Path) -> None:
    """Change a byte, and keep size and times of the file."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def point_elsewhere(path: Path) -> None:
    """Make a link of the path, to a copy with another last byte."""
    other = path.with_name(f"other-{path.name}.tmp")
    other.write_bytes(path.read_bytes()[:-1] + b" ")
    path.unlink()
    path.symlink_to(other)


CHANGES: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "weights": ("teacher.path", f"teacher/{WEIGHTS}", flip),
    "a shard": ("student.path", "student/part-2.safetensors", flip),
    "the index of shards": (
        *("student.path", f"student/{WEIGHTS}.index.json"),
        lambda path: path.write_text(
            json.dumps({"weight_map": {"a": "part-2.safetensors", "b": "part-1.safetensors"}})
        ),
    ),
    "config": ("teacher.path", "teacher/config.json", flip),
    "tokenizer": ("student.path", "student/tokenizer.json", flip),
    "chat template": ("student.path", "student/chat_template.jinja", flip),
    "a link": ("teacher.path", "teacher/config.json", point_elsewhere),
    "data behind a glob": ("stage1.data.files.0", "data/two.jsonl", flip),
    "a benchmark": ("evaluation.benchmarks.0.file", "bench.jsonl", flip),
    "code": ("stage2.kl_estimator", "mine.py", flip),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_file_is_refused_with_its_path_and_both_hashes(what: str, run: Run, world: Path) -> None:
    slot, name, change = CHANGES[what]
    was = outside_of(run)[slot]["files"][Path(name).name]["sha256"]
    change(world / name)
    now = identity.digest(world / name)[1]
    assert now != was
    before = run.paths.manifest.read_bytes()
    attempts: list[Callable[[], object]] = [
        lambda: settle_outside(run),
        lambda: again(run),
        lambda: require_same_recipe("one", recipe(), artifacts=folder_of(run)),
    ]
    for attempt in attempts:
        with pytest.raises(RunError) as caught:
            attempt()
        message = str(caught.value)
        assert f"{Path(name).name} has sha256 {now[:12]}…, recorded was {was[:12]}…" in message
        assert f"{slot}={world}/" in message
        assert "Restore the files that it began with, or start a new run with these" in message
    assert run.paths.manifest.read_bytes() == before
    assert open_run("one", artifacts=folder_of(run)) == run  # who only looks is not refused


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (f"student/{WEIGHTS}", r"model\.safetensors has .*, it was not there, and 3 more"),  # preferred to shards
        ("teacher/added_tokens.json", r"added_tokens\.json has sha256 \w{12}…, it was not there\. Restore"),
        ("teacher/adapter_config.json", "adapter_config.json .* was not there"),
        ("teacher/additional_chat_templates/tool.jinja", "tool.jinja .* was not there"),
        ("data/zero.jsonl", "zero.jsonl .* was not there"),
    ],
)
def test_an_added_file_that_changes_what_is_loaded_is_refused(name: str, told: str, run: Run, world: Path) -> None:
    (world / name).parent.mkdir(exist_ok=True)
    (world / name).write_text("{}")
    with pytest.raises(RunError, match=told):
        settle_outside(run)


@pytest.mark.parametrize(
    "name", ["README.md", ".gitattributes", "pytorch_model.bin", "own.py", "results.json", "model.fp16.safetensors"]
)
def test_an_added_file_that_nobody_loads_is_no_change(name: str, run: Run, world: Path) -> None:
    (world / "teacher" / name).write_text("x")
    settle_outside(run)


def test_an_index_beside_whole_weights_is_no_change(run: Run, world: Path) -> None:
    (world / "teacher" / f"{WEIGHTS}.index.json").write_text('{"weight_map": {}}')
    settle_outside(run)


def test_code_beside_a_trusted_model_counts(world: Path, tmp_path: Path) -> None:
    (world / "teacher" / "own.py").write_text("x = 1\n")
    run = create_run("one", recipe("teacher.trust_remote_code=true"), artifacts=tmp_path)
    (world / "teacher" / "own.py").write_text("x = 2\n")
    with pytest.raises(RunError, match=r"own\.py has sha256"):
        settle_outside(run)


def test_a_gguf_model_is_its_file(world: Path, tmp_path: Path) -> None:
    (world / "teacher" / "a.gguf").write_bytes(b"one")
    run = create_run("one", recipe("teacher.gguf_file=a.gguf"), artifacts=tmp_path)
    assert set(outside_of(run)["teacher.path"]["files"]) == {"a.gguf"}
    flip(world / "teacher" / WEIGHTS)
    settle_outside(run)
    (world / "teacher" / "a.gguf").write_bytes(b"two")
    with pytest.raises(RunError, match=r"a\.gguf has sha256"):
        settle_outside(run)


def test_a_touched_or_copied_model_is_the_same_and_is_read_once(
    run: Run, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (world / "teacher").rename(world / "old")
    shutil.copytree(world / "old", world / "teacher", copy_function=shutil.copy)
    os.utime(world / "mine.py", (1, 1))
    settle_outside(run)
    monkeypatch.setattr(identity, "_digests", {})
    monkeypatch.setattr(identity, "digest", lambda path: pytest.fail(f"{path} was read again"))
    settle_outside(run)


def test_the_same_run_from_another_folder_has_the_same_teacher(
    run: Run, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `kdrl resume` does: it reads the run's recipe, where the folder of the first command is written."""
    shutil.copytree(world / "student", tmp_path / "elsewhere" / "teacher")
    monkeypatch.chdir(tmp_path / "elsewhere")
    resumed = create_run("one", load_recipe(run.paths.recipe), artifacts=folder_of(run))
    assert resumed == run
    shutil.copy(world / "mine.py", tmp_path / "elsewhere")
    with pytest.raises(RunError, match=r"teacher\.path: '.*/world/teacher' → '.*/elsewhere/teacher'"):
        create_run("one", recipe(), artifacts=folder_of(run))


def test_a_moved_model_is_accepted_if_it_is_the_same(run: Run, world: Path) -> None:
    (world / "teacher").rename(world / "moved")
    (world / "mine.py").rename(world / "yours.py")
    overrides = ["teacher.path=moved", "stage2.kl_estimator=yours.py:hinge"]
    with pytest.raises(RunError, match=r"stage2\.kl_estimator"):  # a file's name is a part of its identity
        require_resumable(run, recipe(*overrides))
    (world / "elsewhere").mkdir()
    (world / "yours.py").rename(world / "elsewhere" / "mine.py")
    overrides[1] = "stage2.kl_estimator=elsewhere/mine.py:hinge"
    moved = create_run("one", recipe(*overrides), artifacts=folder_of(run))
    assert moved.recipe.teacher is not None
    assert moved.recipe.teacher.path == f"{world}/moved"
    assert open_run("one", artifacts=folder_of(run)) == moved
    assert outside_of(moved)["teacher.path"]["path"] == f"{world}/moved"
    settle_outside(moved)
    (change,) = json.loads(run.paths.manifest.read_text())["history"]
    assert any("teacher.path" in one for one in change["changes"])


def test_a_model_that_moved_into_the_finished_student_of_a_run_is_the_same(
    run: Run, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path with a colon is not a function."""
    monkeypatch.setenv("KDRL_ARTIFACTS", str(tmp_path))
    shutil.move(world / "teacher", tmp_path / "runs" / "earlier" / "student")
    require_resumable(run, recipe("teacher.path=run:earlier"))


def test_another_function_of_the_same_file_is_another_estimator(run: Run, world: Path) -> None:
    (world / "elsewhere").mkdir()
    shutil.copy(world / "mine.py", world / "elsewhere" / "mine.py")
    with pytest.raises(RunError, match=r"stage2\.kl_estimator"):
        require_resumable(run, recipe("stage2.kl_estimator=elsewhere/mine.py:other"))


def test_another_model_on_purpose_is_refused(run: Run, world: Path) -> None:
    with pytest.raises(RunError, match=r"was started with another recipe: teacher\.path: "):
        require_resumable(run, recipe("teacher.path=student"))


def as_of_an_earlier_version(run: Run) -> None:
    """The run's files as they were before contents were recorded and paths were absolute."""
    manifest = json.loads(run.paths.manifest.read_text())
    del manifest["outside"]
    run.paths.recipe.write_text(dump_recipe(recipe()))
    run.paths.manifest.write_text(json.dumps({**manifest, "config_hash": config_hash(recipe())}))


def test_a_run_of_an_earlier_version_is_opened_and_recorded(
    run: Run, world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    as_of_an_earlier_version(run)
    old = open_run("one", artifacts=folder_of(run))
    assert outside_of(old) == {}
    with caplog.at_level(logging.INFO):
        opened = again(run)
    assert "the content of evaluation.benchmarks.0.file, " in caplog.text
    assert opened == run  # with absolute paths from now on
    assert outside_of(run).keys() == outside_of(opened).keys() != set()
    flip(world / "teacher" / WEIGHTS)
    with pytest.raises(RunError, match=r"model\.safetensors has sha256"):
        again(run)


def test_a_lost_recipe_or_manifest_of_any_version_is_written_anew(run: Run) -> None:
    run.paths.recipe.unlink()
    assert again(run) == run
    run.paths.manifest.unlink()
    assert again(run) == run
    assert outside_of(run)
    as_of_an_earlier_version(run)
    run.paths.recipe.unlink()
    assert again(run) == run


@pytest.mark.parametrize("value", [[], 5, "x", {"teacher.path": 1}, {"teacher.path": {"files": {"a": {}}}}])
def test_a_manifest_with_other_records_is_told(value: object, run: Run) -> None:
    manifest = json.loads(run.paths.manifest.read_text())
    run.paths.manifest.write_text(json.dumps({**manifest, "outside": value}))
    with pytest.raises(RunError, match=r"manifest\.json, 'outside': not what kdrl wrote; restore it"):
        settle_outside(run)


def test_what_is_not_there_is_for_its_reader_to_tell(run: Run, world: Path) -> None:
    shutil.rmtree(world / "teacher")
    settle_outside(run)
    assert "teacher.path" in outside_of(run)
