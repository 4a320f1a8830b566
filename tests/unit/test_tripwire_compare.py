"""What the tripwire finds: changed bytes, lost and new artifacts, other inputs; and what it leaves out."""

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tripwire

CHECKPOINT = "checkpoints/stage2/step-000001"
REWARDS = "rollouts/stage=stage2/step=000000/rewards.parquet"
ROLLOUTS = "rollouts/stage=stage2/step=000000/rollouts.parquet"
EVALUATION = "evaluation/stage2"


def write(path: Path, content: bytes | dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content, indent=1).encode())


def publish(run: Path, artifact: str, inputs: dict[str, str], seconds: float, **metadata: Any) -> None:
    path = run / artifact
    where = path / "manifest.json" if path.is_dir() else path.with_name(f"_{path.stem}.manifest.json")
    sha256 = hashlib.sha256(b"" if path.is_dir() else path.read_bytes()).hexdigest()
    manifest = {"artifact": artifact, "inputs": inputs, "sha256": sha256, "size": 1, "files": None}
    metadata["seconds"] = seconds
    stamp = {"created_at": f"12:00:{seconds}", "manifest_sha256": f"{seconds}"}
    write(where, {**manifest, "metadata": metadata, **stamp})


def make_run(artifacts: Path, seconds: float) -> Path:
    """A few files of a run, made as quickly as is said."""
    run = artifacts / "runs" / "whole"
    write(run / ROLLOUTS, b"rollouts")
    publish(run, ROLLOUTS, {"data/pool.parquet": "p"}, seconds)
    write(run / REWARDS, b"rewards")
    publish(run, REWARDS, {ROLLOUTS: "r"}, seconds, num_right=3)
    write(run / CHECKPOINT / "model.safetensors", b"weights")
    publish(run, CHECKPOINT, {}, seconds)
    write(run / EVALUATION / "results.json", {"date": seconds, "seconds": seconds, "accuracy": 0.5})
    publish(run, EVALUATION, {CHECKPOINT: "c"}, seconds)
    write(run / "report" / "summary.json", {"paths": {"run": str(run)}, "seconds": {"stage2": seconds}})
    write(run / "report" / "report.md", f"| stage2 kdrl | 2/2 | {int(seconds)} |\n- run: `{run}`\n".encode())
    results = hashlib.sha256((run / EVALUATION / "results.json").read_bytes()).hexdigest()
    publish(run, "report", {EVALUATION: results}, seconds)
    write(run / "run.lock", b"")
    write(run / "run.holder.json", {"pid": seconds})
    write(run / ".scratch" / "progress.json", {"now": seconds})
    return run


def describe(artifacts: Path) -> dict[str, Any]:
    return {"commands": ["run"], **tripwire.describe(artifacts, {str(artifacts): "ARTIFACTS"})}


@pytest.fixture
def before(tmp_path: Path) -> dict[str, Any]:
    make_run(tmp_path / "before", 1.5)
    return describe(tmp_path / "before")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "after", 27.25)


def found(before: dict[str, Any], run: Path, *meant: str) -> list[str]:
    return tripwire.differences(before, describe(run.parent.parent), meant)


