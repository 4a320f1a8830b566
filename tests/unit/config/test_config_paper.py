"""Shipped recipes against the paper: every field of Tables 3 and 5, appendix B and Section 4.1, number by number."""

import re
from pathlib import Path
from typing import Any

import pytest

from kdrl_core.config import Recipe, list_recipes, load_recipe, resolve_path
from kdrl_core.config.load import RECIPES_DIR
from kdrl_core.config.recipe import SFTConfig
from kdrl_core.objectives import BetaSchedule

MAIN_PROMPT = "{question} Let's think step by step and output the final answer within \\boxed{}."
ZERO_PROMPT = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."
SKYWORK = ["data/skywork-or1-math/*.parquet"]

# Rows that Tables 3 and 5 share between all columns.
COMMON = {
    "prompts_per_step": 64,
    "mini_batch_prompts": 64,
    "group_size": 16,
    "learning_rate": 1e-6,
    "max_prompt_tokens": 1024,
    "entropy_coef": 1e-3,
    "normalize_std": True,  # Eq. 2
}

# (recipe, stage): a column of Table 3 or Table 5, with the data rules of B.1.1 and B.3.
COLUMNS: dict[tuple[str, str], dict[str, Any]] = {
    ("paper-1.5b", "stage1"): {
        "student": "models/DeepSeek-R1-Distill-Qwen-1.5B",
        "objective": "grpo",
        "temperature": 0.6,
        "max_response_tokens": 8192,
        "steps": 500,
        "beta": None,
        "ref_beta": 1e-3,
        "ref_kl_estimator": "k3",  # low_var_kl
        "files": ["data/deepscaler.json"],
        "format": "deepscaler",
        "rules": {},
    },
    ("paper-1.5b", "stage2"): {
        "teacher": "models/Skywork-OR1-Math-7B",
        "objective": "kdrl",
        "temperature": 0.6,
        "max_response_tokens": 20480,
        "steps": 280,
        "beta": (5e-3, 5e-5, 1e-3),
        "ref_beta": 0.0,
        "kl_estimator": "k2",  # mse
        "kd_masking": "none",
        "files": SKYWORK,
        "format": "skywork",
        "rules": {"drop_passes_at_least": 15, "drop_all_failed": True, "max_unsolved_share": 0.10},
    },
    ("zero-teacher-7b", "stage1"): {
        "student": "models/Qwen2.5-7B",
        "teacher": None,
        "objective": "grpo",
        "temperature": 1.0,
        "max_response_tokens": 8192,
        "steps": 300,
        "beta": None,
        "ref_beta": 0.0,
        "files": SKYWORK,
        "format": "skywork",
        "rules": {"min_pass_rate": 0.25},
    },
    ("zero-3b", "stage2"): {
        "student": "models/Qwen2.5-3B",
        "teacher": "run:zero-teacher-7b",
        "objective": "kdrl",
        "temperature": 1.0,
        "max_response_tokens": 8192,
        "steps": 480,
        "beta": (2e-1, 8e-4, 2e-3),
        "ref_beta": 0.0,
        "kl_estimator": "k2",
        "kd_masking": "none",
        "files": SKYWORK,
        "format": "skywork",
        "rules": {"min_pass_rate": 0.50},
    },
}
RULES_OFF = {
    "drop_passes_at_least": None,
    "drop_all_failed": False,
    "max_unsolved_share": None,
    "min_pass_rate": None,
    "max_problems": None,
}
# recipe: (stages, prompt, require_format, evaluation context)
WHOLE = {
    "paper-1.5b": (("stage1", "stage2"), MAIN_PROMPT, True, 32768),
    "zero-teacher-7b": (("stage1",), ZERO_PROMPT, False, 8192),
    "zero-3b": (("stage2",), ZERO_PROMPT, False, 8192),
}
# Section 4.1: Avg@16 on the small sets, Pass@1 on the others.
BENCHMARKS = {"aime24": 16, "aime25": 16, "math500": 1, "amc23": 16, "minerva_math": 1, "olympiad_bench": 1}


