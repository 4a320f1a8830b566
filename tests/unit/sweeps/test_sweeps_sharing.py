"""What a run takes over from another is what it would have made itself, and is told."""

import json
import shutil
from pathlib import Path

import pytest
from crash.tiny_run import differing, finish, open_tiny, train

from kdrl_core.boxes.check import check_run
from kdrl_core.boxes.completion import is_finished
from kdrl_core.boxes.evaluate import evaluate_model
from kdrl_core.boxes.make import make
from kdrl_core.boxes.sharing import adopt_parts
from kdrl_core.ledger import Run, adopted, manifest_of, publish
from kdrl_core.ledger.manifest import file_manifest_path
from kdrl_core.look.sweeps.aggregate import build_table
from kdrl_core.look.sweeps.results import read_results_of
from kdrl_core.look.sweeps.state import CellState, CellStatus

GRPO = ["stage2.objective=grpo"]
ALL_OF_STAGE1 = ["data", "stage1", "evaluation of stage1", "evaluation of base", "evaluation of teacher"]

pytestmark = pytest.mark.usefixtures("fast_sessions")


@pytest.fixture
def donor(copied_run: Run) -> Run:
    """The finished KDRL run, to be changed."""
    return copied_run


def _grpo(donor: Run) -> Run:
    return open_tiny(donor.paths.root.parent.parent, "grpo", GRPO)


def test_shared_work_leaves_the_bytes_of_a_run_alone(donor: Run, donor_and_alone: tuple[Run, Run]) -> None:
    run = _grpo(donor)
    assert adopt_parts(run, ["nosuch", "grpo", "kdrl"]) == dict.fromkeys(ALL_OF_STAGE1, "kdrl")
    assert check_run(run).findings == []
    train(run)
    finish(run)
    assert is_finished(run, verify=True)
    assert differing(run, donor_and_alone[1]) == []
    assert check_run(run).findings == []
    assert check_run(donor).findings == []
    for place in ("checkpoints/stage1/step-000002", "rollouts/stage=stage1/step=000001/update.parquet"):
        assert manifest_of(run.paths.root / place) == manifest_of(donor.paths.root / place)


def test_where_it_comes_from_stands_in_the_run_s_manifest(donor: Run) -> None:
    run = _grpo(donor)
    adopt_parts(run, ["kdrl"])
    theirs = json.loads(donor.paths.manifest.read_text())
    told = adopted(run)
    assert [one["what"] for one in told] == ALL_OF_STAGE1
    assert {(one["run"], one["config_hash"]) for one in told} == {("kdrl", theirs["config_hash"])}
    assert told[0]["versions"] == theirs["versions"]
    assert told[1]["num_artifacts"] == 2 * 4 + 2  # rollouts, reference, rewards, update of each step; two checkpoints
    again = open_tiny(run.paths.root.parent.parent, "grpo", [*GRPO, "stage2.steps=5"])  # the manifest is written anew
    assert adopted(again) == told


def test_nothing_is_taken_from_other_work(donor: Run) -> None:
    artifacts = donor.paths.root.parent.parent
    other_seed = open_tiny(artifacts, "seed", ["seed=1"])
    other_rate = open_tiny(artifacts, "rate", ["stage1.learning_rate=1e-5"])
    assert adopt_parts(other_seed, ["kdrl"]) == {}
    assert list(adopt_parts(other_rate, ["kdrl"])) == ["data", "evaluation of base", "evaluation of teacher"]
    assert adopted(other_seed) == []


def test_an_unfinished_stage_is_not_taken(donor: Run) -> None:
    shutil.rmtree(donor.paths.checkpoint("stage1", 2))
    run = _grpo(donor)
    assert "stage1" not in adopt_parts(run, ["kdrl"])
    assert not (run.paths.root / "rollouts").exists()


def test_a_part_that_the_run_began_otherwise_is_its_own(donor: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="kdrl")
    run = _grpo(donor)
    train(run, until=("stage1", 1))
    path = run.paths.rewards("stage1", 0)
    manifest = manifest_of(path)
    altered = publish.Manifest(**{**_fields(manifest), "sha256": "0" * 64})  # as another machine may have made it
    file_manifest_path(path).write_bytes(altered.to_bytes())
    assert "stage1" not in adopt_parts(run, ["kdrl"])
    assert "stage1 of kdrl is not taken over: rollouts/stage=stage1/step=000000/rewards.parquet is here" in caplog.text


