"""Shipped sweeps against the paper: every variant on every recipe, number by number."""

from typing import Any

import pytest

from kdrl_core.config import load_recipe
from kdrl_core.look.sweeps.catalogue import load_catalogue
from kdrl_core.look.sweeps.spec import Cell, expand, list_sweeps, load_sweep

STRONG, WEAK = "models/Skywork-OR1-Math-7B", "models/DeepSeek-R1-Distill-Qwen-7B"
# 4.1: 280 steps under identical settings. Table 3: 1e-6, k2 (mse), the teacher. Sec. 3.3, 3.4, 4.4, B.2: the rest.
# label: objective, β (init, decay, minimum), estimator, mask, teacher; None: the objective does not read it
MAIN: dict[str, tuple[Any, ...]] = {
    "KDRL-Annealing": ("kdrl", (5e-3, 5e-5, 1e-3), "k2", "none", STRONG),
    "KDRL": ("kdrl", (2e-3, 0.0, 0.0), "k2", "none", STRONG),
    "GRPO": ("grpo", None, None, "none", None),
    "KD-RKL": ("kd_rkl", (2e-3, 0.0, 0.0), "k2", "none", STRONG),
    "SFT": ("sft", None, None, "none", STRONG),
    "reward shaping": ("reward_shaping", (2e-3, 0.0, 0.0), "k2", "none", STRONG),
    "k3": ("kdrl", (2e-3, 0.0, 0.0), "k3", "none", STRONG),
    "Top-K": ("kdrl", (2e-3, 0.0, 0.0), "topk", "none", STRONG),
    "β small": ("kdrl", (1e-3, 0.0, 0.0), "k2", "none", STRONG),
    "β large": ("kdrl", (5e-3, 0.0, 0.0), "k2", "none", STRONG),
    "response mask": ("kdrl", (2e-3, 0.0, 0.0), "k2", "response", STRONG),
    "group mask": ("kdrl", (2e-3, 0.0, 0.0), "k2", "group", STRONG),
    "weaker teacher": ("kdrl", (2e-3, 0.0, 0.0), "k2", "none", WEAK),
}
ZERO_TEACHER = "run:zero-teacher-7b"
ZERO: dict[str, tuple[Any, ...]] = {  # Table 5, B.3: KD-RKL has a constant β of 5e-3
    "KDRL-Annealing": ("kdrl", (2e-1, 8e-4, 2e-3), "k2", "none", ZERO_TEACHER),
    "GRPO": ("grpo", None, None, "none", None),
    "KD-RKL": ("kd_rkl", (5e-3, 0.0, 0.0), "k2", "none", ZERO_TEACHER),
}
TABLE1 = ["KDRL-Annealing", "KDRL", "GRPO", "KD-RKL", "SFT"]
ABLATION = ["KDRL", "k3", "weaker teacher", "response mask", "GRPO", "KD-RKL"]
# sweep: recipe, its variants, and their steps if they are not the recipe's
SWEEPS: dict[str, tuple[str, list[str], dict[str, int]]] = {
    "table1": ("paper-1.5b", TABLE1, {}),
    "figure2": ("paper-1.5b", ["KDRL", "GRPO", "KD-RKL", "reward shaping"], {}),
    "figure3": ("paper-1.5b", ["KDRL", "k3", "Top-K"], {}),
    "figure4": ("paper-1.5b", ["KDRL-Annealing", "β small", "KDRL", "β large"], {}),
    "figure5": ("paper-1.5b", ["KDRL", "response mask", "group mask"], {}),
    "figure6": ("paper-1.5b", ["KDRL", "KD-RKL", "GRPO"], {"KD-RKL": 200, "GRPO": 460}),  # 4.3
    "figure6-left": ("paper-1.5b", [*TABLE1, "k3", "weaker teacher", "response mask"], {}),
    "ablation": ("paper-1.5b", ABLATION, {}),
    "table2": ("zero-3b", list(ZERO), {}),
    "figure7": ("zero-3b", list(ZERO), {}),
}
STEPS = {"paper-1.5b": 280, "zero-3b": 480}


def _on(name: str, recipe: str) -> list[Cell]:
    return expand(load_sweep(name).model_copy(update={"recipe": recipe}))


def _row(cell: Cell) -> tuple[Any, ...]:
    """What the objective reads, as MAIN has it."""
    stage, teacher = cell.recipe.stage("stage2"), cell.recipe.teacher
    beta = stage.beta if stage.scores_teacher else None
    return (
        stage.objective,
        None if beta is None else (beta.init, beta.decay, beta.minimum),
        stage.kl_estimator if stage.scores_teacher else None,
        stage.kd_masking,
        teacher.path if teacher is not None and stage.uses_teacher else None,
    )


