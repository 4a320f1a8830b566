"""Shapes, placements, reasons and remedies; the tables of docs/scaling.md."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from kdrl_core.config import LoraConfig, ModelConfig, load_recipe
from kdrl_core.errors import ModelError, RecipeError
from kdrl_core.look.planning.cluster import Cluster, Engines, work_of
from kdrl_core.look.planning.cost import Rates, gradient_traffic, step_time
from kdrl_core.look.planning.memory import trainer_states, update_components
from kdrl_core.look.planning.placement import KV_CACHE, Placement
from kdrl_core.look.planning.scaling import tables
from kdrl_core.look.planning.shapes import KNOWN_SHAPES, shape_from_config, shape_of
from kdrl_core.look.planning.stage_plan import StagePlan, plan_stage

DOC = Path(__file__).parents[3] / "docs" / "scaling.md"
TINY: dict[str, Any] = {
    "vocab_size": 70,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def cluster(gpus: int = 8, memory: float = 80e9, **changes: Any) -> Cluster:
    return Cluster(gpus=gpus, gpus_per_node=min(gpus, 8), gpu_memory=memory, **changes)


def planned(stage: str = "stage2", recipe: str = "paper-1.5b", **changes: Any) -> StagePlan:
    engines = Engines(**{name: changes.pop(name) for name in list(changes) if name in Engines.__slots__})
    return plan_stage(work_of(load_recipe(recipe), stage), engines, cluster(**changes))


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(**TINY, tie_word_embeddings=True),
        Qwen2Config(**TINY, tie_word_embeddings=False),
        Qwen3Config(**TINY, head_dim=8, tie_word_embeddings=False),
        Qwen3Config(**TINY, head_dim=8, attention_bias=True),
        LlamaConfig(**TINY, attention_bias=True, mlp_bias=True),
        LlamaConfig(**TINY, tie_word_embeddings=True),
        MistralConfig(**TINY, head_dim=6),
    ],
    ids=lambda config: config.model_type,
)
def test_parameters_are_those_of_the_model(config: Any) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape_from_config(config, name="tiny").parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "billions"),  # as their model cards say
    [
        ("DeepSeek-R1-Distill-Qwen-1.5B", 1.78),
        ("Skywork-OR1-Math-7B", 7.62),
        ("Qwen2.5-0.5B", 0.49),
        ("Qwen2.5-1.5B", 1.54),
        ("Qwen2.5-3B", 3.09),
        ("Qwen2.5-7B", 7.62),
        ("SmolLM2-135M", 0.135),
    ],
)
def test_known_models_have_their_published_size(name: str, billions: float) -> None:
    assert KNOWN_SHAPES[name].parameters / 1e9 == pytest.approx(billions, abs=0.006)


def test_kv_cache_and_flops_of_the_student_by_hand() -> None:
    shape = KNOWN_SHAPES["DeepSeek-R1-Distill-Qwen-1.5B"]
    assert shape.kv_bytes_per_token(2) == 2 * 28 * 2 * 128 * 2
    without_embedding = 1_777_088_000 - 151_936 * 1536  # 1,543,714,304
    assert shape.forward_flops(1, context=1000) == pytest.approx(2 * without_embedding + 2 * 28 * 12 * 128 * 1000)
    once, again = (shape.update_flops(1, context=0, is_checkpointed=checkpointed) for checkpointed in (False, True))
    head = 2 * 151_936 * 1536
    assert (once - head) == pytest.approx(6 * without_embedding)
    assert (again - head) == pytest.approx(8 * without_embedding)


def test_every_shipped_recipe_has_a_plan() -> None:
    for name in ("paper-1.5b", "zero-3b", "zero-teacher-7b"):
        for stage in load_recipe(name).stages:
            assert planned(stage, name).best is not None, (name, stage)


def test_a_directory_goes_before_a_name(tmp_path: Path) -> None:
    folder = tmp_path / "Qwen2.5-3B"
    folder.mkdir()
    (folder / "config.json").write_text(Qwen2Config(**TINY).to_json_string())
    assert shape_of(ModelConfig(path=str(folder)), role="student").hidden == 24
    assert shape_of(ModelConfig(path="models/Qwen2.5-3B"), role="student").hidden == 2048


def test_models_that_cannot_be_planned_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"teacher.path=models/unheard: .* give a model directory"):
        shape_of(ModelConfig(path="models/unheard"), role="teacher")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ModelError, match="model_type gpt2 is not known to kdrl"):
        shape_of(ModelConfig(path=str(tmp_path)), role="student")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        shape_of(ModelConfig(path=str(tmp_path)), role="student")


def test_zero_cuts_what_it_says() -> None:
    def update(stage: int) -> dict[str, float]:
        plan = planned(zero_stage=stage, memory=1e12)
        colocated = next(one for one in plan.candidates if not one.placement.is_split)
        return next(phase.components for phase in colocated.memory if phase.phase == "update")

    size = KNOWN_SHAPES["DeepSeek-R1-Distill-Qwen-1.5B"].parameters
    whole, two, three = update(0), update(2), update(3)
    names = ("trainer weights", "optimizer", "gradients")
    assert [whole[name] / size for name in names] == [4, 8, 4]
    assert [two[name] / size for name in names] == pytest.approx([2, 12 / 8, 4 / 8])
    assert [three[name] / size for name in names] == pytest.approx([2 / 8, 12 / 8, 4 / 8])


def test_what_does_not_fit_is_told_with_what_would() -> None:
    plan = planned(is_checkpointed=False)
    assert plan.best is None
    assert plan.hours is None
    assert "does not fit, because update needs" in plan.candidates[0].reason
    assert "activations" in plan.candidates[0].reason
    assert "--set trainer.activation_checkpointing=true" in plan.remedies
    assert planned(is_checkpointed=True).best is not None  # the remedy holds
    assert "GPUs with 96 GB" in plan.remedies
    assert planned(is_checkpointed=False, memory=96e9).best is not None


def test_remedies_are_combined_where_none_does_alone() -> None:
    plan = planned(stage="stage1", gpus=2, memory=16e9)
    assert plan.best is None
    together = "stage1.micro_batch_tokens=9216 trainer.zero_stage=3 trainer.offload_optimizer=true"
    assert " ".join(f"--set {each}" for each in together.split()) in plan.remedies
    work = replace(plan.work, micro_batch_tokens=9216)
    engines = Engines(zero_stage=3, offloads_optimizer=True)
    assert plan_stage(work, engines, cluster(2, 16e9)).best is not None


def test_the_kv_cache_takes_what_is_left_and_one_sequence_at_least() -> None:
    def rollout(memory: float) -> Any:
        return next(phase for phase in planned(memory=memory).candidates[0].memory if phase.phase == "rollout")

    one = (1024 + 20_480) * 28_672
    assert rollout(80e9).total == pytest.approx(0.9 * 80e9)
    assert rollout(80e9).sequences == int(rollout(80e9).components[KV_CACHE] / one) == 99
    assert rollout(288e9).sequences == 128  # 1,024 responses on 8 GPUs
    assert rollout(4e9).components[KV_CACHE] == one


def test_a_split_teacher_scores_while_others_generate() -> None:
    plan = planned()
    split = next(one for one in plan.candidates if one.placement == Placement(student_gpus=4, teacher_gpus=4))
    assert split.time.teacher_score == 0.0
    where = {phase.phase: phase.gpus for phase in split.memory}
    assert where["teacher-score"] == "teacher GPUs"
    assert where["update"] == "student GPUs"
    assert all("teacher weights" not in p.components for p in split.memory if p.gpus == "student GPUs")


def test_rates_that_are_given_are_used() -> None:
    work = work_of(load_recipe("paper-1.5b"), "stage2", mean_response=1000, mean_prompt=100)
    rates = Rates(rollout_tokens_per_s=2000, score_flops=1e14, update_flops=2e14)
    time = step_time(work, Engines(), cluster(), Placement(student_gpus=8), rates)
    assert time.rollout == pytest.approx(1024 * 1000 / (8 * 2000))
    assert work.teacher is not None
    tokens = 1024 * 1100 / 8
    assert time.teacher_score == pytest.approx(work.teacher.forward_flops(tokens, context=work.attended) / 1e14)
    expected = work.student.update_flops(tokens, context=work.attended, is_checkpointed=True) / 2e14
    assert time.update == pytest.approx(expected)
    in_turn = step_time(replace(work, updates=4), Engines(), cluster(), Placement(student_gpus=8), rates)
    observed = work.student.forward_flops(0.75 * tokens, context=work.attended) / 2e14
    assert in_turn.update == pytest.approx(expected + observed)


def test_collectives_by_hand() -> None:
    work = work_of(load_recipe("paper-1.5b"), "stage2")
    weights = 2 * work.student.parameters * 7 / 8
    micro_batches = -(-int(1024 * (8192 + 256) / 8) // 22_528)
    assert gradient_traffic(work, Engines(zero_stage=0), 8) == 2 * 4 * work.student.parameters * 7 / 8
    assert gradient_traffic(work, Engines(zero_stage=2), 8) == (micro_batches + 1) * weights
    assert gradient_traffic(work, Engines(zero_stage=3), 8) == 3 * micro_batches * weights


@pytest.mark.parametrize(
    ("gpus", "changes", "message"),
    [
        (12, {}, "do not fill whole nodes of 8"),
        (8, {"tensor_parallel": 3}, "does not divide 8 GPUs"),
        (8, {"tensor_parallel": 8}, "student's 12 attention heads"),
        (8, {"rollout": "transformers", "teacher": "transformers", "trainer": "torch"}, "one process on one GPU"),
        (1, {"rollout": "server"}, "have GPUs of their own, .* plan --gpus 2 or more"),
        (8, {"kv_cache_bytes": 2.0**29}, r"vllm.kv_cache_gb=0.5 is less than .* set it to 0.88 or more"),
    ],
)
def test_gpus_that_cannot_be_used_are_refused(gpus: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        planned(gpus=gpus, **changes)


def test_work_that_cannot_be_planned_is_refused() -> None:
    with pytest.raises(RecipeError, match="above the recipe's limit of 20480"):
        work_of(load_recipe("paper-1.5b"), "stage2", mean_response=30_000)
    long = load_recipe("zero-3b", ["stage2.max_response_tokens=40000"])
    with pytest.raises(RecipeError, match=r"41024 tokens, but Qwen2.5-3B \(student\) has 32768"):
        plan_stage(work_of(long, "stage2"), Engines(), cluster())


@pytest.mark.parametrize("name", ["models", "time", "engines", "traffic", "memory"])
def test_the_tables_of_the_page_on_scaling_are_computed(name: str) -> None:
    assert tables()[name] in DOC.read_text(encoding="utf-8"), "run: python -m kdrl_core.look.planning.scaling"


def test_an_adapter_alone_has_gradients_and_moments() -> None:
    """Qwen2.5-3B, 36 layers: hidden 2048, q and o 2048, k and v 2 × 128 = 256, MLP 11,008. Rank 8 on all linear layers:
    8 · 36 · (q 4096 + k 2304 + v 2304 + o 4096 + 3 · 13,056) = 288 · 51,968 = 14,966,784 numbers."""
    shape, lora = KNOWN_SHAPES["Qwen2.5-3B"], LoraConfig(rank=8)
    assert shape.adapter_parameters(lora) == 14_966_784
    assert shape.adapter_parameters(LoraConfig(rank=8, targets=["q_proj", "self_attn.v_proj"])) == 288 * (4096 + 2304)
    assert shape.trained_parameters(None) == shape.parameters
    with pytest.raises(ModelError, match=r"a plan knows q_proj, .*, and no c_attn"):
        shape.adapter_parameters(LoraConfig(targets=["c_attn"]))

    settings = Engines(trainer="torch", lora=lora).training(1)
    assert settings.precision == "bfloat16"
    held = update_components(shape, settings, micro_batch_tokens=4096, longest=4096)
    assert held["trainer weights"] == 2 * (shape.parameters + 14_966_784)
    assert held["optimizer"] == 12 * 14_966_784
    assert held["gradients"] == 4 * 14_966_784
    assert "gradients in flight" not in held
    sharded = Engines(lora=lora, zero_stage=3).training(8)
    assert trainer_states(shape, sharded)["optimizer"] == 12 * 14_966_784 / 8


def test_a_trainer_with_an_adapter_scores_with_the_initial_policy_itself() -> None:
    def reference(**changes: Any) -> dict[str, float]:
        chosen = planned("stage1", gpus=1, trainer="torch", **changes).candidates[0]
        return next(phase for phase in chosen.memory if phase.phase == "reference-score").components

    told = json.loads(json.dumps(planned("stage1", lora=LoraConfig(rank=4)).to_json()))
    assert told["assumed"]["engines"]["lora"]["rank"] == 4
    assert "reference weights" in reference()
    assert "reference weights" not in reference(lora=LoraConfig(), of_trainer=("reference",))
