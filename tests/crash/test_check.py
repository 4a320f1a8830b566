"""`kdrl check`: damage anywhere in a run is named, also in steps that a resume does not look at."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from crash.damage import flip, manifest_for
from crash.tiny_run import differing, finish, open_tiny, train
from typer.testing import CliRunner, Result

from flows.cli import app
from kdrl_core.boxes.check import Finding, Remedy, check_run, repair_run
from kdrl_core.boxes.completion import is_finished
from kdrl_core.errors import RunLockedError
from kdrl_core.ledger import Run, heal, manifest_of, open_run, publish_file, run_lock, verify_published

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


def test_a_file_in_another_place_is_named(run: Run) -> None:
    for name in ("rewards.parquet", "_rewards.manifest.json"):
        shutil.copy(run.paths.step("stage2", 0) / name, run.paths.step("stage2", 1) / name)
    flip(run.paths.teacher("stage2", 2))
    place = "rollouts/stage=stage2/step=000001/rewards.parquet"
    finding = found(run)[place]
    assert finding.remedy is Remedy.OWNER
    assert finding.problem == (
        "belongs elsewhere: it was published as rollouts/stage=stage2/step=000000/rewards.parquet"
    )
    assert check("--repair").exit_code == 1  # the other damage is mended all the same
    assert list(found(run)) == [place]


def test_what_later_artifacts_were_not_made_from_is_named(run: Run, tmp_path: Path) -> None:
    path = run.paths.rewards("stage2", 1)
    publish_file(path, lambda file: file.write_bytes(b"other") and None, inputs=manifest_of(path).inputs)
    problems = {name: finding.problem for name, finding in found(run).items()}
    step = "rollouts/stage=stage2/step=000001"
    assert f"not the one that {step}/update.parquet was made from" in problems[f"{step}/rewards.parquet"]
    assert problems[f"{step}/update.parquet"] == f"was made from other files than are there now: {step}/rewards.parquet"


@pytest.mark.parametrize(
    "name",
    ["checkpoints/stage1/step-000002", "checkpoints/stage2/step-000004", "evaluation/stage2", "data/pool.parquet"],
)
def test_results_that_are_missing_altogether_are_named_and_made_again(run: Run, whole: Run, name: str) -> None:
    path = run.paths.root / name
    for each in (path, manifest_for(path)):
        heal.delete(each)
    assert {finding: (of.problem, of.remedy) for finding, of in found(run).items()} == {
        name: ("is missing", Remedy.RESUME)
    }
    assert not is_finished(run, verify=True)
    train(run)
    finish(run)
    assert found(run) == {}
    assert differing(run, whole) == []


@pytest.mark.parametrize("name", ["extra.parquet", "_extra.manifest.json"])
def test_what_is_not_of_a_step_is_named(run: Run, name: str) -> None:
    """Whoever reads the rollouts as one dataset would read it as well."""
    path = run.paths.step("stage2", 0) / name
    path.write_text("{}")
    (finding,) = found(run).values()
    assert finding.path == "rollouts/stage=stage2/step=000000/extra.parquet"
    assert finding.remedy is Remedy.OWNER


def test_what_was_set_aside_and_not_made_again_is_named(run: Run) -> None:
    heal.set_aside(run.paths.checkpoint("stage2", 3))
    assert {name: finding.problem for name, finding in found(run).items()} == {
        "checkpoints/stage2/step-000003": "was damaged, set aside, and not made again since"
    }
    train(run)  # it has done its time
    assert found(run) == {}
    assert not list(run.paths.root.rglob(".damaged-*"))


def test_what_is_on_its_way_while_somebody_works_on_the_run_is_no_damage(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = manifest_for(run.paths.rewards("stage2", 1))
    content = manifest.read_bytes()
    manifest.unlink()
    flip(run.paths.teacher("stage2", 2))
    clock = SimpleNamespace(sleep=lambda _: manifest.write_bytes(content))
    monkeypatch.setattr("kdrl_core.boxes.check.time", clock)  # not time.sleep, which other threads call too
    with run_lock(run.paths.lock):
        assert list(found(run)) == ["rollouts/stage=stage2/step=000002/teacher.parquet"]
    manifest.unlink()
    assert len(found(run)) == 2  # nobody works on it: nothing is on its way


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
    assert sorted(answer["repaired"]) == sorted(run.paths.relative(path) for path in damaged)
    assert differing(run, whole) == []
    for path in damaged:
        verify_published(path)


def test_repair_waits_for_whoever_works_on_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(run.paths.teacher("stage2", 1))
    report = check_run(run)

    def refuse(path: Path) -> None:
        raise RunLockedError("in use")

    monkeypatch.setattr("kdrl_core.boxes.check.run_lock", refuse)
    with pytest.raises(RunLockedError):
        repair_run(run, report)


def test_an_unknown_run_is_told(artifacts: Path) -> None:
    done = CliRunner().invoke(app, ["check", "nobody"])
    assert done.exit_code == 1
    assert "no run 'nobody'" in done.output
