"""A run that trains an adapter: small checkpoints, the merged model where somebody reads it, the same bytes again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from crash.tiny_run import differing, open_tiny, train
from support import benchmarks

from kdrl_core.boxes.check import check_run
from kdrl_core.boxes.completion import student
from kdrl_core.boxes.evaluate import evaluate_model
from kdrl_core.boxes.frozen_policy import FrozenPolicy
from kdrl_core.boxes.make import make
from kdrl_core.boxes.session import StageSession
from kdrl_core.config import ModelConfig, load_recipe, resolve_path
from kdrl_core.engines.transformers_engines import TransformersScorer
from kdrl_core.errors import ModelError, RunError
from kdrl_core.ledger import Run
from kdrl_core.look.planning.cluster import engines_of
from kdrl_core.models.loading import check_model_dir, load_model
from kdrl_core.tables.files import load_metrics, ragged, read_table, score_requests

pytest.importorskip("peft", reason="needs the extra lora: pip install -e .[lora]")
pytestmark = pytest.mark.usefixtures("fast_sessions")

LORA = [
    "student.lora={rank: 4, alpha: 8}",
    "stage2.steps=4",
    "stage2.checkpoint.every=2",
    "stage2.evaluate_every=3",
    "evaluation.periodic=[]",
    *(f"{stage}.{field}" for stage in ("stage1", "stage2") for field in ("ref_beta=0.01", "learning_rate=0.01")),
    benchmarks("test", samples=1, max_problems=2),
]


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, type]]:
    """Scorers of the initial policy and of the teacher, as sessions make them."""
    made: list[tuple[str, type]] = []
    own = StageSession.scorer

    def scorer(self: StageSession, role: str) -> Any:
        found = own(self, role)
        made.append((role, type(found)))
        return found

    monkeypatch.setattr(StageSession, "scorer", scorer)
    return made


def model_files(run: Run) -> list[str]:
    return sorted(run.paths.relative(file) for file in run.paths.root.rglob("model.safetensors"))


def test_a_run_with_an_adapter(tmp_path: Path, scored: list[tuple[str, type]]) -> None:
    run = open_tiny(tmp_path, "whole", LORA)
    train(run)
    make(run, student)
    evaluate_model(run, "stage2-step-000003")
    assert check_run(run).findings == []
    assert model_files(run) == [
        "checkpoints/stage1/step-000002/model.safetensors",
        "checkpoints/stage2/step-000003/model.safetensors",
        "checkpoints/stage2/step-000004/model.safetensors",
        "student/model.safetensors",
    ]
    small = run.paths.checkpoint("stage2", 2)
    assert {file.name for file in small.iterdir()} == {"adapter", "trainer", "manifest.json"}
    with pytest.raises(ModelError, match="is a checkpoint of an adapter without its model; give the run's folder stud"):
        check_model_dir(ModelConfig(path=str(small)), role="student")

    # The initial policy: the base for stage 1, the result of stage 1 for stage 2.
    assert set(scored) == {("reference", FrozenPolicy), ("teacher", TransformersScorer)}
    for stage in run.recipe.stages:
        rows = load_metrics(run, stage)
        assert rows[0]["ref/kl"] == 0.0 < rows[-1]["ref/kl"]
        assert max(row["engine/logprob_gap_max"] for row in rows) < 1e-4
    base = load_model(resolve_path(run.recipe.student.path))
    scorer = TransformersScorer(base, temperature=run.recipe.stage("stage1").temperature, batch_tokens=65_536)
    expected = scorer.score(score_requests(read_table(run.paths.rollouts("stage1", 1))))
    found = ragged(read_table(run.paths.reference("stage1", 1))["ref_logprobs"])
    assert all((ours == theirs).all() for ours, theirs in zip(found, expected, strict=True))

    from peft import PeftModel

    ids = torch.tensor([[2, 8, 17, 9, 3, 4]])
    with torch.no_grad():
        merged = load_model(run.paths.student)(input_ids=ids).logits
        own = PeftModel.from_pretrained(base, run.paths.student / "adapter")(input_ids=ids).logits
    torch.testing.assert_close(merged, own, rtol=1e-4, atol=1e-4)

    stopped = open_tiny(tmp_path / "b", "whole", LORA)
    train(stopped, until=("stage2", 1))
    train(open_tiny(tmp_path / "b", "whole", LORA))  # step 0 of stage 2 has no checkpoint, so it is replayed
    make(stopped, student)
    evaluate_model(stopped, "stage2-step-000003")
    assert differing(run, stopped) == []
    with pytest.raises(RunError, match=r"student\.lora\.rank"):
        open_tiny(tmp_path / "b", "whole", [*LORA, "student.lora.rank=8"])


def test_a_teacher_that_is_the_base_is_no_second_model(tmp_path: Path, scored: list[tuple[str, type]]) -> None:
    """The bits are those of a model that is loaded, in the stage too that begins with an adapter."""
    run = open_tiny(tmp_path, "base", [*LORA, "teacher.path=builtin:miniature/student"])
    train(run)
    assert set(scored) == {("reference", FrozenPolicy), ("teacher", FrozenPolicy)}
    temperature = run.recipe.stage("stage2").temperature
    base = load_model(resolve_path("builtin:miniature/student"))
    scorer = TransformersScorer(base, temperature=temperature, batch_tokens=65_536)
    expected = scorer.score(score_requests(read_table(run.paths.rollouts("stage2", 1))))
    found = ragged(read_table(run.paths.teacher("stage2", 1))["teacher_logprobs"])
    assert all((ours == theirs).all() for ours, theirs in zip(found, expected, strict=True))
    initial = ragged(read_table(run.paths.reference("stage2", 1))["ref_logprobs"])
    assert any((ours != theirs).any() for ours, theirs in zip(found, initial, strict=True))


@pytest.mark.parametrize(
    ("overrides", "roles"),
    [
        ([], {"reference"}),
        (["teacher.path=builtin:miniature/student"], {"reference", "teacher"}),
        (["teacher.path=builtin:miniature/student", "teacher.engine=vllm"], {"reference"}),
        (["teacher.path=builtin:miniature/student", "stage2.kl_estimator=topk"], {"reference"}),
        (["teacher.path=builtin:miniature/student", "student.lora=null"], set()),
    ],
)
def test_which_roles_the_trainer_of_an_adapter_fills(overrides: list[str], roles: set[str]) -> None:
    recipe = load_recipe("miniature", [*LORA, *overrides])
    assert set(engines_of(recipe).of_trainer) == roles