def test_a_begun_stage_that_agrees_is_completed(donor: Run, donor_and_alone: tuple[Run, Run]) -> None:
    run = _grpo(donor)
    train(run, until=("stage1", 1))
    assert adopt_parts(run, ["kdrl"])["stage1"] == "kdrl"
    train(run)
    finish(run)
    assert differing(run, donor_and_alone[1]) == []


def test_a_damaged_donor_is_passed_over(donor: Run, caplog: pytest.LogCaptureFixture) -> None:
    (donor.paths.checkpoint("stage1", 2) / "model.safetensors").write_bytes(b"torn")
    run = _grpo(donor)
    assert "stage1" not in adopt_parts(run, ["kdrl"])
    assert "model.safetensors is damaged" in caplog.text
    assert "is not taken over, and made here" in caplog.text
    assert not (run.paths.root / "rollouts").exists()
    assert [one["what"] for one in adopted(run)] == ["data", "evaluation of base", "evaluation of teacher"]


def test_interrupted_at_any_file_it_goes_on(
    donor: Run, donor_and_alone: tuple[Run, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _grpo(donor)
    left = 0

    def killed(source: Path, target: Path, sha256: str) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        target.hardlink_to(source)

    monkeypatch.setattr(publish, "_link", killed)
    for life in range(40):
        left = life
        try:
            adopt_parts(run, ["kdrl"])
            break
        except KeyboardInterrupt:
            assert [finding.problem for finding in check_run(run).findings if "damaged" in finding.problem] == []
    assert [one["what"] for one in adopted(run)] == ALL_OF_STAGE1
    assert check_run(run).findings == []
    train(run)
    finish(run)
    assert differing(run, donor_and_alone[1]) == []


def test_what_one_run_mends_does_not_touch_the_other(donor: Run) -> None:
    run = _grpo(donor)
    adopt_parts(run, ["kdrl"])
    path = donor.paths.rewards("stage1", 0)
    before = run.paths.rewards("stage1", 0).read_bytes()
    path.unlink()
    from kdrl_core.boxes.session import close_sessions, stage_session
    from kdrl_core.boxes.step import verify

    make(stage_session(donor.paths.root, "stage1"), verify, 0)
    close_sessions()
    assert path.read_bytes() == before
    assert path.stat().st_ino != run.paths.rewards("stage1", 0).stat().st_ino
    assert check_run(run).findings == check_run(donor).findings == []


def test_a_copy_serves_where_there_are_no_links(donor: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    run = _grpo(donor)
    assert list(adopt_parts(run, ["kdrl"])) == ALL_OF_STAGE1
    assert run.paths.pool.stat().st_ino != donor.paths.pool.stat().st_ino
    assert check_run(run).findings == []


def test_a_model_for_comparison_is_evaluated_beside_shared_work_and_is_a_row(
    donor: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts = donor.paths.root.parent.parent
    also = ["evaluation.also={weak: {path: 'builtin:miniature/teacher-weak'}}"]
    run = open_tiny(artifacts, "also", also)
    shared = adopt_parts(run, ["kdrl"])  # all but the model that the donor does not know
    assert {*shared} == {*ALL_OF_STAGE1, "stage2", "evaluation of stage2"}
    evaluate_model(run, "weak")
    assert check_run(run).findings == []
    later = open_tiny(artifacts, "later", [*also, *GRPO])
    assert adopt_parts(later, ["kdrl", "also"])["evaluation of weak"] == "also"
    monkeypatch.setenv("KDRL_ARTIFACTS", str(artifacts))
    status = CellStatus(run="also", variant="KDRL", seed=0, state=CellState.FINISHED)
    rows = build_table(read_results_of("s", "", "miniature", [status])).rows
    assert [row.label for row in rows] == ["student before", "after stage 1", "teacher", "weak", "KDRL"]
    assert rows[3].scores.keys() == rows[4].scores.keys()


def _fields(manifest: publish.Manifest) -> dict[str, object]:
    return {name: getattr(manifest, name) for name in manifest.__slots__}
