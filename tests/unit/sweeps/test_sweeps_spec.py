"""Sweep files and the cells that they stand for."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrl_core.config import load_recipe
from kdrl_core.errors import RecipeError
from kdrl_core.look.sweeps.grid import listed_seeds
from kdrl_core.look.sweeps.spec import (
    SweepSpec,
    as_overrides,
    dump_sweep,
    expand,
    list_sweeps,
    load_sweep,
    validate_sweep,
)

RATE, STEPS = "stage2.learning_rate", "stage2.steps"


def _spec(**fields: Any) -> SweepSpec:
    return validate_sweep({"name": "s", "variants": {"a": {}}, **fields}, origin="s.yaml")


OF_THE_PAPER = [
    "ablation",
    *(f"figure{number}" for number in range(2, 8)),
    "figure6-left",
    "table1",
    "table2",
    "table4",
]
OF_THE_STUDY = [
    "findings",
    "findings-equal",
    "findings-long",
    "findings-long-equal",
    "findings-long-tuning",
    "findings-long-zero",
    "findings-tuning",
]
"""docs/findings.md: of the toy task alone."""
OF_A_REAL_MODEL = ["smollm2-zero"]


def test_shipped_sweeps_are_those_of_the_paper_and_of_the_study() -> None:
    assert list_sweeps() == sorted(["baselines", *OF_THE_PAPER, *OF_THE_STUDY, *OF_A_REAL_MODEL])


@pytest.mark.parametrize("name", ["findings", "findings-long"])
def test_the_study_is_tuned_on_other_seeds_and_never_on_the_test_problems(name: str) -> None:
    study, tuning = load_sweep(name), load_sweep(f"{name}-tuning")
    assert not set(listed_seeds(study.seeds)) & set(listed_seeds(tuning.seeds))
    tried: dict[str, set[float]] = {}
    for cell in expand(tuning):
        assert [benchmark.name for benchmark in cell.recipe.evaluation.benchmarks] == ["validation"]
        tried.setdefault(cell.label, set()).add(cell.recipe.stage("stage2").learning_rate)
    chosen = {cell.variant: cell.recipe.stage("stage2").learning_rate for cell in expand(study)}
    assert chosen.keys() == tried.keys() > {cell.variant for cell in expand(load_sweep("table1"))}
    for variant, rate in chosen.items():
        assert rate in tried[variant]
        assert min(tried[variant]) < rate < max(tried[variant]), variant  # the best is not the last one tried


def test_what_is_varied_stands_above_a_variant_and_that_above_what_is_set() -> None:
    (cell,) = expand(
        _spec(
            set={"stage2.beta": {"init": 0.1}},
            variants={"a": {"stage2.beta.init": 0.3}},
            vary={"stage2.beta": [{"init": 0.2}]},
        )
    )
    beta = cell.recipe.stage("stage2").beta
    assert beta is not None
    assert beta.init == 0.2


def test_grid_is_every_variant_with_every_combination_and_seed() -> None:
    spec = _spec(variants={"KDRL": {}, "GRPO, 2": {"stage2.objective": "grpo"}}, vary={STEPS: [2, 3]}, seeds=[4, 7])
    cells = expand(spec, ["stage1.steps=5"])
    assert [(cell.run, cell.variant, cell.seed) for cell in cells] == [
        ("s--kdrl-steps-2--seed4", "KDRL, steps=2", 4),
        ("s--kdrl-steps-3--seed4", "KDRL, steps=3", 4),
        ("s--grpo-2-steps-2--seed4", "GRPO, 2, steps=2", 4),
        ("s--grpo-2-steps-3--seed4", "GRPO, 2, steps=3", 4),
        ("s--kdrl-steps-2--seed7", "KDRL, steps=2", 7),
        ("s--kdrl-steps-3--seed7", "KDRL, steps=3", 7),
        ("s--grpo-2-steps-2--seed7", "GRPO, 2, steps=2", 7),
        ("s--grpo-2-steps-3--seed7", "GRPO, 2, steps=3", 7),
    ]
    last = cells[-1].recipe
    assert (last.stage("stage2").objective, last.stage("stage2").steps, last.stage("stage1").steps) == ("grpo", 3, 5)
    assert last.seed == 7


def test_fields_of_one_name_are_told_apart_in_labels() -> None:
    cells = expand(_spec(variants={}, vary={"stage1.steps": [2], STEPS: [3], RATE: [1e-4]}))
    assert cells[0].variant == "stage1.steps=2, stage2.steps=3, learning_rate=0.0001"


def test_values_of_the_recipe_s_name_come_on_top() -> None:
    spec = _spec(
        set={STEPS: 9, "stage1.steps": 9},
        variants={"a": {RATE: 0.1}},
        recipes={"miniature": {"set": {STEPS: 2}, "variants": {"a": {"stage2.warmup_steps": 1}, "b": {RATE: 0.2}}}},
    )
    first, second = (cell.recipe for cell in expand(spec))
    assert (first.stage("stage1").steps, first.stage("stage2").steps) == (9, 2)
    assert (first.stage("stage2").learning_rate, first.stage("stage2").warmup_steps) == (0.1, 1)
    assert second.stage("stage2").learning_rate == 0.2


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown field": ({"variant": {}}, r"field 'variant': unknown field, did you mean 'variants'\?"),
    "unknown field of a recipe's": (
        {"recipes": {"miniature": {"sets": {}}}},
        r"field 'recipes.miniature.sets': unknown field, did you mean 'set'\?; known here: set, variants, vary,",
    ),
    "no name": ({"name": None}, "field 'name': Input should be a valid string"),
    "name that leads elsewhere": ({"name": "../x"}, "field 'name': String should match pattern"),
    "nothing varied": ({"variants": {}}, "nothing is varied; give `variants`, `vary` or both"),
    "no value": ({"vary": {STEPS: []}}, "field 'vary.stage2.steps': List should have at least 1 item"),
    "one value": ({"vary": {STEPS: 3}}, "field 'vary.stage2.steps': Input should be a valid (array|list)"),
    "no seeds": ({"seeds": 0}, "field 'seeds': 0 seeds; give 1 to 1000"),
    "seeds twice": ({"seeds": [1, 1]}, "field 'seeds': seeds are different numbers from 0 on"),
    "text as seeds": ({"seeds": "five"}, "field 'seeds': Input should be a valid integer"),
    "seed in a variant": ({"variants": {"a": {"seed": 3}}}, "field 'variants': seed is set by the sweep itself"),
    "name of a run": ({"set": {"name": "x"}}, "field 'set': name is set by the sweep itself"),
    "no field": ({"set": {"stage2..steps": 1}}, r"'stage2\.\.steps' is not a valid field name"),
    "label of a table's cell": ({"variants": {"a|b": {}}}, r"'a\|b' is not a valid field name or label"),
    "variant without fields": ({"variants": {"a": None}}, "field 'variants.a': Input should be"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_file_is_refused_with_file_and_field(fault: str, tmp_path: Path) -> None:
    change, message = FAULTS[fault]
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"name": "s", "variants": {"a": {}}, **change}))
    with pytest.raises(RecipeError, match=message) as error:
        load_sweep(file)
    assert str(error.value).startswith(f"sweep {file}: ")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variants": {"a": {"stage2.stesp": 1}}}, "sweep s, variant 'a': recipe miniature: .*did you mean 'steps'"),
        ({"variants": {"a": {STEPS: "x"}}}, "sweep s, variant 'a': .*field 'stage2.steps'.*got 'x'"),
        ({"variants": {"a": {}, "b": {}}}, "sweep s: variants 'a' and 'b' are the same recipe"),
        ({"variants": {"a b": {}, "a-b": {STEPS: 1}}}, "would both be run s--a-b--seed0; give one of them another"),
        ({"vary": {f"stage2.data.{'x' * 60}": ["y" * 60]}}, "run name .* is not allowed|field 'stage2.data.x"),
        ({"recipe": "nosuch"}, "sweep s, recipe: no recipe 'nosuch'"),
        ({"recipes": {"zero-3b": {}}}, "field 'recipes': it has values for zero-3b, and none for recipe miniature"),
    ],
)
def test_a_cell_that_cannot_be_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        expand(_spec(**fields))


@settings(max_examples=25, deadline=None)
@given(
    rates=st.lists(st.floats(1e-8, 0.5), min_size=1, max_size=3, unique=True),
    steps=st.lists(st.integers(1, 10**6), min_size=1, max_size=3, unique=True),
    seeds=st.lists(st.integers(0, 2**31), min_size=1, max_size=3, unique=True),
    label=st.text("aB9 β,.-_=", max_size=20),
)
def test_any_grid_gives_one_cell_per_combination(
    rates: list[float], steps: list[int], seeds: list[int], label: str
) -> None:
    spec = _spec(variants={f"x{label}": {}}, vary={RATE: rates, STEPS: steps}, seeds=seeds)
    cells = expand(spec)
    assert len({cell.run for cell in cells}) == len(cells) == len(rates) * len(steps) * len(seeds)
    stages = [cell.recipe.stage("stage2") for cell in cells]
    assert {(stage.learning_rate, stage.steps) for stage in stages} == {(r, s) for r in rates for s in steps}
    assert {cell.recipe.seed for cell in cells} == set(seeds)
    assert all(load_recipe(spec.recipe, cell.overrides) == cell.recipe for cell in cells)
    assert validate_sweep(yaml.safe_load(dump_sweep(spec)), origin="again") == spec


@settings(max_examples=50, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5))
def test_any_value_survives_the_way_into_a_recipe(value: Any) -> None:
    from kdrl_core.config import parse_value

    (override,) = as_overrides({"x": value})
    assert parse_value(override.partition("=")[2], field="x") == value
