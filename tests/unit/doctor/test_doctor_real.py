"""The doctor does a step for real here, as on a GPU node: the engines, ranks and workers of a recipe, random weights.

A model of 0.1B parameters at Qwen's vocabulary is tried in this process, which has imported torch already.
"""

import json
import re
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from parity.ranks import needs_deepspeed
from vllm_models import needs_vllm

from kdrl_core.config import Recipe, load_recipe
from kdrl_core.config.load import validate_recipe
from kdrl_core.engines.transformers_engines import TransformersRolloutEngine
from kdrl_core.look.doctor import child, machine, random_models
from kdrl_core.look.doctor.checks import CheckResult, Recorder
from kdrl_core.look.doctor.examine import examine
from kdrl_core.look.planning.shapes import KNOWN_SHAPES, shape_of
from kdrl_core.training.rank_group import WORKER

MINIATURE = load_recipe("miniature")
STEP = [
    *("random models", "checks before a run", "run opened"),
    *("student's engine starts", "trainer starts", "weight sync", "sampling", "engine sleeps"),
    *("teacher starts", "teacher scores", "teacher sleeps", "verification"),
    *("update, longest rows", "update, mixed rows", "sync after the updates"),
    *("checkpoint saved", "checkpoint loaded", "student exported", "all processes end"),
]


@pytest.fixture(autouse=True)
def little_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_MOST_WRITTEN", 16 * 2**20)


def attempt(recipe: Recipe, folder: Path) -> dict[str, CheckResult]:
    """What the child process does, in this one."""
    (folder / "artifacts").mkdir()
    recorder = Recorder(lambda event: None)
    child.try_recipe(recipe, folder / "artifacts", (), recorder)
    return {each.check: each for each in recorder.results}


def failed(results: dict[str, CheckResult]) -> list[str]:
    return [name for name, each in results.items() if each.status == "failed"]


def write_configs(folder: Path) -> None:
    """Two models of Qwen2's architecture at its vocabulary, of which only config.json is there. The student has 0.1B
    parameters; the teacher's embedding is padded otherwise, as Qwen's is in another size."""
    sizes = {"student": (640, 1, 151_936, True), "teacher": (64, 2, 152_064, False)}
    for role, (hidden, layers, vocabulary, tied) in sizes.items():
        values = {
            "model_type": "qwen2",
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 32,
            "num_key_value_heads": hidden // 64,
            "max_position_embeddings": 64,
            "tie_word_embeddings": tied,
            "dtype": "bfloat16",
        }
        (folder / role).mkdir()
        (folder / role / "config.json").write_text(json.dumps(values))


def test_the_miniature_and_a_report_without_places(tmp_path: Path) -> None:
    begun: list[str] = []
    folder = tmp_path / "artifacts"

    def watch(event: dict[str, Any]) -> None:
        if event["event"] == "begin":
            begun.append(event["check"])

    report = examine(MINIATURE, folder=folder, on_event=watch).to_json()
    assert report["failed"] == []
    assert [each["check"] for each in report["checks"] if each["check"] in STEP] == [
        *STEP[:3], "student's engine starts", "weight sync", "trainer starts", *STEP[6:],
    ]  # fmt: skip
    assert set(STEP) <= set(begun)
    assert report["versions"]["torch"]
    assert str(tmp_path) not in json.dumps(report)
    assert not folder.exists()


@needs_vllm
@needs_deepspeed
def test_vllm_with_ranks_of_which_one_dies_at_the_end(tmp_path: Path) -> None:
    def kill_a_rank(event: dict[str, Any]) -> None:
        if event["event"] == "begin" and event["check"] == "student exported":
            below = psutil.Process().children(recursive=True)
            ranks = [each for each in below if WORKER in each.cmdline() and "launch" not in " ".join(each.cmdline())]
            ranks[-1].kill()

    diagnosis = examine(load_recipe("miniature-vllm"), folder=tmp_path / "artifacts", on_event=kill_a_rank)
    results = {each.check: each for each in diagnosis.checks}
    assert diagnosis.failed == ["student exported"]
    assert [name for name in results if name in STEP] == STEP
    assert re.search(
        r": rank 1 \(pid \d+ on .*\) (ended with signal SIGKILL|is gone)", results["student exported"].says
    )
    assert "return code = -9" in results["student exported"].figures["log"]  # the launcher's words
    assert str(results["student exported"].remedy).startswith("the host's memory ran out")
    assert results["collective of the ranks"].figures["bytes"] == 4 * 2**20
    assert results["weight sync"].figures["gap_mean"] < 1e-5
    assert results["sync after the updates"].figures["moved"] > 1e-2
    assert not (tmp_path / "artifacts").exists()
    assert not [each for each in psutil.Process().children(recursive=True) if WORKER in each.cmdline()]


