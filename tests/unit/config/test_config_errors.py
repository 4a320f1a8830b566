"""What a user can get wrong in a recipe: each fault is one line that names the field and what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdrl_core.config import Recipe, load_recipe
from kdrl_core.errors import KdrlError, RecipeError

Load = Callable[..., Recipe]

# --set overrides on a valid recipe → parts of the message, field first.
FAULTS: dict[str, tuple[list[str], list[str]]] = {
    "unknown field": (["stage2.betta=1"], ["'stage2.betta'", "unknown field", "did you mean 'beta'?", "known here:"]),
    "unknown section": (["stage3.steps=1"], ["'stage3'", "did you mean 'stage"]),
    "unknown field in a list": (
        ["evaluation.benchmarks.1.sample=3"],
        ["'evaluation.benchmarks.1.sample'", "'samples'"],
    ),
    "nothing like it": (["stage2.zzz=1"], ["'stage2.zzz'", "unknown field; known here:"]),
    "missing": (["stage1={objective: grpo}"], ["'stage1.steps'", "required but not given"]),
    "text for a number": (["stage1.steps=many"], ["'stage1.steps'", "integer", "'many'"]),
    "fraction for a count": (["stage1.steps=1.5"], ["'stage1.steps'", "integer", "1.5"]),
    "boolean for a count": (["stage1.steps=true"], ["'stage1.steps'", "integer"]),
    "number for text": (["student.path=3"], ["'student.path'", "string", "3"]),
    "text for a boolean": (["reward.require_format='yes'"], ["'reward.require_format'", "boolean", "'yes'"]),
    "value for a section": (["stage2.beta=0.002"], ["'stage2.beta'", "stage2.beta.init=0.002"]),
    "zero steps": (["stage1.steps=0"], ["'stage1.steps'", "greater than or equal to 1", "0"]),
    "negative seed": (["seed=-1"], ["'seed'", "greater than or equal to 0"]),
    "group of one": (["stage1.group_size=1"], ["'stage1.group_size'", "greater than or equal to 2"]),
    "no temperature": (["stage1.temperature=0"], ["'stage1.temperature'", "greater than 0"]),
    "learning rate": (["stage1.learning_rate=2"], ["'stage1.learning_rate'", "less than or equal to 1"]),
    "share": (["stage2.data.max_unsolved_share=10"], ["'stage2.data.max_unsolved_share'", "less than or equal to 1"]),
    "top_p": (["evaluation.top_p=0.95"], ["'evaluation.top_p'", "greater than or equal to 1"]),
    "infinite beta": (["stage2.beta.init=.inf"], ["'stage2.beta.init'", "finite"]),
    "NaN temperature": (["stage1.temperature=.nan"], ["'stage1.temperature'", "finite"]),
    "unknown objective": (["stage2.objective=dpo"], ["'stage2.objective'", "'kdrl'", "'dpo'"]),
    "unknown estimator": (["stage2.kl_estimator=k4"], ["'stage2.kl_estimator'", "'k2'", "'k4'"]),
    "unknown device": (["runtime.device=tpu"], ["'runtime.device'", "'cuda'", "'tpu'"]),
    "no files": (["stage1.data.files=[]"], ["'stage1.data.files'", "at least 1"]),
    "no benchmarks": (["evaluation.benchmarks=[]"], ["'evaluation.benchmarks'", "at least 1"]),
    "recipe name with a slash": (["name=a/b"], ["'name'", "'a/b'"]),
    "benchmark name with a slash": (["evaluation.benchmarks.0.name=../x"], ["'evaluation.benchmarks.0.name'"]),
    "KD without a teacher": (["teacher=null"], ["stage2.objective=kdrl", "teacher.path", "stage2.objective=grpo"]),
    "KD without beta": (["stage2.beta=null"], ["'stage2'", "needs beta", "beta.init"]),
    "floor above 0": (["stage2.topk.floor=1.0"], ["'stage2.topk.floor'", "less than or equal to 0"]),
    "cap of weights at 0": (["stage2.tis_cap=0.0"], ["'stage2.tis_cap'", "greater than 0"]),
    "unknown mean": (["stage2.aggregation=sequence"], ["'stage2.aggregation'", "'group_mean'", "'sequence'"]),
    "no n-gram": (
        ["stage2.data.decontamination.ngram=0"],
        ["'stage2.data.decontamination.ngram'", "greater than or equal to 1"],
    ),
    "SFT without a teacher": (
        ["teacher=null", "stage2.objective=sft", "stage2.terms=[]"],
        ["stage2.objective=sft", "teacher.path"],
    ),
    "minimum above init": (["stage2.beta.minimum=0.1"], ["'stage2.beta'", "minimum 0.1 is above init 0.002"]),
    "batch not divisible": (["stage1.batch_size=5"], ["'stage1'", "not divisible by group_size 2", "batch_size=4"]),
    "batch of another size": (
        ["stage1.batch_size=8"],
        ["'stage1'", "prompts_per_step × group_size", "prompts_per_step=4"],
    ),
    "mini-batch": (
        ["stage1.prompts_per_step=4", "stage1.mini_batch_prompts=3"],
        ["'stage1'", "mini_batch_prompts 3 does not divide prompts_per_step 4", "mini_batch_prompts=4", "on-policy"],
    ),
    "mini-batch above the batch": (["stage1.mini_batch_prompts=4"], ["'stage1'", "does not divide prompts_per_step 2"]),
    "mini-batches of SFT": (
        ["stage2.objective=sft", "stage2.mini_batch_prompts=1"],
        ["'stage2'", "mini_batch_prompts is about rollouts", "sft.batch_size", "set mini_batch_prompts=2"],
    ),
    "dynamic sampling where KD acts everywhere": (
        ["stage2.dynamic_sampling_rounds=1"],
        ["'stage2'", "objective kdrl with kd_masking=none learns from the teacher in every", "kd_masking=group"],
    ),
    "dynamic sampling without advantages": (
        ["stage2.objective=kd_rkl", "stage2.dynamic_sampling_rounds=1"],
        ["'stage2'", "objective kd_rkl learns from the teacher in every", "dynamic_sampling_rounds=0"],
    ),
    "a term that is no function": (
        ["stage2.terms=[{function: hinge, coefficient: 1.0}]"],
        ["'stage2.terms.0.function'", "give a function as file.py:name or package.module:name"],
    ),
    "two terms of one name": (
        ["stage2.terms=[{function: 'a.b:f', coefficient: 1.0}, {function: 'a.c:f', coefficient: 1.0}]"],
        ["'stage2.terms'", "two functions are named f", "rename one"],
    ),
    "terms of SFT": (
        ["stage2.objective=sft"],
        ["'stage2'", "terms is about rollouts", "set terms=[]"],
    ),
    "dynamic sampling of SFT": (
        ["stage2.objective=sft", "stage2.dynamic_sampling_rounds=1"],
        ["'stage2'", "dynamic_sampling_rounds is about rollouts", "set dynamic_sampling_rounds=0"],
    ),
    "overlong filtering of SFT": (
        ["stage2.objective=sft", "stage2.overlong_filtering=true"],
        ["'stage2'", "overlong_filtering is about rollouts", "set overlong_filtering=false"],
    ),
    "importance weights of SFT": (
        ["stage2.objective=sft", "stage2.terms=[]", "stage2.tis_cap=2.0"],
        ["'stage2'", "tis_cap is about rollouts", "set tis_cap=null"],
    ),
    "masking without the joint loss": (
        ["stage2.objective=kd_rkl", "stage2.kd_masking=group"],
        ["'stage2'", "kd_masking group", "set objective=kdrl"],
    ),
    "no stage": (["stage1=null", "stage2=null"], ["no stage to run", "stage1, stage2 or both"]),
    "unknown periodic": (["evaluation.periodic=[a, c]"], ["'evaluation'", "['c']", "['a', 'b']"]),
    "benchmark twice": (["evaluation.benchmarks.1.name=a"], ["'evaluation'", "same name"]),
    "ranks of one process": (["trainer.ranks=2"], ["'trainer'", "ranks above 1", "trainer.engine=deepspeed"]),
    "offload of what is not cut": (
        ["trainer={engine: deepspeed, zero_stage: 0, offload_optimizer: true}"],
        ["'trainer'", "offload_optimizer", "zero_stage to 2 or 3"],
    ),
    "ZeRO 1": (["trainer.zero_stage=1"], ["'trainer.zero_stage'", "0, 2 or 3", "1"]),
    "unknown trainer": (["trainer.engine=fsdp"], ["'trainer.engine'", "'deepspeed'", "'fsdp'"]),
    "template without question": (["prompt.template=solve it"], ["'prompt'", "{question} exactly once"]),
    "template with two": (["prompt.template='{question} {question}'"], ["'prompt'", "{question} exactly once"]),
    "adapter of rank 0": (["student.lora.rank=0"], ["'student.lora.rank'", "greater than or equal to 1"]),
    "adapter with alpha 0": (["student.lora.alpha=0"], ["'student.lora.alpha'", "greater than 0"]),
    "adapter with dropout": (
        ["student.lora.dropout=0.1"],
        ["'student.lora.dropout'", "be on-policy; set dropout=0"],
    ),
    "adapter of nothing": (["student.lora.targets=[]"], ["'student.lora.targets'", "at least 1"]),
    "a target twice": (["student.lora.targets=[a, a]"], ["'student.lora.targets'", "stands twice"]),
    "all targets and one": (["student.lora.targets=[all-linear, a]"], ["'student.lora.targets'", "beside other names"]),
    "adapter of the teacher": (["teacher.lora.rank=4"], ["'teacher.lora'", "unknown field"]),
}


@pytest.mark.parametrize(("overrides", "parts"), FAULTS.values(), ids=FAULTS)
def test_fault_is_named_with_field_and_remedy(overrides: list[str], parts: list[str], load: Load) -> None:
    with pytest.raises(RecipeError) as caught:
        load(*overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert "Value error" not in message  # pydantic's own wording
    for part in parts:
        assert part in message


def test_masking_a_grpo_stage_is_refused(load: Load) -> None:
    """kd_masking masks the KD term; GRPO has none, so the setting would be silently without effect."""
    with pytest.raises(RecipeError, match="kd_masking response masks the joint loss only"):
        load("stage1.kd_masking=response")


def test_several_faults_are_told_at_once(load: Load) -> None:
    with pytest.raises(RecipeError) as caught:
        load("stage1.steps=0", "stage2.temperature=-1", "seeed=1")
    message = str(caught.value)
    assert all(field in message for field in ("'stage1.steps'", "'stage2.temperature'", "'seeed'"))


def test_the_file_is_named(load: Load, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=str(tmp_path / "small.yaml")):
        load("stage1.steps=0")


def test_errors_are_kdrl_errors_and_value_errors(load: Load) -> None:
    with pytest.raises(RecipeError) as caught:
        load("seed=x")
    assert isinstance(caught.value, KdrlError)
    assert isinstance(caught.value, ValueError)


BAD_SETS = {
    "no equals sign": ("stage1.steps", "expected FIELD=VALUE"),
    "no field": ("=3", "expected FIELD=VALUE"),
    "not YAML": ("stage1.steps=[1", "not YAML"),
    "endless nesting": ("seed=" + "[" * 5000, "not YAML"),
    "below a value": ("name.deeper=1", "'name' is a single value"),
    "below a value in a list": ("stage1.data.files.0.x=1", "'0' is a single value"),
    "position that is a word": ("evaluation.benchmarks.first.name=x", "'first' is no position in a list of 2"),
    "position beyond the list": ("evaluation.benchmarks.2.name=x", "'2' is no position in a list of 2"),
    "negative position": ("evaluation.benchmarks.-1.name=x", "'-1' is no position in a list of 2"),
    "empty part": ("stage1..steps=3", "'stage1.'"),
}


@pytest.mark.parametrize(("override", "part"), BAD_SETS.values(), ids=BAD_SETS)
def test_bad_set_is_refused_in_one_line(override: str, part: str, load: Load) -> None:
    with pytest.raises(RecipeError) as caught:
        load(override)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("name: a\nname: b\n", "key 'name' stands twice"),
        ("name: a\nstage1:\n  steps: 1\n  steps: 2\n", "key 'steps' stands twice"),
        ("- a\n- b\n", "a mapping of fields is expected, found list"),
        ("", "a mapping of fields is expected, found NoneType"),
        ("name: [1", "cannot be read as YAML"),
        ("name: !!python/object/apply:os.system ['true']\n", "cannot be read as YAML"),
        ("a: &a [*a]\n", "recursion"),
        ("a: !!set {b}\n", "not JSON serializable"),
        ("[" * 5000, "cannot be read as YAML"),
    ],
)
def test_bad_yaml_is_refused_in_one_line(text: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert part in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(RecipeError, match="cannot be read as YAML"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("minature", "did you mean 'miniature'?"),
        ("nothing-like-it", "shipped: miniature"),
        ("", "shipped: miniature"),
        ("missing.yaml", "does not exist; give a YAML file or one of miniature"),
    ],
)
def test_unknown_recipe_names_the_known_ones(source: str, part: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source)
    assert part in str(caught.value)


@pytest.mark.parametrize("source", ["../../prefect", "../recipes/miniature", "/etc/passwd"])
def test_recipe_name_is_no_path(source: str) -> None:
    with pytest.raises(RecipeError, match="no recipe"):
        load_recipe(source)


def test_a_good_recipe_has_no_fault(load: Load, values: dict[str, Any]) -> None:
    assert load().name == values["name"]
