"""The assets can be built again, from one seed, and the shipped models are what the demo needs them to be."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from kdrl_core.config import BenchmarkConfig, ModelConfig, resolve_path
from kdrl_core.data.benchmarks import load_benchmark
from kdrl_core.engines.transformers_engines import TransformersRolloutEngine
from kdrl_core.ledger import derive_seed
from kdrl_core.miniature.build import MODELS, build
from kdrl_core.miniature.models import MiniatureModel
from kdrl_core.models.loading import check_model_dir, compare_tokenizers, load_model, load_tokenizer, stop_token_ids
from kdrl_core.types import FinishReason, RolloutRequest

FILES = {
    "stage1.json",
    "stage2.parquet",
    *(f"benchmarks/{name}.jsonl" for name in ("validation", "test", "hard", "ood")),
    *(
        f"{model}/{name}"
        for model in ("student", "teacher", "teacher-weak", "teacher-broad")
        for name in ("model.safetensors", "config.json")
    ),
}


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def barely_trained(sft_steps: int) -> dict[str, tuple[MiniatureModel, int]]:
    return {name: (replace(spec, sft_steps=sft_steps), seed) for name, (spec, seed) in MODELS.items()}


def sampled_accuracy(assets: Path, model: str, *, num_problems: int = 128) -> float:
    """Share of right responses at temperature 1, four to a problem of the validation benchmark."""
    path = assets / model
    tokenizer, loaded = load_tokenizer(path), load_model(path)
    problems = load_benchmark(BenchmarkConfig(name="v", file=str(assets / "benchmarks" / "validation.jsonl")))
    engine = TransformersRolloutEngine(
        loaded,
        tokenizer,
        stop_ids=stop_token_ids(loaded, tokenizer),
        temperature=1.0,
        max_response_tokens=64,
        batch_size=256,
    )
    requests = [
        RolloutRequest(
            prompt_id=problem.answer,
            sample=sample,
            prompt_token_ids=tokenizer.encode(f"<|user|>{problem.question}<|assistant|>", add_special_tokens=False),
            seed=derive_seed("shipped", problem.question, sample),
        )
        for problem in problems[:num_problems]
        for sample in range(4)
    ]
    rollouts = engine.generate(requests)
    right = [
        rollout.finish_reason is FinishReason.STOP and rollout.text.endswith(f"\\boxed{{{rollout.prompt_id}}}")
        for rollout in rollouts
    ]
    return sum(right) / len(right)


@pytest.mark.slow  # two minutes; others hold the shipped models
def test_two_builds_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        build(tmp_path / name, models=barely_trained(4), scale=0.02)
    found = digests(tmp_path / "first")
    assert set(found) >= FILES
    assert found == digests(tmp_path / "second")


@pytest.mark.slow
def test_built_models_fit_each_other(tmp_path: Path) -> None:
    build(tmp_path, models=barely_trained(1), scale=0.01)
    for name in ("student", "teacher", "teacher-weak", "teacher-broad"):
        check_model_dir(ModelConfig(path=str(tmp_path / name)), role=name)
        assert load_tokenizer(tmp_path / name).chat_template
        compare_tokenizers(tmp_path / "student", tmp_path / name)


def test_shipped_assets_have_room_to_learn() -> None:
    """A student that is right now and then, a teacher that is clearly better: otherwise there is nothing to show."""
    assets = resolve_path("builtin:miniature/student").parent
    student, teacher = sampled_accuracy(assets, "student"), sampled_accuracy(assets, "teacher")
    assert 0.15 < student < 0.6
    assert teacher > student + 0.15
    assert student + 0.1 < sampled_accuracy(assets, "teacher-weak") < teacher - 0.1
    # The study's (docs/findings.md): better than the student and not perfect, in two ways of working a chain.
    assert max(0.6, student + 0.15) < sampled_accuracy(assets, "teacher-broad") < 0.95


def test_shipped_assets_are_small_enough_to_commit() -> None:
    assets = resolve_path("builtin:miniature/student").parent
    assert set(digests(assets)) >= FILES
    sizes = [path.stat().st_size for path in assets.rglob("*") if path.is_file()]
    assert max(sizes) < 2e6
    assert sum(sizes) < 4.5e6


@pytest.mark.slow
def test_full_rebuild_gives_models_in_the_expected_ranges(tmp_path: Path) -> None:
    build(tmp_path)
    student, teacher = sampled_accuracy(tmp_path, "student"), sampled_accuracy(tmp_path, "teacher")
    assert 0.15 < student < 0.6
    assert teacher > max(0.6, student + 0.15)
