"""Smoothing, tables and the summary: the arithmetic by hand, on a run made of metrics and results files alone."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from kdrl_core.config import load_recipe
from kdrl_core.ledger import Run, create_run, publish_directory, replace_file
from kdrl_core.ledger.graph import evaluated_labels
from kdrl_core.look.reporting.run_report import dynamics_figure, ema
from kdrl_core.look.reporting.run_summary import (
    ModelRow,
    RunSummary,
    StageRow,
    Table,
    accuracy_table,
    phase_table,
    summarize,
)
from kdrl_core.tables.files import write_table


def test_ema_golden() -> None:
    # weight 0.5, debiased: 1; (0.5·0.5 + 0.5·3)/0.75 = 1.75/0.75; (0.5·1.75 + 0.5·5)/0.875 = 3.375/0.875
    assert ema([1.0, 3.0, 5.0], weight=0.5) == pytest.approx([1.0, 7 / 3, 27 / 7])


def test_ema_of_a_constant_is_the_constant_from_its_start() -> None:
    assert ema([2.5] * 50) == pytest.approx([2.5] * 50)


def test_ema_edges() -> None:
    assert ema([]) == []
    assert ema([1.0, 2.0], weight=0.0) == [1.0, 2.0]


def test_table_is_markdown() -> None:
    table = Table(title="t", header=["model", "a"], rows=[["base", "1.0"], ["teacher", "–"]])
    assert table.to_markdown() == "| model | a |\n| --- | ---: |\n| base | 1.0 |\n| teacher | – |"


SUMMARY = RunSummary(
    run="one",
    recipe="miniature",
    models=[
        ModelRow(label="base", name="student before", benchmarks={"a": {"accuracy": 0.4, "low": 0.35, "high": 0.455}}),
        ModelRow(label="stage1", name="after stage 1", benchmarks={"b": {"accuracy": 1.0, "low": 0.9, "high": 1.0}}),
    ],
    stages=[
        StageRow(
            stage="stage1",
            objective="grpo",
            steps=3,
            planned_steps=20,
            seconds=12.6,
            metrics={"reward/mean": (0.25, 0.5), "response/length_mean": (31.27, 33.0)},
        )
    ],
)


def test_accuracy_is_in_percent_with_its_interval() -> None:
    table = accuracy_table(SUMMARY)
    assert table.header == ["model", "a", "b"]
    assert table.rows == [
        ["student before", "40.0 (35.0–45.5)", "–"],
        ["after stage 1", "–", "100.0 (90.0–100.0)"],
    ]


def test_phases_show_start_and_end() -> None:
    assert phase_table(SUMMARY).rows == [["stage1 grpo", "3/20", "0.25 → 0.50", "31 → 33", "–", "–", "13"]]
    assert len(phase_table(SUMMARY).header) == len(phase_table(SUMMARY).rows[0])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run of the miniature that has done ten steps of stage 1, and evaluated the base model and one checkpoint."""
    run = create_run("one", load_recipe("miniature", ["stage1.steps=20"]), artifacts=tmp_path)
    metrics = [
        {"step": k, "reward/mean": k / 10, "response/length_mean": 30.0, "response/clip_ratio": 0.0} for k in range(10)
    ]
    timings = [{"step": k, "time/rollout_s": 0.5, "time/update_s": 0.25, "throughput/x": 9.0} for k in range(10)]
    for path, rows in ((run.paths.metrics("stage1"), metrics), (run.paths.timings("stage1"), timings)):
        sink = pa.BufferOutputStream()
        write_table(pa.Table.from_pylist(rows), sink)
        replace_file(path, sink.getvalue().to_pybytes())
    for label, accuracy in (("base", 0.4), ("stage1-step-000010", 0.5)):
        content = {"benchmarks": {"test": {"accuracy": accuracy, "low": 0.3, "high": 0.6}}}
        publish_directory(
            run.paths.evaluation(label),
            lambda folder, content=content: (folder / "results.json").write_text(json.dumps(content)) and None,
        )
    return run


def test_summary_of_an_unfinished_run(run: Run) -> None:
    summary = summarize(run)
    assert [(model.label, model.name) for model in summary.models] == [("base", "student before")]
    assert summary.models[0].benchmarks["test"]["accuracy"] == 0.4
    (stage,) = summary.stages
    assert (stage.steps, stage.planned_steps, stage.objective) == (10, 20, "grpo")
    # first and last fifth of ten steps: means of (0, 0.1) and of (0.8, 0.9)
    assert stage.metrics["reward/mean"] == pytest.approx((0.05, 0.85))
    assert "kd/kl_unmasked" not in stage.metrics
    assert stage.seconds == pytest.approx(10 * 0.75)  # times only, no throughput
    assert summary.paths == {"run": str(run.paths.root)}
    assert json.loads(json.dumps(summary.to_json()))["run"] == "one"


def test_summary_of_a_run_without_steps(tmp_path: Path) -> None:
    summary = summarize(create_run("empty", load_recipe("miniature"), artifacts=tmp_path))
    assert (summary.models, summary.stages) == ([], [])
    assert accuracy_table(summary).rows == phase_table(summary).rows == []


def test_labels_follow_the_recipe() -> None:
    recipe = load_recipe("miniature", ["stage1=null", "stage2.objective=grpo", "stage2.beta=null", "teacher=null"])
    assert evaluated_labels(recipe) == ["base", "stage2"]
    assert evaluated_labels(load_recipe("miniature")) == ["base", "stage1", "stage2", "teacher"]


def test_model_names_tell_the_objective(run: Run) -> None:
    content = {"benchmarks": {}}
    publish_directory(
        run.paths.evaluation("stage2"),
        lambda folder: (folder / "results.json").write_text(json.dumps(content)) and None,
    )
    assert [model.name for model in summarize(run).models] == ["student before", "after stage 2 (KDRL)"]


def test_the_figure_has_raw_and_smoothed_lines_and_the_evaluated_checkpoint(run: Run) -> None:
    figure = dynamics_figure(run)
    named = {(trace.name, trace.mode): trace for trace in figure.data}
    rewards = [k / 10 for k in range(10)]
    assert list(figure.data[0].y) == rewards
    assert list(figure.data[1].y) == pytest.approx(ema(rewards))
    assert list(named["stage1", "lines+markers"].x) == [10]
    assert list(named["stage1", "lines+markers"].y) == [50.0]  # per cent
    assert list(figure.data[-1].y) == pytest.approx(ema([0.75] * 10))  # seconds of a step: times, no throughput


def test_steps_without_a_metric_are_left_out_of_its_line(run: Run) -> None:
    """A step of cut responses alone has no metrics of the loss, be it the first."""
    rows = [{"step": k, "entropy": None if k in (0, 2) else k / 10} for k in range(4)]
    sink = pa.BufferOutputStream()
    write_table(pa.Table.from_pylist(rows), sink)
    replace_file(run.paths.metrics("stage1"), sink.getvalue().to_pybytes())
    (raw,) = [trace for trace in dynamics_figure(run).data if trace.name == "stage1 raw" and trace.yaxis == "y5"]
    assert (list(raw.x), list(raw.y)) == ([1, 3], [0.1, 0.3])
    assert summarize(run).stages[0].metrics["entropy"] == pytest.approx((0.1, 0.3))
