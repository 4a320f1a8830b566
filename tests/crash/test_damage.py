"""Damaged files: each is named, what can be made again is made again byte for byte, what cannot is refused."""

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from crash.damage import (
    DAMAGES,
    Damage,
    empty,
    flip,
    garble_manifest,
    lose_manifest,
    manifest_for,
    truncate,
    unlink,
)
from crash.tiny_run import differing, finish, open_tiny, results, train
from typer.testing import CliRunner

from flows.cli import app
from kdrl_core.boxes.check import Remedy, check_run, replace_artifact
from kdrl_core.boxes.completion import is_finished
from kdrl_core.boxes.session import close_sessions
from kdrl_core.boxes.stage import SEVERAL_TABLES, checkpoint_steps
from kdrl_core.config import Recipe
from kdrl_core.errors import DamagedArtifactError, ForeignFileError, RunError
from kdrl_core.ledger import Run, is_published, manifest_of, open_run, published_below, verify_published
from kdrl_core.look.rollouts.query import RolloutStore
from kdrl_core.objectives import group_advantages
from kdrl_core.tables.files import load_metrics

pytestmark = pytest.mark.usefixtures("fast_sessions")

SPARSE = ["stage2.steps=7", "stage2.checkpoint.every=3"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """An undisturbed run."""
    run = open_tiny(tmp_path_factory.mktemp("whole"), "r", SPARSE)
    train(run)
    finish(run)
    yield run
    close_sessions()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that stopped at step 5 of stage 2: its latest checkpoint is step 3."""
    run = open_tiny(tmp_path_factory.mktemp("stopped"), "r", SPARSE)
    train(run, until=("stage2", 5))
    return run


def copy_of(run: Run, artifacts: Path) -> Run:
    close_sessions()
    shutil.copytree(run.paths.root, artifacts / "runs" / run.name)
    return open_run(run.name, artifacts=artifacts)


def artifacts_of(run: Run) -> dict[str, Path]:
    """A file of every kind of artifact that a stopped run goes on from, by the name that the log gives."""
    paths = run.paths
    return {
        "pool.parquet": paths.pool,
        "filter.json": paths.filter_report,
        "stage1/step-000002": paths.checkpoint("stage1", 2) / "model.safetensors",
        "reference.parquet": paths.reference("stage1", 1),
        "stage2/step-000003": paths.checkpoint("stage2", 3) / "trainer" / "optimizer.safetensors",
        "step=000000/rollouts.parquet": paths.rollouts("stage2", 0),
        "step=000001/rewards.parquet": paths.rewards("stage2", 1),
        "step=000002/teacher.parquet": paths.teacher("stage2", 2),
        "step=000003/update.parquet": paths.update("stage2", 3),
        "step=000004/rollouts.parquet": paths.rollouts("stage2", 4),
    }


@pytest.mark.parametrize("damage", DAMAGES)
def test_everything_damaged_at_once_is_named_and_made_again(
    damage: Damage, stopped: Run, whole: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = copy_of(stopped, tmp_path)
    manifests = {path: path.read_bytes() for path in run.paths.root.rglob("*manifest.json")}
    damaged = artifacts_of(run)
    wheres = {name: str(manifest_for(path)) for name, path in damaged.items()}
    for path in damaged.values():
        damage(path)
    for path in (run.paths.metrics("stage2"), run.paths.timings("stage2")):  # derived: they have no manifest
        (damage if damage in (flip, truncate, empty, unlink) else truncate)(path)

    train(run)

    assert [name for name in differing(run, whole) if not name.startswith(("evaluation/", "student/"))] == []
    unnamed = [name for name, where in wheres.items() if name not in caplog.text and where not in caplog.text]
    assert unnamed == []
    assert list(run.paths.root.rglob(".damaged-*")) == []
    if damage in (flip, truncate, empty, unlink):  # what is made again has the manifest that it had
        kept = [path for path in manifests if path.is_file() and path != run.paths.manifest]
        assert [path for path in kept if path.read_bytes() != manifests[path]] == []
    assert [row["step"] for row in load_metrics(run, "stage2")] == list(range(7))


@pytest.mark.parametrize("damage", [flip, unlink, garble_manifest])
def test_damaged_results_are_made_again(damage: Damage, whole: Run, tmp_path: Path) -> None:
    run = copy_of(whole, tmp_path)
    paths = run.paths
    assert is_finished(run, verify=True)
    damaged = [
        paths.student / "model.safetensors",
        paths.evaluation("base") / "responses.parquet",
        paths.evaluation("stage1") / "results.json",
        paths.report / "report.html",
    ]
    for path in damaged:
        damage(path)
        assert not is_finished(run, verify=True)
        finish(run)
        assert is_finished(run, verify=True)
    for path in (paths.student, paths.report, paths.evaluation("base"), paths.evaluation("stage1")):
        verify_published(path)
    ours, theirs = results(run), results(whole)
    assert {name for name in theirs if ours[name] != theirs[name]} == set()


def sample_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an engine whose sampling cannot be repeated."""
    monkeypatch.setattr("kdrl_core.sampling.responses.derive_seed", lambda *names: hash(names) % 2**63)


@pytest.mark.parametrize("damage", [flip, lose_manifest])
def test_rollouts_that_cannot_be_sampled_again_are_refused(
    damage: Damage, stopped: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step was trained on them: other rollouts in their place would be a lie."""
    run = copy_of(stopped, tmp_path)
    path = run.paths.rollouts("stage2", 4)
    damage(path)
    left = path.read_bytes()
    before = results(run)
    with monkeypatch.context() as patched:
        sample_otherwise(patched)
        for _ in range(2):
            with pytest.raises(DamagedArtifactError, match=r"rollouts\.parquet was made again and came out otherwise"):
                train(open_run("r", artifacts=tmp_path))
            close_sessions()
            assert not is_published(path)
    aside = path.with_name(f".damaged-{path.name}")
    assert (aside if aside.is_file() else path).read_bytes() == left
    after = results(run)
    assert {name: after[name] for name in before if name in after and name != run.paths.relative(path)} == {
        name: digest for name, digest in before.items() if name != run.paths.relative(path)
    }
    train(open_run("r", artifacts=tmp_path))  # where they can, the run goes on
    verify_published(path)


def test_rollouts_that_nothing_was_made_from_may_come_out_otherwise(
    stopped: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a step that has not been trained on yet: its scores and verdicts are made anew from the new ones."""
    run = copy_of(stopped, tmp_path)
    step = run.paths.step("stage2", 4)
    for name in ("update.parquet", "_update.manifest.json", "_rollouts.manifest.json"):
        (step / name).unlink()
    sample_otherwise(monkeypatch)
    train(run)
    for name in ("rollouts", "teacher", "rewards", "update"):
        verify_published(step / f"{name}.parquet")


@pytest.fixture
def inexact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are as on GPUs: what models compute comes out otherwise when it is computed again."""
    monkeypatch.setattr(Recipe, "is_exact", False)
    sample_otherwise(monkeypatch)


def kept_of(run: Run) -> dict[str, bytes]:
    root = run.paths.root / ".replaced" / "1"
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("inexact")
@pytest.mark.parametrize("damage", [flip, pytest.param(lose_manifest, marks=pytest.mark.slow)])
def test_lost_rollouts_of_the_last_step_are_replaced_where_sampling_is_not_exact(
    damage: Damage, stopped: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = copy_of(stopped, tmp_path)
    path = run.paths.rollouts("stage2", 4)
    published = manifest_of(path).sha256
    damage(path)
    files = [file for file in path.parent.iterdir() if file.name != SEVERAL_TABLES]
    before = {file.relative_to(run.paths.root).as_posix(): file.read_bytes() for file in files}
    others = {name: digest for name, digest in results(run).items() if name not in before and "metrics/" not in name}

    train(run)

    assert kept_of(run) == before
    assert f"{path} is lost" in caplog.text
    made = manifest_of(path)
    assert made.metadata["version"] == 2
    kept = ".replaced/1/rollouts/stage=stage2/step=000004/rollouts.parquet"
    assert made.metadata["replaces"] == {"kept": kept} | ({"sha256": published} if damage is flip else {})
    assert made.sha256 != published
    for name in ("teacher", "rewards", "update"):
        assert manifest_of(path.with_name(f"{name}.parquet")).inputs[run.paths.relative(path)] == made.sha256
    assert "version" not in manifest_of(run.paths.rollouts("stage2", 5)).metadata
    assert {name: results(run)[name] for name in others} == others
    assert check_run(run).findings == []
    with RolloutStore.open([run.paths.root]) as store:  # readers see the new version alone
        assert [step["step"] for step in store.steps() if step["stage"] == "stage2"] == list(range(7))
    finish(run)
    assert is_finished(run, verify=True)


@pytest.mark.usefixtures("inexact")
def test_a_replay_goes_past_deleted_checkpoints_that_come_out_otherwise(
    stopped: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rollouts were sampled from the one of step 3, which the retention may delete. The last step is replaced."""
    run = copy_of(stopped, tmp_path)
    shutil.rmtree(run.paths.checkpoint("stage2", 3))
    flip(run.paths.rollouts("stage2", 4))
    train_otherwise(monkeypatch, by=1e-9)
    train(run)
    assert checkpoint_steps(run, "stage2") == [6, 7]
    found = [manifest_of(run.paths.update("stage2", step)).metadata.get("version") for step in range(7)]
    assert found == [None, None, None, None, 2, None, None]
    assert check_run(run).findings == []


@pytest.mark.usefixtures("inexact")
def test_later_work_is_given_up_only_if_that_is_asked_for(stopped: Run, tmp_path: Path) -> None:
    run = copy_of(stopped, tmp_path)
    path = run.paths.rollouts("stage2", 3)
    place = run.paths.relative(path)
    flip(path)
    before = results(run)
    with pytest.raises(DamagedArtifactError, match=r"rollouts\.parquet was made again .* see `kdrl check`"):
        train(run)
    close_sessions()
    assert {name: digest for name, digest in before.items() if name != place} == results(run)
    report = check_run(run)
    assert {finding.path: finding.remedy for finding in report.findings} == {place: Remedy.REPLACE}
    with pytest.raises(RunError, match=rf"step=000004/rollouts\.parquet cannot be replaced; only {place} can be"):
        replace_artifact(run, report, run.paths.relative(run.paths.rollouts("stage2", 4)))
    given_up = replace_artifact(run, report, place)
    assert given_up[-1] == place
    assert [Path(name).parent.name for name in given_up] == ["step=000004"] * 4 + ["step=000003"] * 4
    assert check_run(run).findings == []
    assert [row["step"] for row in load_metrics(run, "stage2")] == [0, 1, 2]

    train(run)

    found = [manifest_of(run.paths.update("stage2", step)).metadata.get("version") for step in range(7)]
    assert found == [None, None, None, 2, 2, None, None]
    assert check_run(run).findings == []


@pytest.mark.usefixtures("inexact")
def test_a_past_step_takes_everything_after_it_along(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_of(whole, tmp_path)
    paths = run.paths
    flip(paths.rollouts("stage1", 1))
    assert is_finished(run, verify=True)  # it does not need them
    monkeypatch.setenv("KDRL_ARTIFACTS", str(tmp_path))
    told = CliRunner().invoke(app, ["check", "r"])
    assert (told.exit_code, "--replace" in told.output) == (1, True)
    done = CliRunner().invoke(app, ["check", "r", "--replace", paths.relative(paths.rollouts("stage1", 1))])
    assert done.exit_code == 0
    assert "make them anew with: kdrl resume r" in done.output
    assert check_run(run).findings == []
    left = {paths.relative(path) for path in published_below(paths.root)}
    step = "rollouts/stage=stage1/step=000000"
    assert left == {
        *("data/pool.parquet", "data/filter.json", "checkpoints/stage1/step-000001"),
        *(f"{step}/{name}.parquet" for name in ("rollouts", "rewards", "reference", "update")),
        *("evaluation/base", "evaluation/teacher"),
    }
    assert {row["step"] for row in load_metrics(run, "stage1")} == {0}
    assert load_metrics(run, "stage2") == []
    assert "student/model.safetensors" in kept_of(run)


def test_nothing_of_an_exact_run_is_replaced(stopped: Run, tmp_path: Path) -> None:
    run = copy_of(stopped, tmp_path)
    place = run.paths.relative(run.paths.rollouts("stage2", 0))
    flip(run.paths.root / place)
    with pytest.raises(RunError, match="nothing of this run can be"):
        replace_artifact(run, check_run(run), place)


def train_otherwise(monkeypatch: pytest.MonkeyPatch, *, by: float) -> None:
    """As a machine whose sums come out otherwise by about this."""
    monkeypatch.setattr(
        "kdrl_core.objectives.advantages.group_advantages",
        lambda rewards, *args, **options: group_advantages(rewards, *args, **options) * (1 + by) + by,
    )


def test_a_replay_that_trains_otherwise_is_refused(
    stopped: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next step's rollouts would not be those of the policy that they are taken for."""
    run = copy_of(stopped, tmp_path)
    train_otherwise(monkeypatch, by=0.1)
    with pytest.raises(DamagedArtifactError, match=r"step=000003/update\.parquet: its replay gives .*, recorded is"):
        train(run)


@pytest.mark.parametrize("damage", [flip, lose_manifest, garble_manifest])
def test_a_checkpoint_is_not_lost_to_a_machine_that_trains_otherwise(
    damage: Damage, stopped: Run, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights may be good, though its manifest is not: they stay until it has been made again."""
    run = copy_of(stopped, tmp_path)
    checkpoint = run.paths.checkpoint("stage2", 3)
    for step in (3, 4):  # nothing was made from it
        shutil.rmtree(run.paths.step("stage2", step))
    damage(checkpoint / "config.json")
    weights = (checkpoint / "model.safetensors").read_bytes()
    with monkeypatch.context() as patched:
        train_otherwise(patched, by=1e-9)
        for _ in range(2):
            with pytest.raises(DamagedArtifactError, match=r"came out otherwise: .*delete .*\.damaged-step-000003"):
                train(open_run("r", artifacts=tmp_path))
            close_sessions()
    assert (checkpoint.with_name(".damaged-step-000003") / "model.safetensors").read_bytes() == weights
    train(open_run("r", artifacts=tmp_path))
    finish(run)
    assert differing(run, whole) == []
    assert list(run.paths.root.rglob(".damaged-*")) == []


def test_a_checkpoint_that_cannot_be_made_again_is_refused(
    stopped: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = copy_of(stopped, tmp_path)
    checkpoint = run.paths.checkpoint("stage2", 3)
    flip(checkpoint / "model.safetensors")
    before = results(run)
    train_otherwise(monkeypatch, by=1e-9)
    with pytest.raises(DamagedArtifactError, match=r"step-000003 was made again and came out otherwise: its sha256"):
        train(run)
    assert "its replay gives" in caplog.text  # the first step that differs is named
    assert not is_published(checkpoint)
    assert [n for n, digest in before.items() if "stage2/step-000003" not in n and results(run).get(n) != digest] == []


@pytest.mark.slow
@pytest.mark.usefixtures("inexact")
def test_a_lost_checkpoint_takes_only_the_step_along_that_was_sampled_from_it(
    stopped: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_of(stopped, tmp_path)
    shutil.rmtree(run.paths.step("stage2", 4))
    checkpoint = run.paths.checkpoint("stage2", 3)
    published = manifest_of(checkpoint).sha256
    flip(checkpoint / "model.safetensors")
    train_otherwise(monkeypatch, by=1e-9)
    train(run)
    made = manifest_of(run.paths.rollouts("stage2", 3))
    assert made.metadata["version"] == 2
    assert made.inputs[run.paths.relative(checkpoint)] != published
    assert "version" not in manifest_of(run.paths.update("stage2", 2)).metadata
    assert {name.split("/")[0] for name in kept_of(run)} == {"checkpoints", "rollouts"}
    assert check_run(run).findings == []


@pytest.mark.parametrize("name", ["rollouts", "teacher", "rewards", "update"])
def test_a_file_of_another_step_is_refused(name: str, stopped: Run, whole: Run, tmp_path: Path) -> None:
    """It is whole, and somebody put it there: it is not for kdrl to delete it."""
    run = copy_of(stopped, tmp_path)
    path = run.paths.step("stage2", 4) / f"{name}.parquet"
    for each in (path.name, manifest_for(path).name):
        shutil.copy(run.paths.step("stage2", 3) / each, path.with_name(each))
    before = results(run)
    with pytest.raises(ForeignFileError, match=rf"step=000004/{name}\.parquet belongs elsewhere: it was published as"):
        train(run)
    assert results(run) == before
    for each in (path, manifest_for(path)):  # as the message says
        each.unlink()
    close_sessions()
    train(run)
    finish(run)
    assert differing(run, whole) == []


def test_rollouts_of_another_run_are_refused(stopped: Run, tmp_path: Path) -> None:
    """They lie in their place, but are not those that the step was trained on."""
    run = copy_of(stopped, tmp_path / "one")
    other = open_tiny(tmp_path / "two", "r", [*SPARSE, "seed=1"])
    train(other, until=("stage2", 5))
    for name in ("rollouts.parquet", "_rollouts.manifest.json"):
        shutil.copy(other.paths.step("stage2", 4) / name, run.paths.step("stage2", 4) / name)
    close_sessions()
    told = r"step=000003/update\.parquet is whole, but not the one that .*step=000004/rollouts\.parquet was made from"
    with pytest.raises(ForeignFileError, match=told):
        train(open_run("r", artifacts=tmp_path / "one"))


@pytest.mark.parametrize(("stage", "step", "source"), [("stage2", 3, ("stage1", 2)), ("stage1", 2, ("stage1", 1))])
def test_a_checkpoint_of_another_step_is_refused(
    stage: str, step: int, source: tuple[str, int], stopped: Run, whole: Run, tmp_path: Path
) -> None:
    run = copy_of(stopped, tmp_path)
    path = run.paths.checkpoint(stage, step)
    shutil.rmtree(path)
    shutil.copytree(run.paths.checkpoint(*source), path)
    with pytest.raises(ForeignFileError, match=rf"{path.name} belongs elsewhere: it was published as checkpoints/"):
        train(run)
    shutil.rmtree(path)
    close_sessions()
    train(run)
    finish(run)
    assert differing(run, whole) == []


@pytest.mark.parametrize(("stage", "step"), [("stage1", 2), ("stage2", 7)])
def test_a_finished_run_notices_that_a_result_was_exchanged(stage: str, step: int, whole: Run, tmp_path: Path) -> None:
    run = copy_of(whole, tmp_path)
    path = run.paths.checkpoint(stage, step)
    shutil.rmtree(path)
    shutil.copytree(run.paths.checkpoint(stage, step - 1), path)
    assert not is_finished(run, verify=True)
    with pytest.raises(ForeignFileError, match="belongs elsewhere"):
        train(run)
    with pytest.raises(ForeignFileError, match="belongs elsewhere"):
        finish(run)


def test_a_checkpoint_of_another_run_is_refused(stopped: Run, tmp_path: Path) -> None:
    """Its place and its bytes are right, its update is not that of this run."""
    run = copy_of(stopped, tmp_path / "one")
    other = open_tiny(tmp_path / "two", "r", [*SPARSE, "seed=1"])
    train(other, until=("stage2", 3))
    path = run.paths.checkpoint("stage2", 3)
    shutil.rmtree(path)
    shutil.copytree(other.paths.checkpoint("stage2", 3), path)
    close_sessions()
    with pytest.raises(
        ForeignFileError, match=r"step-000003 was made from other files than are there now: rollouts/st"
    ):
        train(open_run("r", artifacts=tmp_path / "one"))


@pytest.mark.parametrize("name", ["data/pool.parquet", "data/filter.json", "metrics/stage=stage1/metrics.parquet"])
def test_damaged_data_unfinish_a_run(name: str, whole: Run, tmp_path: Path) -> None:
    run = copy_of(whole, tmp_path)
    truncate(run.paths.root / name)
    assert not is_finished(run, verify=True)
    train(run)
    finish(run)
    assert is_finished(run, verify=True)
    assert differing(run, whole) == []


def test_what_was_trained_on_decides_where_file_and_manifest_are_both_damaged(
    stopped: Run, whole: Run, tmp_path: Path
) -> None:
    run = copy_of(stopped, tmp_path)
    path = run.paths.rewards("stage2", 4)
    truncate(path)
    garble_manifest(path)
    train(run)
    assert results(run)[run.paths.relative(path)] == results(whole)[run.paths.relative(path)]


def test_metrics_of_another_stage_in_their_place(stopped: Run, whole: Run, tmp_path: Path) -> None:
    run = copy_of(stopped, tmp_path)
    shutil.copy(run.paths.metrics("stage2"), run.paths.metrics("stage1"))
    train(run)
    ours, theirs = load_metrics(run, "stage1"), load_metrics(whole, "stage1")
    assert [row["loss/total"] for row in ours] == [row["loss/total"] for row in theirs]


def test_a_damaged_result_of_stage_one_unfinishes_a_run(whole: Run, tmp_path: Path) -> None:
    run = copy_of(whole, tmp_path)
    flip(run.paths.checkpoint("stage1", 2) / "model.safetensors")
    assert not is_finished(run, verify=True)
    train(run)
    finish(run)
    assert is_finished(run, verify=True)


class _Backwards(datetime):
    """A clock that loses a day whenever it is asked."""

    asked = 0

    @classmethod
    def now(cls, tz: object = None) -> "_Backwards":  # type: ignore[override]
        cls.asked += 1
        return cls(2026, 1, 1, tzinfo=UTC) - timedelta(days=cls.asked)  # type: ignore[return-value]


def test_a_clock_that_goes_backwards_changes_nothing(
    whole: Run, stopped: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy_of(stopped, tmp_path)
    for module in ("publish", "run", "lock"):
        monkeypatch.setattr(f"kdrl_core.ledger.{module}.datetime", _Backwards)
    now = iter(range(10**9, 0, -1000))
    monkeypatch.setattr("time.time", lambda: float(next(now)))
    train(run)
    finish(run)
    assert differing(run, whole) == []
    assert is_finished(run, verify=True)
    assert _Backwards.asked > 10


@pytest.mark.parametrize("damage", [flip, garble_manifest])
def test_a_crash_while_a_damaged_file_is_set_aside(
    damage: Damage, stopped: Run, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifest has been moved, the file has not."""
    run = copy_of(stopped, tmp_path)
    path = run.paths.rewards("stage2", 3)
    damage(path)
    manifest_for(path).rename(path.with_name(".damaged-_rewards.manifest.json"))
    train(run)
    verify_published(path)
    assert results(run)[run.paths.relative(path)] == results(whole)[run.paths.relative(path)]
    assert list(run.paths.root.rglob(".damaged-*")) == []
