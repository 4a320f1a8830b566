"""`hf://` paths: huggingface_hub itself against a hub on the loopback interface, and against its cache alone."""

import hashlib
import json
import re
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import constants, hf_hub_download

from kdrl_core.config import DataConfig, Recipe, load_recipe, resolve_path
from kdrl_core.config.fetch import fetched, fetched_files
from kdrl_core.config.hub import HubPath
from kdrl_core.data import read_problems
from kdrl_core.data.benchmarks import load_benchmark
from kdrl_core.errors import DataError, ModelError, RecipeError, RunError
from kdrl_core.ledger import create_run, outside_of
from kdrl_core.models.loading import check_model_dir

OLD, NEW = "1" * 40, "2" * 40
PROBLEMS = "".join(json.dumps({"problem": f"What is {n}+1?", "answer": str(n + 1)}) + "\n" for n in range(3)).encode()


class Hub(ThreadingHTTPServer):
    """The part of a hub's API that downloads need. Each repository has one branch, `main`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        student = resolve_path("builtin:miniature/student")
        model = {path.name: path.read_bytes() for path in student.iterdir() if path.is_file()}
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {
            "models/lab/student": {OLD: {**model, "onnx/model.safetensors": b"x", "pytorch_model.bin": b"x"}},
            "datasets/lab/sums": {OLD: {"data/train.jsonl": PROBLEMS, "README.md": b"sums"}},
        }
        self.main = OLD
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        path = self.path.split("?")[0].strip("/")
        if found := re.fullmatch(r"api/(\w+/\w+/\w+)/(revision|tree)/(\w+)", path):
            self._api(*found.groups())
        elif found := re.fullmatch(r"(datasets/)?(\w+/\w+)/resolve/(\w+)/(.+)", path):
            kind, name, commit, file = found.groups()
            content = self.server.repositories[f"{kind or 'models/'}{name}"][commit][file]
            etag = hashlib.sha1(content, usedforsecurity=False).hexdigest()
            self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})
        else:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET  # noqa: N815 (the name that http.server calls)

    def _api(self, name: str, what: str, revision: str) -> None:
        if name not in self.server.repositories:
            return self._answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        commit = self.server.main if revision == "main" else revision
        if (files := self.server.repositories[name].get(commit)) is None:
            return self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        entries: Any = [
            {
                "type": "file",
                "path": path,
                "size": len(content),
                "oid": hashlib.sha1(content, usedforsecurity=False).hexdigest(),
            }
            for path, content in files.items()
        ]
        info = {"id": name.split("/", 1)[1], "sha": commit, "siblings": [{"rfilename": path} for path in files]}
        return self._answer(200, json.dumps(entries if what == "tree" else info).encode(), {})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content)), "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        yield server
        server.shutdown()


def recipe(*overrides: str) -> Recipe:
    sums = "hf://datasets/lab/sums@main/data/*.jsonl"
    return load_recipe(
        "miniature",
        [
            *("student.path=hf://lab/student", f"stage1.data.files=['{sums}']", "stage1.data.format=auto"),
            "evaluation.benchmarks=[{name: mine, file: 'hf://lab/sums/data/train.jsonl'}]",
            *("evaluation.periodic=[]", *overrides),
        ],
    )


def test_a_recipe_is_downloaded_once_and_frozen_at_its_commit(hub: Hub, tmp_path: Path) -> None:
    found = fetched(recipe())
    assert found.student.path == f"hf://lab/student@{OLD}"
    assert found.stage("stage1").data.files == [f"hf://datasets/lab/sums@{OLD}/data/*.jsonl"]
    assert found.evaluation.benchmarks[0].file == f"hf://datasets/lab/sums@{OLD}/data/train.jsonl"
    assert not any("onnx" in asked or "pytorch_model" in asked or "README" in asked for asked in hub.asked)

    assert check_model_dir(found.student, role="student")["model_type"] == "qwen2"
    assert read_problems(found.stage("stage1").data)["answer"].to_pylist() == ["1", "2", "3"]
    assert len(load_benchmark(found.evaluation.benchmarks[0])) == 3

    run = create_run("one", recipe(), artifacts=tmp_path)
    assert run.recipe.student.path == found.student.path
    assert OLD in run.paths.recipe.read_text()
    recorded = outside_of(run)["stage1.data.files.0"]
    assert recorded["files"]["train.jsonl"]["sha256"] == hashlib.sha256(PROBLEMS).hexdigest()
    assert "model.safetensors" in outside_of(run)["student.path"]["files"]

    asked = len(hub.asked)
    assert fetched(run.recipe) == run.recipe
    assert len(hub.asked) == asked, "a commit whose files are here needs no network"


def test_a_branch_that_moves_on_is_another_recipe(hub: Hub, tmp_path: Path) -> None:
    run = create_run("one", fetched(recipe()), artifacts=tmp_path)
    hub.repositories["datasets/lab/sums"][NEW] = {"data/train.jsonl": PROBLEMS.replace(b'"1"', b'"0"')}
    hub.repositories["models/lab/student"][NEW] = hub.repositories["models/lab/student"][OLD]
    hub.main = NEW
    with pytest.raises(RunError, match=rf"started with another recipe: stage1\.data\.files: .*{OLD}.*{NEW}"):
        create_run("one", fetched(recipe()), artifacts=tmp_path)
    assert read_problems(run.recipe.stage("stage1").data)["answer"].to_pylist() == ["1", "2", "3"]


def test_a_cache_of_other_tools_is_completed_or_told(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers leaves a commit without its weights, and without the list of its files."""
    hf_hub_download("lab/student", "config.json", revision=OLD)
    path = f"hf://lab/student@{OLD}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    told = fetched(recipe(f"student.path={path}"), "student.path").student.path
    assert told == path
    assert f"{path}: taken as it is in the cache" in caplog.text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fetched(recipe(f"student.path={path}"), "student.path")
    assert (resolve_path(path) / "model.safetensors").is_file()


