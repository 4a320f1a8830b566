"""The end of a run: evaluation, the student as an ordinary model directory, the report, and when a run is finished."""

import json
import shutil
from pathlib import Path

import pyarrow.compute as pc
import pytest
import torch
from browser import look, needs_chromium
from crash.tiny_run import finish, open_tiny, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdrl_core.boxes.completion import is_finished, student
from kdrl_core.boxes.evaluate import evaluate_model, model_of
from kdrl_core.boxes.make import make
from kdrl_core.errors import DamagedArtifactError, ModelError, RunError
from kdrl_core.ledger import Run, RunPaths, is_published
from kdrl_core.ledger.graph import evaluated_labels
from kdrl_core.look.reporting.run_report import report
from kdrl_core.look.reporting.run_summary import sample_responses
from kdrl_core.tables.files import read_table


@pytest.fixture
def copied(finished: Run, tmp_path: Path) -> Run:
    """The finished run, free to be changed."""
    root = tmp_path / "artifacts" / "runs" / finished.name
    shutil.copytree(finished.paths.root, root)
    return Run(RunPaths(root), finished.recipe)


def test_student_is_an_ordinary_model_directory(finished: Run) -> None:
    path = finished.paths.student
    assert not list(path.rglob("*trainer*"))
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "3+5*2"}], add_generation_prompt=True)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    output = model.generate(input_ids=torch.tensor([prompt["input_ids"]]), max_new_tokens=40, do_sample=False)
    assert tokenizer.decode(output[0]).startswith("<|user|>3+5*2<|assistant|><think>")


def test_student_has_the_last_checkpoints_weights(finished: Run) -> None:
    name = "model.safetensors"
    checkpoint = finished.paths.checkpoint("stage2", 4)
    assert (finished.paths.student / name).read_bytes() == (checkpoint / name).read_bytes()


@needs_chromium
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_is_small_and_quiet(copied: Run, width: int) -> None:
    page = copied.paths.report / "report.html"
    assert page.stat().st_size < 1.5e6
    script = """return {
        drawn: document.querySelectorAll("#dynamics .subplot").length,
        overflows: document.documentElement.scrollWidth > document.documentElement.clientWidth,
        headings: [...document.querySelectorAll("main h2")].map(one => one.textContent)}"""
    found, console = look(page, script, width=width)
    assert console == []
    assert (found["drawn"], found["overflows"]) == (7, False)  # all panels but the periodic accuracy
    assert {"Training dynamics", "Data filter of stage1", "Data filter of stage2"} < set(found["headings"])


def test_the_responses_of_a_report_differ(finished: Run) -> None:
    rows = sample_responses(finished, 3)
    for right in (1.0, 0.0):
        own = [row for row in rows if row["accuracy_reward"] == right]
        assert len({row["question"] for row in own}) == len(own) <= 3
        assert [row["length"] for row in own] == sorted(row["length"] for row in own)
    responses = read_table(finished.paths.evaluation("stage2") / "responses.parquet")
    wrong = responses.filter(pc.equal(responses["accuracy_reward"], 0.0)).to_pylist()
    firsts = {row["question"]: row["length"] for row in reversed(wrong)}.values()
    lengths = [row["length"] for row in rows if row["accuracy_reward"] == 0.0]
    assert (lengths[0], lengths[-1]) == (min(firsts), max(firsts))


def test_report_is_written(finished: Run) -> None:
    report = finished.paths.report
    assert "<html" in (report / "report.html").read_text()[:1000].lower()
    assert "after stage 2 (KDRL)" in (report / "report.md").read_text()
    summary = json.loads((report / "summary.json").read_text())
    assert [model["label"] for model in summary["models"]] == ["base", "stage1", "stage2", "teacher"]
    assert [(stage["stage"], stage["steps"]) for stage in summary["stages"]] == [("stage1", 2), ("stage2", 4)]


def test_finished_is_told_from_the_files(copied: Run) -> None:
    assert is_finished(copied)
    for path in (copied.paths.report, copied.paths.evaluation("teacher"), copied.paths.checkpoint("stage2", 4)):
        aside = path.with_name("aside")
        path.rename(aside)
        assert not is_finished(copied)
        aside.rename(path)
    assert is_finished(copied)


def test_unfinished_run_is_not_finished(tmp_path: Path) -> None:
    run = open_tiny(tmp_path, "r")
    assert not is_finished(run)
    train(run, until=("stage1", 1))
    assert not is_finished(run)
    with pytest.raises(RunError, match="not published"):
        make(run, student)


def test_finishing_again_changes_nothing(copied: Run) -> None:
    before = {path: path.stat().st_mtime_ns for path in copied.paths.root.rglob("*") if path.is_file()}
    finish(copied)
    assert {path: path.stat().st_mtime_ns for path in copied.paths.root.rglob("*") if path.is_file()} == before


def test_report_of_an_altered_evaluation_is_refused(copied: Run) -> None:
    """Evaluating comes before reporting, and makes it again: no report is written from it in between."""
    (copied.paths.evaluation("stage2") / "results.json").write_text("{}")
    with pytest.raises(DamagedArtifactError, match=r"results\.json is damaged"):
        make(copied, report)


def test_lost_evaluation_is_made_again(copied: Run, finished: Run) -> None:
    shutil.rmtree(copied.paths.evaluation("stage1"))
    evaluate_model(copied, "stage1")
    name = "responses.parquet"
    again = (copied.paths.evaluation("stage1") / name).read_bytes()
    assert again == (finished.paths.evaluation("stage1") / name).read_bytes()


def test_labels_name_models(finished: Run) -> None:
    assert model_of(finished, "stage1")[0] == finished.paths.checkpoint("stage1", 2)
    assert model_of(finished, "stage2-step-000003")[0] == finished.paths.checkpoint("stage2", 3)
    assert model_of(finished, "base")[0].name == "student"
    assert model_of(finished, "teacher")[0].name == "teacher"
    assert evaluated_labels(finished.recipe) == ["base", "stage1", "stage2", "teacher"]


def test_checkpoint_is_evaluated_on_the_named_benchmarks(copied: Run) -> None:
    results = evaluate_model(copied, "stage2-step-000003", ["validation"])
    assert set(results["benchmarks"]) == {"validation"}
    assert is_published(copied.paths.evaluation("stage2-step-000003"))


def test_no_teacher_to_evaluate(tmp_path: Path) -> None:
    run = open_tiny(tmp_path, "r", ["stage1=null", "stage2.objective=grpo", "stage2.beta=null", "teacher=null"])
    with pytest.raises(ModelError, match=r"no teacher to evaluate; set teacher\.path"):
        evaluate_model(run, "teacher")


def test_prompt_longer_than_the_evaluations_context(tmp_path: Path) -> None:
    run = open_tiny(tmp_path, "r", ["evaluation.max_context_tokens=8"])
    with pytest.raises(ModelError, match=r"evaluation of base: a prompt has \d+ tokens, the context 8; raise"):
        evaluate_model(run, "base")
    assert not run.paths.evaluation("base").exists()


def test_report_needs_the_evaluations(copied: Run) -> None:
    shutil.rmtree(copied.paths.evaluation("stage1"))
    shutil.rmtree(copied.paths.report)
    with pytest.raises(RunError, match="stage1 is not published"):
        make(copied, report)
    assert not copied.paths.report.exists()
