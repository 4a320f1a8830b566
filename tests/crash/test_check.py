"""`kdrl check`: damage anywhere in a run is named, also in steps that a resume does not look at."""

import json
import shutil
from pathlib import Path

import pytest
from crash.damage import flip
from crash.tiny_run import differing, finish, open_tiny, train
from typer.testing import CliRunner, Result

from flows.cli import app
from kdrl_core.errors import RunLockedError
from kdrl_core.ledger import Run, open_run, verify_published
from kdrl_core.steps.check import Finding, Remedy, check_run, repair_run

pytestmark = pytest.mark.usefixtures("fast_sessions")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = open_tiny(tmp_path_factory.mktemp("whole"), "r")
    train(run)
    finish(run)
    return run


@pytest.fixture
def run(whole: Run, artifacts: Path) -> Run:
    """A copy to damage."""
    shutil.copytree(whole.paths.root, artifacts / "runs" / "r")
    return open_run("r")


def check(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["check", "r", *arguments])


def found(run: Run) -> dict[str, Finding]:
    return {finding.path: finding for finding in check_run(run).findings}


def test_a_whole_run_is_as_published(run: Run) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.paths.root.rglob("*")}
    calls: list[tuple[int, int]] = []
    report = check_run(run, on_checked=lambda done, total: calls.append((done, total)))
    assert report.findings == []
    assert report.num_artifacts == calls[-1][0] == calls[-1][1] == len(calls)
    assert report.num_artifacts > 30
    assert report.num_bytes > 1_000_000
    assert {path: path.stat().st_mtime_ns for path in run.paths.root.rglob("*")} == before
    done = check()
    assert done.exit_code == 0
    assert "all as published" in done.output


def test_every_kind_of_damage_is_named_with_its_remedy(run: Run) -> None:
    paths = run.paths
    flip(paths.rollouts("stage1", 0))
    paths.teacher("stage2", 1).unlink()
    (paths.step("stage2", 2) / "_rewards.manifest.json").unlink()
    (paths.step("stage2", 3) / "_update.manifest.json").write_text("{")
    flip(paths.metrics("stage1"))
    flip(paths.checkpoint("stage2", 3) / "model.safetensors")
    flip(paths.checkpoint("stage2", 4) / "model.safetensors")
    flip(paths.pool)
    (paths.evaluation("base") / "responses.parquet").write_bytes(b"")
    findings = found(run)
    remedies = {path: finding.remedy for path, finding in findings.items()}
    step = "rollouts/stage=stage2/step=00000"
    assert remedies == {
        "rollouts/stage=stage1/step=000000/rollouts.parquet": Remedy.BACKUP,
        f"{step}1/teacher.parquet": Remedy.REPAIR,
        f"{step}2/rewards.parquet": Remedy.REPAIR,
        f"{step}3/update.parquet": Remedy.BACKUP,
        "metrics/stage=stage1/metrics.parquet": Remedy.RESUME,
        "checkpoints/stage2/step-000003": Remedy.BACKUP,
        "checkpoints/stage2/step-000004": Remedy.RESUME,
        "data/pool.parquet": Remedy.RESUME,
        "evaluation/base": Remedy.RESUME,
    }
    assert "is damaged" in findings["data/pool.parquet"].problem
    assert "is missing" in findings[f"{step}1/teacher.parquet"].problem
    assert findings[f"{step}2/rewards.parquet"].problem == "has no manifest"
    assert "cannot be read" in findings[f"{step}3/update.parquet"].problem
    done = check()
    assert done.exit_code == 1
    assert "kdrl check --repair" in done.output


def test_what_was_made_from_another_file_is_named(run: Run) -> None:
    for name in ("rewards.parquet", "_rewards.manifest.json"):
        shutil.copy(run.paths.step("stage2", 0) / name, run.paths.step("stage2", 1) / name)
    findings = found(run)
    step = "rollouts/stage=stage2/step=000001"
    assert {path: finding.problem for path, finding in findings.items()} == {
        f"{step}/rewards.parquet": "is of another step: it was made from "
        "rollouts/stage=stage2/step=000000/rollouts.parquet",
        f"{step}/update.parquet": f"made from another {step}/rewards.parquet than is there now",
    }
    assert findings[f"{step}/rewards.parquet"].remedy is Remedy.REPAIR
    assert check("--repair").exit_code == 0


@pytest.mark.parametrize("name", ["student", "evaluation/base", "checkpoints/stage2/step-000003"])
def test_a_folder_without_its_manifest_is_named(run: Run, name: str) -> None:
    (run.paths.root / name / "manifest.json").unlink()
    assert {path: finding.problem for path, finding in found(run).items()} == {name: "has no manifest"}


def test_repair_makes_scores_and_verdicts_of_the_past_again(run: Run, whole: Run) -> None:
    damaged = [run.paths.teacher("stage2", 1), run.paths.rewards("stage2", 2), run.paths.reference("stage1", 0)]
    for path in damaged:
        flip(path)
    done = check("--repair", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["findings"] == []
    assert sorted(answer["repaired"]) == sorted(run.relative(path) for path in damaged)
    assert differing(run, whole) == []
    for path in damaged:
        verify_published(path)


def test_repair_waits_for_whoever_works_on_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(run.paths.teacher("stage2", 1))
    report = check_run(run)

    def refuse(path: Path) -> None:
        raise RunLockedError("in use")

    monkeypatch.setattr("kdrl_core.steps.check.run_lock", refuse)
    with pytest.raises(RunLockedError):
        repair_run(run, report)


def test_an_unknown_run_is_told(artifacts: Path) -> None:
    done = CliRunner().invoke(app, ["check", "nobody"])
    assert done.exit_code == 1
    assert "no run 'nobody'" in done.output
