"""The SFT baseline through a real (temporary) Prefect server: one override of the miniature, to a report."""

from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from rich.console import Console
from support import TINY

from flows.cli.watch import RunView
from flows.full_pipeline import full_pipeline
from flows.sft_stage import sft_stage
from flows.training_stage import training_stage
from kdrl_core.boxes.completion import is_finished
from kdrl_core.errors import RunError
from kdrl_core.ledger import RunPaths, is_published, manifest_of, open_run
from kdrl_core.look.reporting.run_summary import run_status
from kdrl_core.tables.files import load_metrics

SFT = [
    *TINY,
    "stage1=null",
    "stage2.objective=sft",
    "stage2.max_response_tokens=64",  # so that some answers of the teacher are right
    "stage2.data.max_problems=8",
    "stage2.sft.samples=2",
    "stage2.sft.shard_prompts=3",
    "stage2.sft.batch_size=4",
]


def test_sft_runs_to_a_report_and_is_shown(artifacts: Path) -> None:
    paths = RunPaths(Path(full_pipeline(recipe="miniature", run_name="sft", overrides=SFT)))
    run = open_run("sft")
    assert is_finished(run)
    assert len(load_metrics(run, "stage2")) == 3
    assert is_published(paths.evaluation("stage2-step-000002"))
    assert not paths.rollouts("stage2", 0).exists()
    counts = manifest_of(paths.sft_dataset("stage2")).metadata

    report = (paths.report / "report.md").read_text()
    assert "after stage 2 (SFT)" in report
    assert f"{counts['kept']} of 16" in report
    assert "SFT loss" in (paths.report / "report.html").read_text()

    status = run_status(run)
    assert (status["state"], status["reward"], status["progress"]) == ("finished", None, "stage2 3/3")
    console = Console(record=True, width=120)
    console.print(RunView(paths).render(1.0))
    assert "loss " in console.export_text()

    with get_client(sync_client=True) as client:
        keys = ArtifactFilterKey(like_="sft-%")
        shown = {a.key: a for a in client.read_artifacts(artifact_filter=ArtifactFilter(key=keys))}
        tasks = {task.name for task in client.read_task_runs(limit=200)}
    assert shown["sft-stage2"].data == shown["sft-stage2-samples"].data == 100.0
    assert "loss/sft" in str(shown["sft-stage2-metrics"].data)
    assert f"{counts['kept']} of 16" in str(shown["sft-result"].data)
    assert {"stage2-shard-000002-teacher-sample", "stage2-shard-000002-verify", "stage2-select"} <= tasks
    assert "stage2-000002-sft-update" in tasks

    with pytest.raises(RunError, match="kdrl-sft-stage/sft-stage"):
        training_stage(str(paths.root), "stage2")


def test_sft_flow_refuses_another_objective(artifacts: Path) -> None:
    from kdrl_core.config import load_recipe
    from kdrl_core.ledger import create_run

    run = create_run("other", load_recipe("miniature", TINY))
    with pytest.raises(RunError, match=r"stage1\.objective=grpo is no SFT"):
        sft_stage(str(run.paths.root), "stage1")