def test_times_and_places_are_no_differences(
    before: dict[str, Any], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert found(before, run) == []
    assert tripwire.told(before, describe(run.parent.parent)) == 0
    assert capsys.readouterr().out == "no differences: 11 files and 5 manifests of 1 commands are equal\n"


def test_a_changed_byte_is_found(before: dict[str, Any], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / CHECKPOINT / "model.safetensors").write_bytes(b"Weights")
    [line] = found(before, run)
    assert line.startswith(f"bytes differ: runs/whole/{CHECKPOINT}/model.safetensors (")
    assert tripwire.told(before, describe(run.parent.parent)) == 1
    assert capsys.readouterr().out.endswith("1 differences: 11 files and 5 manifests of 1 commands\n")


def test_a_missing_and_a_new_artifact_are_found(before: dict[str, Any], run: Path) -> None:
    (run / REWARDS).unlink()
    write(run / "rollouts" / "more.parquet", b"more")
    assert found(before, run) == ["new: runs/whole/rollouts/more.parquet", f"missing: runs/whole/{REWARDS}"]


@pytest.mark.parametrize("inputs", [{}, {ROLLOUTS: "other"}, {ROLLOUTS: "r", "data/pool.parquet": "p"}])
def test_changed_inputs_are_found(before: dict[str, Any], run: Path, inputs: dict[str, str]) -> None:
    publish(run, REWARDS, inputs, 2.0, num_right=3)
    assert any(line.startswith("inputs differ: runs/whole/rollouts/") for line in found(before, run))


def test_changed_metadata_is_found(before: dict[str, Any], run: Path) -> None:
    publish(run, REWARDS, {ROLLOUTS: "r"}, 2.0, num_right=4)
    assert any(line.endswith("_rewards.manifest.json: num_right 3 → 4") for line in found(before, run))


def test_a_report_of_another_evaluation_is_found(before: dict[str, Any], run: Path) -> None:
    """Its hash says nothing, since an evaluation has times in it; its content does."""
    write(run / EVALUATION / "results.json", {"date": 3.0, "seconds": 3.0, "accuracy": 0.25})
    lines = found(before, run)
    assert any(line.startswith("bytes differ: runs/whole/evaluation/stage2/results.json") for line in lines)
    assert any(line.startswith("inputs differ: runs/whole/report/manifest.json") for line in lines)


@pytest.mark.parametrize(
    "summary",
    [
        {"paths": {"run": "elsewhere"}, "seconds": {"stage2": 1.0}},
        {"paths": {"run": "ARTIFACTS/runs/whole"}, "seconds": {}},
        {"paths": {"run": "ARTIFACTS/runs/whole"}},
        {"seconds": {"stage2": 1.0}, "paths": {"run": "ARTIFACTS/runs/whole"}},
    ],
)
def test_fields_that_are_lost_or_moved_are_found(before: dict[str, Any], run: Path, summary: dict[str, Any]) -> None:
    write(run / "report" / "summary.json", summary)
    assert [line.split(" (")[0] for line in found(before, run)] == ["bytes differ: runs/whole/report/summary.json"]


def test_causes_come_first(before: dict[str, Any], run: Path) -> None:
    for path in (run / CHECKPOINT / "model.safetensors", run / REWARDS, run / ROLLOUTS):
        path.write_bytes(b"other")
    names = [line.split(" (")[0].split("/")[-1] for line in found(before, run)]
    assert names == ["rollouts.parquet", "rewards.parquet", "model.safetensors"]


def test_what_is_meant_may_differ(before: dict[str, Any], run: Path) -> None:
    (run / REWARDS).write_bytes(b"other")
    assert found(before, run, "*/rewards.parquet") == []


def test_records_of_other_commands_are_not_compared(before: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert tripwire.told(before, {**before, "commands": []}) == 2
    assert "same tripwire.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "one", "counts"),
    [
        (["run --name other"], [], "12 files and 5 manifests of 1 commands"),
        (["run --name other"], ["filter"], "12 files and 5 manifests of 2 commands"),
        (["run --name other", "filter"], [], "11 files and 5 manifests of 1 commands"),
    ],
)
def test_a_record_of_some_runs_is_compared_with_a_whole_one(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str], more: list[str], one: list[str], counts: str
) -> None:
    make_run(tmp_path / "before", 1.0)
    for artifacts in ("before", "after"):
        write(tmp_path / artifacts / "filtered.parquet", b"filtered")
    write(tmp_path / "before" / "runs" / "other" / "recipe.yaml", b"recipe")
    whole = {**describe(tmp_path / "before"), "commands": ["run --name whole", *more, *one]}
    part = {**describe(tmp_path / "after"), "commands": ["run --name whole", *one]}
    assert tripwire.told(whole, part) == tripwire.told(part, whole) == 0
    assert capsys.readouterr().out == f"no differences: {counts} are equal\n" * 2
    write(run / REWARDS, b"other")
    assert tripwire.told(whole, {**describe(tmp_path / "after"), "commands": part["commands"]}) == 1
    assert f"bytes differ: runs/whole/{REWARDS}" in capsys.readouterr().out


def test_a_run_that_there_is_not_cannot_be_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kdrl_core").mkdir()
    assert tripwire.main(["record", str(tmp_path), "--output", str(tmp_path / "a.json"), "--only", "none"]) == 2
    assert capsys.readouterr().err.startswith("there is no run none; there are whole, ")


def test_a_folder_without_kdrl_cannot_be_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tripwire.main(["record", str(tmp_path), "--output", str(tmp_path / "a.json")]) == 2
    assert "is not a checkout of kdrl" in capsys.readouterr().err


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def commit(root: Path, file: str, content: str) -> str:
    write(root / file, content.encode())
    git(root, "add", ".")
    git(root, "commit", "-qm", file)
    return git(root, "rev-parse", "HEAD")


def test_the_base_is_the_last_other_product_code(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "-b", "main")
    first = commit(tmp_path, "kdrl_core/a.py", "a")
    with pytest.raises(tripwire.NoBaseError, match="the last 1 commits have the product code"):
        tripwire.base_commit(tmp_path)
    second = commit(tmp_path, "kdrl_core/a.py", "b")
    assert tripwire.base_commit(tmp_path) == first
    commit(tmp_path, "README.md", "read me")
    assert tripwire.base_commit(tmp_path) == first
    write(tmp_path / "kdrl_core" / "a.py", b"not committed")
    assert git(tmp_path, "diff", "--name-only", tripwire.base_commit(tmp_path), second, "--", "kdrl_core") == ""


def test_on_a_branch_the_base_is_where_it_left_main(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", "-b", "main")
    commit(tmp_path, "kdrl_core/a.py", "a")
    left = commit(tmp_path, "kdrl_core/a.py", "b")
    git(tmp_path, "switch", "-qc", "branch")
    commit(tmp_path, "kdrl_core/a.py", "c")
    commit(tmp_path, "kdrl_core/a.py", "d")
    assert tripwire.base_commit(tmp_path) == left


def test_without_history_there_is_no_base(tmp_path: Path) -> None:
    with pytest.raises(tripwire.NoBaseError, match="git"):
        tripwire.base_commit(tmp_path)


def test_a_commit_is_unpacked_without_a_trace_in_the_repository(tmp_path: Path) -> None:
    (root := tmp_path / "root").mkdir()
    git(root, "init", "-q", "-b", "main")
    for package in ("kdrl_core", "tasks", "flows"):
        first = commit(root, f"{package}/a.py", "a")
    commit(root, "kdrl_core/a.py", "b")
    before = sorted(root.rglob("*"))
    folder = tripwire.unpack(root, first, tmp_path / "base")
    assert (folder / "kdrl_core" / "a.py").read_text() == "a"
    assert sorted(root.rglob("*")) == before
    with pytest.raises(tripwire.NoBaseError, match="not a valid object name"):
        tripwire.unpack(root, "0123abc", tmp_path / "none")