@pytest.mark.parametrize("name", SWEEPS)
def test_cells_on_the_paper_s_recipe_are_the_paper_s(name: str) -> None:
    recipe, labels, steps = SWEEPS[name]
    cells = _on(name, recipe)
    assert [cell.variant for cell in cells] == labels
    assert {cell.seed for cell in cells} == {0}, "the paper trains each variant once"
    expected = ZERO if recipe == "zero-3b" else MAIN
    assert {cell.variant: _row(cell) for cell in cells} == {label: expected[label] for label in labels}
    for cell in cells:
        stage = cell.recipe.stage("stage2")
        assert stage.steps == steps.get(cell.variant, STEPS[recipe]), cell.variant
        assert stage.learning_rate == (2e-7 if cell.variant == "SFT" else 1e-6), cell.variant  # B.2; Tables 3, 5
        assert (stage.prompts_per_step, stage.group_size, stage.sft.samples, stage.sft.batch_size) == (64, 16, 8, 128)
        assert cell.recipe.evaluation.model_copy(update={"also": {}}) == load_recipe(recipe).evaluation
        also = {"R1-Distill-Qwen-7B": WEAK} if name == "table1" else {}  # Table 1 has its row
        assert {label: model.path for label, model in cell.recipe.evaluation.also.items()} == also


@pytest.mark.parametrize("name", SWEEPS)
def test_the_miniature_has_the_same_variants_with_beta_of_its_own(name: str) -> None:
    spec = load_sweep(name)
    large, labels, _ = SWEEPS[name]
    small = "miniature-zero" if large == "zero-3b" else "miniature"
    assert (spec.name, spec.recipe) == (name, small)
    for recipe in spec.recipes:
        if recipe == large:
            continue
        cells = expand(spec.model_copy(update={"recipe": recipe, "seeds": 1}))
        assert [cell.variant for cell in cells] == labels
        for cell, theirs in zip(cells, _on(name, large), strict=True):
            (kind, beta, *rest), (there, other, *more) = _row(cell), _row(theirs)
            assert (kind, rest[:2]) == (there, more[:2]), cell.variant  # objective, estimator, mask
            if beta is not None and large == "paper-1.5b":
                times = 25 if recipe == "miniature-long" else 100
                assert beta[::2] == pytest.approx([times * other[0], times * other[2]]), cell.variant
        assert len({cell.recipe.stage("stage2").steps for cell in cells}) == 1
        assert len({cell.recipe.stage("stage2").learning_rate for cell in cells}) == 1


@pytest.mark.parametrize(("recipe", "steps", "seeds"), [("zero-teacher-7b", 300, 1), ("miniature-zero-teacher", 60, 3)])
def test_table4_is_the_zero_teacher_before_and_after_grpo(recipe: str, steps: int, seeds: int) -> None:
    cells = _on("table4", recipe)
    assert [(cell.variant, cell.seed) for cell in cells] == [("after GRPO", seed) for seed in range(seeds)]
    for cell in cells:
        stage = cell.recipe.stage("stage1")
        assert (cell.recipe.stages, stage.objective, stage.steps, cell.recipe.teacher) == (
            ("stage1",),
            "grpo",
            steps,
            None,
        )


def test_the_findings_at_one_rate_are_the_tuned_ones_but_for_the_rate() -> None:
    equal, tuned = (expand(load_sweep(name).model_copy(update={"seeds": 1})) for name in ("findings-equal", "findings"))
    assert [cell.variant for cell in equal] == [cell.variant for cell in tuned]
    rates = {cell.variant: cell.recipe.stage("stage2").learning_rate for cell in equal}
    kdrl = next(cell.recipe.stage("stage2").learning_rate for cell in tuned if cell.variant == "KDRL")
    assert rates == pytest.approx(dict.fromkeys(rates, kdrl) | {"SFT": kdrl / 5})  # B.2: 2e-7, Table 3: 1e-6
    for cell, other in zip(equal, tuned, strict=True):
        same = {"learning_rate": 1.0}
        assert cell.recipe.stage("stage2").model_copy(update=same) == other.recipe.stage("stage2").model_copy(
            update=same
        )


def test_every_shipped_sweep_tells_where_its_variants_are_described() -> None:
    catalogue = load_catalogue("paper")
    assert list(catalogue.variants) == list(MAIN)
    for name in list_sweeps():
        spec = load_sweep(name)
        labels = {label for grid in (spec, *spec.recipes.values()) for label in grid.variants}
        assert spec.sources.keys() == labels, name
        for label in labels & catalogue.variants.keys():
            assert spec.sources[label] == catalogue.variants[label].source
