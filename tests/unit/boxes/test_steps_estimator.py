"""An estimator of one's own through two real steps: it trains, and update.parquet holds what it says."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from crash.tiny_run import open_tiny, train

from kdrl_core.errors import RecipeError, RunError
from kdrl_core.ledger import Run, outside_of
from kdrl_core.objectives import register_estimator
from kdrl_core.tables.files import load_metrics

ONE_STAGE = ["stage1=null", "stage2.steps=2"]
CODE = "def hinge(log_ratio):\n    return (-log_ratio).clamp(min=0)\n"


@pytest.fixture
def name(request: pytest.FixtureRequest, tmp_path: Path, own_estimators: None) -> str:
    """The estimator as a recipe names it: registered, or in a file."""
    (tmp_path / "mine.py").write_text(CODE)
    if request.param == "registered":
        register_estimator("mine", lambda log_ratio: (-log_ratio).clamp(min=0), expectation=torch.abs)
        return "mine"
    return f"{tmp_path / 'mine.py'}:hinge"


@pytest.mark.usefixtures("fast_sessions")
@pytest.mark.parametrize("name", ["registered", "file"], indirect=True)
def test_it_trains_and_is_recorded(name: str, tmp_path: Path) -> None:
    run = open_tiny(tmp_path, "r", [*ONE_STAGE, f"stage2.kl_estimator={name}"])
    train(run)
    for step, metrics in enumerate(load_metrics(run, "stage2")):
        log_ratios, lengths, recorded = read(run, step)
        hinge = np.concatenate([np.maximum(-each, 0.0) for each in log_ratios])
        assert metrics["kd/kl"] == pytest.approx(hinge.mean(), rel=1e-4)
        expected = [np.abs(each).sum() if name == "mine" else np.maximum(-each, 0.0).sum() for each in log_ratios]
        np.testing.assert_allclose(recorded, expected, rtol=1e-4, atol=1e-5)
        assert len(hinge) == sum(lengths)


def read(run: Run, step: int) -> tuple[list[np.ndarray], list[int], list[float]]:
    """R of each token by the trainer's logprobs, the lengths, and the recorded sums."""
    folder = run.paths.step("stage2", step)
    update = pq.ParquetFile(folder / "update.parquet").read().to_pydict()
    teacher = pq.ParquetFile(folder / "teacher.parquet").read().to_pydict()["teacher_logprobs"]
    log_ratios = [np.array(t) - np.array(s) for t, s in zip(teacher, update["logprobs"], strict=True)]
    return log_ratios, [len(row) for row in log_ratios], update["kl_sum"]


@pytest.mark.usefixtures("fast_sessions")
def test_a_term_is_named_in_the_manifest_and_another_is_refused(tmp_path: Path, own_estimators: None) -> None:
    (file := tmp_path / "mine.py").write_text("def term(responses):\n    return responses.entropy\n")
    began = hashlib.sha256(file.read_bytes()).hexdigest()
    run = open_tiny(tmp_path, "r", [*ONE_STAGE, f"stage2.terms=[{{function: '{file}:term', coefficient: 0.1}}]"])
    train(run, until=("stage2", 1))
    (metrics,) = load_metrics(run, "stage2")
    assert metrics["term/term"] == pytest.approx(metrics["entropy"], rel=1e-6)
    told = outside_of(run)["stage2.terms.0.function"]
    assert (told["path"], [each["sha256"] for each in told["files"].values()]) == (f"{file}:term", [began])
    file.write_text("def term(responses):\n    return -responses.entropy\n")
    now = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(RunError, match=rf"stage2.terms.0.function=.*sha256 {now[:12]}…, recorded was {began[:12]}…"):
        train(run)


def test_a_run_is_refused_before_it_begins_when_the_file_is_not_there(tmp_path: Path) -> None:
    from kdrl_core.boxes.preflight import check_inputs
    from kdrl_core.config import load_recipe

    name = f"{tmp_path / 'nowhere.py'}:hinge"
    for field, value in (
        ("kl_estimator", f"stage2.kl_estimator={name}"),
        ("terms.0.function", f"stage2.terms=[{{function: '{name}', coefficient: 1.0}}]"),
    ):
        recipe = load_recipe("miniature", [value])
        with pytest.raises(RecipeError, match=rf"field 'stage2.{field}': .*nowhere.py does not exist; correct"):
            check_inputs(recipe)
