"""Variants that are declared once, and what a sweep makes of them; variants that differ in more than they name."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from kdrl_core.config import load_recipe
from kdrl_core.errors import RecipeError
from kdrl_core.look.sweeps.equality import unequal_notes
from kdrl_core.look.sweeps.request import make_request, write_record
from kdrl_core.look.sweeps.spec import SweepSpec, dump_sweep, expand, validate_sweep
from kdrl_core.look.sweeps.state import read_record

RATE, STEPS = "stage2.learning_rate", "stage2.steps"
BETA = "stage2.beta"


def _spec(**fields: Any) -> SweepSpec:
    return validate_sweep({"name": "s", "variants_of": "paper", "pick": ["KDRL", "k3"], **fields}, origin="s.yaml")


def _stages(spec: SweepSpec) -> dict[str, Any]:
    return {cell.variant: cell.recipe.stage("stage2") for cell in expand(spec, origin="s.yaml")}


def test_picked_variants_have_their_base_s_values_and_those_of_the_recipe() -> None:
    spec = _spec(pick=["k3", "Top-K", "KDRL"])
    found = _stages(spec)
    assert list(found) == ["k3", "Top-K", "KDRL"]
    assert {label: stage.kl_estimator for label, stage in found.items()} == {"k3": "k3", "Top-K": "topk", "KDRL": "k2"}
    assert {stage.beta.init for stage in found.values()} == {0.2}
    assert found["Top-K"].topk.k == 4
    assert list(spec.recipes) == ["paper-1.5b", "miniature", "miniature-study", "miniature-long"]
    assert spec.sources["k3"].startswith("Sec. 3.2, 4.4")


def test_a_sweep_s_own_values_come_on_top_and_those_for_a_recipe_last() -> None:
    own = {"variants": {"KDRL": {BETA: {"init": 0.7}, RATE: 0.01}, "mine": {STEPS: 3}}}
    found = _stages(_spec(**own, set={RATE: 0.02}))
    assert (found["KDRL"].beta.init, found["KDRL"].learning_rate) == (0.7, 0.01)
    assert (found["k3"].beta.init, found["k3"].learning_rate) == (0.2, 0.02)
    assert (found["mine"].steps, found["mine"].beta.init) == (3, 0.5)
    found = _stages(_spec(**own, recipes={"miniature": {"variants": {"KDRL": {RATE: 0.03}}}}))
    assert (found["KDRL"].beta.init, found["KDRL"].learning_rate) == (0.7, 0.03)


def test_seeds_are_the_recipe_s_unless_they_are_given() -> None:
    def seeds(**options: Any) -> set[int]:
        return {cell.seed for cell in make_request("table1", **options).cells}

    assert seeds() == {0, 1, 2, 3, 4}
    assert seeds(recipe="paper-1.5b") == {0}
    assert seeds(recipe="paper-1.5b", seeds=2) == {0, 1}
    assert {cell.seed for cell in expand(_spec(seeds=2, recipes={"miniature": {"seeds": [7]}}))} == {7}
    assert {cell.seed for cell in expand(_spec(recipe="paper-1.5b"))} == {0}
    assert {cell.seed for cell in expand(_spec(recipe="paper-1.5b", seeds=2))} == {0, 1}  # the file's own recipe


def test_a_variant_that_would_be_only_its_base_does_not_exist(tmp_path: Path) -> None:
    base = {"source": "s", "recipes": {"miniature": {STEPS: 3}, "miniature-study": {STEPS: 4}}}
    weaker = {"source": "s", "base": "a", "recipes": {"miniature": {RATE: 0.1}}}
    faster = {"source": "s", "base": "a", "set": {RATE: 0.2}}
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump({"name": "c", "variants": {"a": base, "weaker": weaker, "faster": faster}})
    )
    spec = _spec(variants_of=str(tmp_path / "c.yaml"), pick=["weaker", "faster"])
    assert list(spec.recipes) == ["miniature"]
    assert {label: stage.learning_rate for label, stage in _stages(spec).items()} == {"weaker": 0.1, "faster": 0.2}
    with pytest.raises(RecipeError, match="catalogue c has no values of 'weaker' for this recipe"):
        _spec(variants_of=str(tmp_path / "c.yaml"), pick=["weaker"], recipes={"miniature-study": {}})


def test_a_model_for_comparison_has_no_variant_s_name() -> None:
    spec = _spec(set={"evaluation.also": {"k3": {"path": "builtin:miniature/teacher-weak"}}})
    with pytest.raises(RecipeError, match=r"sweep s, field 'evaluation.also': 'k3' is also a variant"):
        expand(spec)


def test_one_variant_can_be_varied_by_itself() -> None:
    spec = _spec(vary_each={"k3": {RATE: [0.1, 0.2]}})
    assert [cell.variant for cell in expand(spec)] == ["KDRL", "k3, learning_rate=0.1", "k3, learning_rate=0.2"]
    with pytest.raises(RecipeError, match="sweep s, field 'vary_each': no variant 'KDLR', did you mean 'KDRL'"):
        expand(_spec(vary_each={"KDLR": {RATE: [0.1]}}))
    varied = make_request("findings-tuning", vary=[f"{RATE}=0.1,0.2"], seeds=1).cells
    assert len(varied) == 12 * 2
    assert {cell.recipe.stage("stage2").learning_rate for cell in varied} == {0.1, 0.2}


@pytest.mark.usefixtures("artifacts")
def test_a_started_sweep_keeps_its_variants_when_the_catalogue_changes(tmp_path: Path) -> None:
    catalogue, file = tmp_path / "own.yaml", tmp_path / "mine.yaml"
    methods = {"a": {"source": "Sec. 1", "set": {STEPS: 3}}, "b": {"source": "Sec. 2", "base": "a", "set": {RATE: 0.1}}}
    catalogue.write_text(yaml.safe_dump({"name": "own", "variants": methods}))
    file.write_text(yaml.safe_dump({"name": "mine", "variants_of": str(catalogue)}))
    first = make_request(str(file))
    write_record(first)
    assert [cell.overrides for cell in first.cells] == [
        (f"{STEPS}=3", "seed=0"),
        (f"{STEPS}=3", f"{RATE}=0.1", "seed=0"),
    ]
    catalogue.write_text(yaml.safe_dump({"name": "own", "variants": {"a": {"source": "Sec. 1", "set": {STEPS: 4}}}}))
    assert make_request("mine").cells == first.cells
    assert read_record("mine").spec.sources == {"a": "Sec. 1", "b": "Sec. 2"}
    assert validate_sweep(yaml.safe_load(dump_sweep(first.spec)), origin="again") == first.spec
    assert [cell.variant for cell in make_request(str(file)).cells] == ["a"]  # a file is read again


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no such catalogue": ({"variants_of": "papre"}, "field 'variants_of': no catalogue 'papre', did you mean 'paper'"),
    "no such variant": ({"pick": ["KDLR"]}, "field 'pick': catalogue paper has no variant 'KDLR', did you mean 'KDRL'"),
    "no catalogue": ({"variants_of": None}, "nothing is varied"),
    "pick without a catalogue": ({"variants_of": None, "variants": {"a": {}}}, "`pick` is of a catalogue"),
    "no values for a recipe": (
        {"recipes": {"zero-3b": {}}},
        "field 'recipes.zero-3b': catalogue paper has no values of 'KDRL' for this recipe; give "
        "recipes.zero-3b.variants.KDRL",
    ),
    "not picked": ({"variants": {"GRPO": {STEPS: 1}}}, "field 'variants.GRPO': this variant of catalogue paper is not"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_the_catalogue_lacks_is_refused(fault: str) -> None:
    change, words = FAULTS[fault]
    with pytest.raises(RecipeError) as error:
        _spec(**change)
    assert str(error.value).startswith("sweep s.yaml")
    assert str(error.value).count("s.yaml") == 1
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"a": {"source": "s", "base": "b"}}, "base of a: no variant 'b'"),
        ({"a": {"source": "s", "sets": {}}}, "field 'variants.a.sets': Extra inputs"),
        ({"a": {"set": {}}}, "field 'variants.a.source': Field required"),
        ({}, "field 'variants': Dictionary should have at least 1 item"),
    ],
)
def test_a_wrong_catalogue_is_refused(content: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"name": "c", "variants": content}))
    with pytest.raises(RecipeError) as error:
        _spec(variants_of=str(tmp_path / "c.yaml"))
    assert words in str(error.value)


UNEQUAL: dict[str, tuple[dict[str, Any], str]] = {
    "steps": (
        {"equal": ["steps"], "variants": {"k3": {STEPS: 9}}},
        "sweep s.yaml, variant 'k3', field 'stage2.steps': 9, but 80 in variant 'KDRL', and the sweep says equal: [ste",
    ),
    "β of a variant whose label does not say so": (
        {"equal": ["beta"], "variants": {"k3": {f"{BETA}.init": 0.1}}},
        "variant 'k3', field 'stage2.beta.init': 0.1, but 0.2 in variant 'KDRL'",
    ),
    "β in another part than the one that is varied": (
        {"equal": ["beta"], "variants": {"k3": {f"{BETA}.minimum": 0.1}}, "vary": {f"{BETA}.init": [0.3, 0.4]}},
        "variant 'k3, init=0.3', field 'stage2.beta.minimum': 0.1, but 0.0 in variant 'KDRL, init=0.3', and the sweep",
    ),
    "no field": ({"equal": ["stesp"]}, "field 'equal': a stage has no field 'stesp', did you mean 'steps'?"),
    "excepted without need": ({"unequal": {"k3": ["steps"]}}, "field 'unequal.k3': 'steps' is not in 'equal'"),
    "excepted by a wrong name": (
        {"equal": ["steps"], "unequal": {"KDLR": ["steps"]}},
        "field 'unequal': no variant 'KDLR', did you mean 'KDRL'?",
    ),
}


@pytest.mark.parametrize("fault", UNEQUAL)
def test_variants_that_differ_in_more_than_they_name_are_refused(fault: str) -> None:
    change, words = UNEQUAL[fault]
    with pytest.raises(RecipeError) as error:
        _stages(_spec(**change))
    assert words in str(error.value)


def test_what_is_named_or_not_read_may_differ() -> None:
    equal = {"equal": ["steps", "beta", "learning_rate"]}
    assert len(_stages(_spec(**equal, variants={"k3": {RATE: 0.1}}, unequal={"k3": ["learning_rate"]}))) == 2
    assert len(_stages(_spec(**equal, vary={RATE: [0.1, 0.2], f"{BETA}.init": [0.3, 0.4]}))) == 8
    assert len(_stages(_spec(**equal, pick=["KDRL", "GRPO"]))) == 2  # GRPO's β is another, and not read
    for words in (f"{STEPS}=7", f"{RATE}=0.5"):
        assert len(expand(_spec(**equal), [words])) == 2  # of all cells alike


def test_rows_that_were_not_trained_alike_are_marked() -> None:
    recipes = {
        "KDRL": load_recipe("paper-1.5b"),
        "k3": load_recipe("paper-1.5b", ["stage2.kl_estimator=k3"]),
        "KD-RKL": load_recipe("paper-1.5b", [f"{STEPS}=200"]),
        "GRPO": load_recipe("paper-1.5b", [f"{STEPS}=460"]),
        "SFT": load_recipe("paper-1.5b", [f"{RATE}=2e-7"]),
    }
    assert unequal_notes(recipes) == [
        "Not trained alike: KD-RKL with 200 steps; GRPO with 460 steps; the others with 280 steps.",
        "Not trained alike: SFT with a learning rate of 2e-07; the others with a learning rate of 1e-06.",
    ]
    assert unequal_notes({label: recipes[label] for label in ("KDRL", "k3")}) == []
    assert unequal_notes({label: recipes[label] for label in ("KDRL", "GRPO")}) == [
        "Not trained alike: GRPO with 460 steps; KDRL with 280 steps."
    ]