def test_the_recipes_of_the_contract_are_shipped() -> None:
    assert {"miniature", "paper-1.5b", "zero-3b", "zero-teacher-7b"} <= set(list_recipes())


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_loads_and_is_named_after_its_file(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description


@pytest.mark.parametrize(("recipe", "stage"), COLUMNS)
def test_stage_is_its_column_of_the_paper(recipe: str, stage: str) -> None:
    loaded, column = load_recipe(recipe), {**COMMON, **COLUMNS[recipe, stage]}
    config = loaded.stage(stage)
    found: dict[str, Any] = config.model_dump()
    found |= {"files": config.data.files, "format": config.data.format, "student": loaded.student.path}
    found["teacher"] = loaded.teacher.path if loaded.teacher else None
    found["beta"] = (config.beta.init, config.beta.decay, config.beta.minimum) if config.beta else None
    found["rules"] = {k: v for k, v in config.data.model_dump().items() if k in RULES_OFF and v != RULES_OFF[k]}
    assert {name: found[name] for name in column} == column


@pytest.mark.parametrize(("recipe", "stage"), COLUMNS)
def test_every_field_of_the_tables_is_written_in_the_file_with_its_source(recipe: str, stage: str) -> None:
    lines = (RECIPES_DIR / f"{recipe}.yaml").read_text().split(f"\n{stage}:")[1].split("\n\n")[0].splitlines()
    for field in [*COMMON, "objective", "steps", "temperature", "max_response_tokens"]:
        if field == "normalize_std":
            continue
        written = [line for line in lines if line.startswith(f"  {field}:")]
        assert len(written) == 1, field
        assert "# Table" in written[0], field


@pytest.mark.parametrize("name", WHOLE)
def test_prompt_reward_and_evaluation_are_the_papers(name: str) -> None:
    stages, template, require_format, context = WHOLE[name]
    recipe = load_recipe(name)
    assert recipe.stages == stages
    assert recipe.prompt.template == template
    assert recipe.reward.require_format is require_format
    evaluation = recipe.evaluation
    assert {b.name: b.samples for b in evaluation.benchmarks} == BENCHMARKS
    assert [b.max_problems for b in evaluation.benchmarks] == [None] * 6
    assert (evaluation.temperature, evaluation.top_p, evaluation.max_context_tokens) == (0.6, 1.0, context)
    assert evaluation.periodic == ["aime24"]  # Figures 2-7
    assert (recipe.runtime.device, recipe.runtime.dtype) == ("cuda", "bfloat16")


@pytest.mark.parametrize("name", list_recipes())
def test_benchmarks_of_shipped_recipes_exist(name: str) -> None:
    for benchmark in load_recipe(name).evaluation.benchmarks:
        assert resolve_path(benchmark.file).is_file()


@pytest.mark.parametrize(("recipe", "floor_step"), [("paper-1.5b", 80), ("zero-3b", 248)])
def test_beta_reaches_its_floor_where_the_paper_has_it(recipe: str, floor_step: int) -> None:
    # main: (5e-3 - 1e-3) / 5e-5 = 80; Zero: (2e-1 - 2e-3) / 8e-4 = 247.5
    beta = load_recipe(recipe).stage("stage2").beta
    assert beta is not None
    schedule = BetaSchedule(beta.init, beta.decay, beta.minimum)
    assert schedule(floor_step) == pytest.approx(beta.minimum, rel=1e-12)
    assert schedule(floor_step - 1) > beta.minimum * 1.01
    assert schedule(10_000) == beta.minimum


@pytest.mark.parametrize("name", ["miniature", "miniature-study", "miniature-long"])
def test_the_miniatures_have_the_papers_structure(name: str) -> None:
    recipe = load_recipe(name)
    stage1, stage2 = recipe.stage("stage1"), recipe.stage("stage2")
    assert (stage1.objective, stage1.ref_beta, stage1.ref_kl_estimator, stage1.entropy_coef) == (
        "grpo",
        1e-3,
        "k3",
        1e-3,
    )
    assert (stage2.objective, stage2.kl_estimator, stage2.kd_masking, stage2.entropy_coef) == (
        "kdrl",
        "k2",
        "none",
        1e-3,
    )
    assert stage2.data.drop_passes_at_least == 15
    assert stage2.data.drop_all_failed
    assert stage2.data.max_unsolved_share == 0.1
    assert stage2.beta is not None
    assert stage2.beta.minimum < stage2.beta.init
    assert recipe.reward.require_format
    assert not set(recipe.evaluation.periodic) & {"test"}


B2 = SFTConfig(
    samples=8, keep="accuracy", batch_size=128, temperature=1.0, aggregation="response_mean", shard_prompts=64
)


def test_the_r1_zero_path_of_a_real_small_model_has_the_papers_structure() -> None:
    first, second = load_recipe("smollm2-zero-teacher"), load_recipe("smollm2-zero")
    teacher, student = first.stage("stage1"), second.stage("stage2")
    assert (first.stages, second.stages) == (("stage1",), ("stage2",))
    assert second.teacher is not None
    assert second.teacher.path == "run:smollm2-zero-teacher"
    assert second.student == first.student
    for name in ("zero-teacher-7b", "smollm2-zero-teacher"):  # GRPO, and no penalty to a reference
        config = load_recipe(name).stage("stage1")
        assert (config.objective, config.beta, config.ref_beta) == ("grpo", None, 0.0)
    papers = load_recipe("zero-3b").stage("stage2")
    same = ("objective", "kl_estimator", "kd_masking", "temperature", "entropy_coef", "ref_beta", "aggregation")
    assert [getattr(student, name) for name in same] == [getattr(papers, name) for name in same]
    assert student.beta is not None
    assert papers.beta is not None
    assert (student.beta.init, student.beta.minimum) == (papers.beta.init, papers.beta.minimum) == (0.2, 0.002)
    # the floor: 0.2 - 30 * 6.6e-3 = 0.002 after 30 of 60 steps; the paper's after 248 of 480
    assert student.objective_at(29).beta > student.objective_at(30).beta == pytest.approx(0.002, rel=1e-9)
    assert (teacher.data.min_pass_rate, student.data.min_pass_rate) == (0.05, 0.1)  # B.3: 0.25, 0.50
    assert teacher.data.files == student.data.files
    for recipe in (first, second):
        assert not recipe.reward.require_format
        assert recipe.evaluation.periodic == ["validation"]
        held_out = {benchmark.file for benchmark in recipe.evaluation.benchmarks}
        decontamination = recipe.stage(recipe.stages[0]).data.decontamination
        assert decontamination is not None
        assert held_out == set(decontamination.files)


BASELINES: list[tuple[str, list[str], dict[str, Any]]] = [
    ("paper-1.5b", ["stage2.beta={init: 2e-3}"], {"objective": "kdrl"}),
    ("paper-1.5b", ["stage2.objective=kd_rkl", "stage2.beta={init: 2e-3}"], {"objective": "kd_rkl"}),
    (
        "paper-1.5b",
        ["stage2.objective=sft", "stage2.learning_rate=2e-7"],
        {"objective": "sft", "learning_rate": 2e-7, "sft": B2},
    ),
    ("paper-1.5b", ["stage2.objective=grpo", "stage2.beta=null"], {"objective": "grpo", "beta": None}),
    ("paper-1.5b", ["stage2.kl_estimator=k3"], {"kl_estimator": "k3"}),
    ("paper-1.5b", ["stage2.kd_masking=response"], {"kd_masking": "response"}),
    ("paper-1.5b", ["stage2.objective=reward_shaping"], {"objective": "reward_shaping"}),
    ("zero-3b", ["stage2.objective=kd_rkl", "stage2.beta={init: 5e-3}"], {"objective": "kd_rkl"}),
]


@pytest.mark.parametrize(("name", "overrides", "expected"), BASELINES)
def test_baselines_and_ablations_are_overrides(name: str, overrides: list[str], expected: dict[str, Any]) -> None:
    stage = load_recipe(name, overrides).stage("stage2")
    assert {field: getattr(stage, field) for field in expected} == expected


@pytest.mark.parametrize(("name", "count"), [("paper-1.5b", 4), ("zero-3b", 1)])
def test_the_variants_in_a_recipes_comment_are_tested_overrides(name: str, count: int) -> None:
    comment = (RECIPES_DIR / f"{name}.yaml").read_text().partition("\nname:")[0].replace("\n# ", " ")
    shown = re.findall(r"--set \S+=(?:'[^']*'|[\w-]+)(?: --set \S+=(?:'[^']*'|[\w-]+))*", comment)
    overrides = [[part.replace("'", "") for part in variant.split("--set ")[1:]] for variant in shown]
    tested = [overrides for recipe, overrides, _ in BASELINES if recipe == name]
    assert len(overrides) == count
    for variant in overrides:
        assert [part.strip() for part in variant] in tested


def test_recipes_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert isinstance(load_recipe("miniature"), Recipe)