@pytest.mark.usefixtures("fast_sessions")
def test_a_tenth_of_a_billion_parameters_at_the_vocabulary_of_qwen(tmp_path: Path) -> None:
    write_configs(tmp_path)
    stage = {
        "objective": "kdrl",
        "beta": {"init": 0.002},
        "data": {"files": ["no/such/file.parquet"]},
        "steps": 280,
        "prompts_per_step": 64,
        "mini_batch_prompts": 64,
        "group_size": 16,
        "learning_rate": 1e-6,
        "temperature": 0.6,
        "max_prompt_tokens": 16,
        "max_response_tokens": 8,
        "entropy_coef": 0.001,
        "micro_batch_tokens": 512,
    }
    values = {
        "name": "tenth",
        "student": {"path": str(tmp_path / "student")},
        "teacher": {"path": str(tmp_path / "teacher")},
        "stage2": stage,
        "evaluation": {"benchmarks": [{"name": "none", "file": "no/such/file.jsonl"}]},
    }
    recipe = validate_recipe(values, origin="tenth")
    assert shape_of(recipe.student, role="student").parameters == pytest.approx(1e8, rel=0.1)
    results = attempt(recipe, tmp_path)
    assert failed(results) == []
    assert results["sampling"].figures["tokens"] == 8 * 8
    assert results["checkpoint saved"].figures["bytes"] == pytest.approx(12 * 1e8, rel=0.1)
    assert results["sync after the updates"].figures["moved"] > 0.05


@pytest.mark.usefixtures("fast_sessions")
def test_a_stale_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that says it has loaded the weights, and keeps the old ones."""
    monkeypatch.setattr(TransformersRolloutEngine, "load_weights", lambda self, folder: None)
    results = attempt(MINIATURE, tmp_path)
    assert failed(results) == ["sync after the updates"]
    stale = results["sync after the updates"]
    assert stale.says.startswith("a stale engine: it samples ")
    assert stale.says.endswith("so the engine kept its old weights")
    assert stale.figures["gap_mean"] == pytest.approx(stale.figures["moved"], rel=0.5)


@needs_vllm
def test_a_cache_that_is_too_small(tmp_path: Path) -> None:
    results = attempt(load_recipe("miniature-vllm", ["vllm.kv_cache_gb=0.00001"]), tmp_path)
    assert failed(results) == ["checks before a run"]
    assert "field 'vllm.kv_cache_gb': 1e-05 GiB" in results["checks before a run"].says
    assert "raise it to " in results["checks before a run"].says


@pytest.mark.parametrize("fault", ["killed", "hangs"])
def test_a_child_that_the_kernel_kills_or_that_hangs(tmp_path: Path, fault: str) -> None:
    """The check under way is named, and nothing is left."""

    def hurt(event: dict[str, Any]) -> None:
        if event["event"] == "begin" and event["check"] == "libraries load":
            children = psutil.Process().children(recursive=True)
            process = next(each for each in children if child.__name__ in each.cmdline() and "-I" not in each.cmdline())
            process.send_signal(signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
            event["limit_s"] = 1.0

    diagnosis = examine(MINIATURE, folder=tmp_path / "artifacts", on_event=hurt)
    assert diagnosis.failed == ["libraries load"]
    last = diagnosis.checks[-1]
    if fault == "killed":
        assert last.says.startswith("the process ended with signal SIGKILL, which the kernel sends when memory has run")
        assert str(last.remedy).startswith("the host's memory ran out")
    else:
        assert last.says == "no end within 1 s: it hangs, or this machine is very slow"
    assert not (tmp_path / "artifacts").exists()
    assert not [each for each in psutil.Process().children(recursive=True) if child.__name__ in each.cmdline()]


@pytest.mark.parametrize("name", ["DeepSeek-R1-Distill-Qwen-1.5B", "SmolLM2-135M"])
def test_random_models_have_the_parameters_of_published_ones(name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    shape = KNOWN_SHAPES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(random_models._published_config(shape))
    assert model.num_parameters() == shape.parameters
