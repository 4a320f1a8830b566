"""The flows through a real (temporary) Prefect server: what runs, what is shown, what a second run does."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import task
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey, FlowRunFilter, FlowRunFilterName
from support import TINY

from flows.full_pipeline import full_pipeline
from kdrl_core.boxes.completion import is_finished
from kdrl_core.errors import DataError, RecipeError, RunError
from kdrl_core.ledger import RunPaths, manifest_of, open_run
from kdrl_core.tables.files import load_metrics
from tasks.boxes import STEP_OPTIONS

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny pipeline run once for the module: (artifacts folder, run paths)."""
    folder = tmp_path_factory.mktemp("artifacts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDRL_ARTIFACTS", str(folder))
        run_dir = full_pipeline(recipe="miniature", run_name="tiny", overrides=TINY)
    return folder, RunPaths(Path(run_dir))


def _client() -> SyncPrefectClient:
    return get_client(sync_client=True)


def test_pipeline_leaves_the_whole_run_directory(finished: Any) -> None:
    _, paths = finished
    run = open_run("tiny", artifacts=paths.root.parent.parent)
    assert is_finished(run)
    assert [len(load_metrics(run, stage)) for stage in ("stage1", "stage2")] == [2, 3]
    assert paths.reference("stage1", 0).is_file()
    assert not paths.teacher("stage1", 0).exists()  # plain GRPO has no teacher
    assert paths.teacher("stage2", 0).is_file()
    for path in (paths.pool, paths.filter_report, paths.student / "model.safetensors", paths.report / "report.html"):
        assert path.is_file(), path


def test_flow_and_task_runs_tell_stage_and_step(finished: Any) -> None:
    with _client() as client:
        names = {run.name for run in client.read_flow_runs(flow_run_filter=_named("tiny"))}
        tasks = {run.name for run in client.read_task_runs(limit=200)}
    assert {"tiny", "tiny-filtering", "tiny-stage1", "tiny-stage2", "tiny-evaluation", "tiny-reporting"} <= names
    assert {f"stage2-000002-{box}" for box in ("rollout", "teacher-score", "verify", "update")} <= tasks
    assert {"filter", "evaluate-base", "evaluate-stage2-step-000002", "evaluate-teacher", "report"} <= tasks


def test_artifacts_show_progress_metrics_result_and_links(finished: Any) -> None:
    with _client() as client:
        keys = ArtifactFilterKey(like_="tiny-%")
        artifacts = {a.key: a for a in client.read_artifacts(artifact_filter=ArtifactFilter(key=keys))}
    assert artifacts["tiny-stage1"].type == "progress"
    assert artifacts["tiny-stage2"].data == 100.0
    assert artifacts["tiny-stage2-metrics"].type == "table"
    assert "after stage 2 (KDRL)" in str(artifacts["tiny-result"].data)
    assert "rollouts/stage=stage2" in str(artifacts["tiny-stage2-rollouts-parquet"].data)


def test_second_run_of_the_same_name_recomputes_nothing(finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, paths = finished
    monkeypatch.setenv("KDRL_ARTIFACTS", str(folder))
    before = _stamps(paths.root)
    full_pipeline(recipe="miniature", run_name="tiny", overrides=TINY)
    assert _stamps(paths.root) == before


def test_more_steps_continue_and_renew_the_result(finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, paths = finished
    monkeypatch.setenv("KDRL_ARTIFACTS", str(folder))
    first = manifest_of(paths.rollouts("stage2", 2)).created_at
    full_pipeline(recipe="miniature", run_name="tiny", overrides=[*TINY, "stage2.steps=4"])
    run = open_run("tiny")
    assert is_finished(run)
    assert len(load_metrics(run, "stage2")) == 4
    assert manifest_of(paths.rollouts("stage2", 2)).created_at == first
    assert list(manifest_of(paths.student).inputs) == ["checkpoints/stage2/step-000004"]


def test_changed_recipe_is_refused_with_the_fields(finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = finished
    monkeypatch.setenv("KDRL_ARTIFACTS", str(folder))
    with pytest.raises(RunError, match=r"stage2\.learning_rate: 0\.0003 → 0\.1"):
        full_pipeline(recipe="miniature", run_name="tiny", overrides=[*TINY, "stage2.learning_rate=0.1"])


def test_bad_input_fails_the_flow_and_makes_no_run(artifacts: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'steps'"):
        full_pipeline(recipe="miniature", run_name="bad", overrides=["stage2.stesp=1"])
    with pytest.raises(RunError, match="is not allowed"):
        full_pipeline(recipe="miniature", run_name="../bad")
    assert not list(artifacts.glob("**/bad*"))


def test_empty_pool_names_the_rule(artifacts: Path, tmp_path: Path) -> None:
    problems = tmp_path / "easy.jsonl"
    problems.write_text('{"problem": "1+1", "answer": "2"}\n' * 3)
    overrides = [*TINY, f"stage1.data.files=[{problems}]", "stage1.data.format=problems"]
    with pytest.raises(DataError, match=r"stage1: 1 problems are left .* fewer than prompts_per_step=4"):
        full_pipeline(recipe="miniature", run_name="empty", overrides=overrides)
    assert not (artifacts / "runs" / "empty" / "data" / "pool.parquet").exists()


def test_only_transient_faults_are_tried_again() -> None:
    calls: list[str] = []

    @task(**{**STEP_OPTIONS, "retry_delay_seconds": 0})
    def flaky(error: Exception) -> str:
        calls.append(type(error).__name__)
        if len(calls) < 2 or isinstance(error, DataError):
            raise error
        return "done"

    assert flaky(ConnectionError("reset")) == "done"
    with pytest.raises(DataError):
        flaky(DataError("bad row"))
    assert calls == ["ConnectionError", "ConnectionError", "DataError"]


def test_prefect_yaml_deploys_every_flow_under_its_public_name() -> None:
    from prefect.flows import load_flow_from_entrypoint

    config = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    names = {
        f"{load_flow_from_entrypoint(str(ROOT / d['entrypoint'])).name}/{d['name']}" for d in config["deployments"]
    }
    assert names == {
        "kdrl/full-pipeline",
        "kdrl-sweep/sweep",
        "kdrl-filtering/filtering",
        "kdrl-training-stage/training-stage",
        "kdrl-sft-stage/sft-stage",
        "kdrl-evaluation/evaluation",
        "kdrl-model-evaluation/model-evaluation",
        "kdrl-reporting/reporting",
    }
    assert len((ROOT / "flows" / "full_pipeline.py").read_text().splitlines()) <= 60


def _named(prefix: str) -> FlowRunFilter:
    return FlowRunFilter(name=FlowRunFilterName(like_=prefix))


def _stamps(root: Path) -> dict[str, int]:
    files = [p for p in root.rglob("*") if p.is_file() and not p.name.startswith("run.")]
    return {str(path): path.stat().st_mtime_ns for path in files}


def test_failure_is_kept_with_the_way_on(artifacts: Path) -> None:
    with pytest.raises(DataError):
        full_pipeline(recipe="miniature", run_name="short", overrides=[*TINY, "stage1.data.max_problems=2"])
    with _client() as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["kdrl-failure"])))
    texts = [str(artifact.data) for artifact in found if artifact.flow_run_id is not None]
    assert any("**short-filtering** failed" in text and "`kdrl resume short`" in text for text in texts), texts