def test_without_a_network_the_cache_serves(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    online = fetched(recipe())
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetched(recipe()) == online
    assert not hub.asked
    # What was never downloaded, or only in part, is told in one line.
    with pytest.raises(DataError) as told:
        fetched_files(["hf://lab/other@v1"])
    assert str(told.value) == (
        "hf://datasets/lab/other@v1: the hub cannot be reached, and not all of it is on this machine; download it "
        "where there is a network, hf download lab/other --repo-type dataset --revision v1, and copy its folder in "
        "HF_HOME/hub here"
    )
    (resolve_path(online.student.path) / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"hf://lab/student@1{40}: the hub cannot be reached, and not all of it is"):
        fetched(online)


def test_a_hub_that_does_not_answer_is_told_in_a_second(hub: Hub) -> None:
    hub.shutdown()
    hub.server_close()
    started = time.monotonic()
    with pytest.raises(ModelError, match=r"hf://lab/student@main: the hub cannot be reached") as told:
        fetched(recipe())
    assert "\n" not in str(told.value)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "hf://lab/none",
            "hf://lab/none@main: the hub has no such repository, or it is not open to you; check the name",
        ),
        (
            "hf://lab/student@v9",
            "hf://lab/student@v9: the repository has no such revision; give a branch, tag or commit",
        ),
    ],
)
def test_what_a_hub_does_not_have_is_told(hub: Hub, text: str, message: str) -> None:
    with pytest.raises(ModelError) as told:
        fetched(recipe(f"student.path={text}"), "student.path")
    assert str(told.value).startswith(message)


@pytest.mark.parametrize(
    "text",
    ["hf://student", "hf:lab/student", "hf://lab/student/../../x", "hf://lab/student@a b", "hf://lab/student/part"],
)
def test_a_path_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="give hf://OWNER/NAME@REVISION for a model"):
        HubPath.of(text)


def test_nothing_is_asked_where_no_hub_is_named(hub: Hub, tmp_path: Path) -> None:
    plain = load_recipe("miniature")
    assert fetched(plain) is plain
    (tmp_path / "p.jsonl").write_bytes(PROBLEMS)
    read_problems(DataConfig(files=fetched_files([str(tmp_path / "p.jsonl")])))
    create_run("two", plain, artifacts=tmp_path)
    assert not hub.asked
