"""Reading, overriding, writing, hashing and comparing recipes; and what paths in them mean."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kdrl_core.config import (
    Recipe,
    config_hash,
    diff_recipes,
    dump_recipe,
    load_recipe,
    resolve_path,
    unsafe_changes,
)
from kdrl_core.config.load import validate_recipe
from kdrl_core.config.paths import ASSETS
from kdrl_core.errors import RecipeError

Load = Callable[..., Recipe]


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-6", 1e-6), ("1E-6", 1e-6), ("1.0e-6", 1e-6), ("2.5e-1", 0.25), ("0.5", 0.5), ("1", 1.0), ("1e0", 1.0)],
)
def test_numbers_are_read_as_yaml_1_2_has_them(text: str, value: float, load: Load) -> None:
    rate = load(f"stage1.learning_rate={text}").stage("stage1").learning_rate
    assert rate == value
    assert isinstance(rate, float)


def test_a_date_is_text(load: Load) -> None:
    assert load("name=2026-01-31").name == "2026-01-31"


def test_yaml_anchors_and_merges_work(tmp_path: Path) -> None:
    text = Path("flows/recipes/miniature.yaml").read_text() if Path("flows").is_dir() else ""
    text = text.replace("student: {", "student: &model {").replace(
        'teacher: {path: "builtin:miniature/teacher"}', 'teacher: {<<: *model, path: "builtin:miniature/teacher"}'
    )
    path = tmp_path / "merged.yaml"
    path.write_text(text)
    assert load_recipe(path) == load_recipe("miniature")


def test_set_reaches_nested_fields_lists_and_null(load: Load) -> None:
    recipe = load(
        "stage2.beta.decay=5e-5",
        "evaluation.benchmarks.1.samples=16",
        "evaluation.benchmarks.0={name: c, file: c.jsonl}",
        "stage1=null",
        "evaluation.periodic=[c]",
        "runtime.num_threads=2",  # a section that the file leaves out
        "stage2.checkpoint.keep_every=5",
        "description=two = signs",
        "student.chat_template=",
    )
    stage = recipe.stage("stage2")
    assert recipe.stages == ("stage2",)
    assert stage.beta is not None
    assert (stage.beta.init, stage.beta.decay) == (0.002, 5e-5)
    assert [(b.name, b.samples) for b in recipe.evaluation.benchmarks] == [("c", 1), ("b", 16)]
    assert recipe.runtime.num_threads == 2
    assert stage.checkpoint.keep_every == 5
    assert recipe.description == "two = signs"
    assert recipe.student.chat_template is None


def test_the_last_set_wins(load: Load) -> None:
    assert load("seed=1", "seed=2").seed == 2


def test_recipes_are_frozen(load: Load) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().seed = 1  # type: ignore[misc]


OVERRIDES = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**32 - 1),
        "description": st.text(max_size=40),
        "student.path": st.text(min_size=1, max_size=20),
        "stage1.learning_rate": st.floats(1e-12, 1.0, exclude_min=True),
        "stage2.temperature": st.floats(1e-3, 10.0),
        "stage2.steps": st.integers(1, 10**9),
        "stage2.beta.init": st.floats(0.0, 1e6),
        "stage2.kd_masking": st.sampled_from(["none", "response", "group"]),
        "stage2.evaluate_every": st.none() | st.integers(1, 100),
        "prompt.template": st.text(max_size=10).map(
            lambda text: text.replace("{question}", "") + "{question}\n\\boxed{}"
        ),
        "student.chat_template": st.none() | st.text(max_size=20),
        "reward.require_format": st.booleans(),
    },
)


def _with(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = yaml.safe_load(yaml.safe_dump(values))
    for name, value in changes.items():
        *parents, leaf = name.split(".")
        target = changed
        for parent in parents:
            target = target.setdefault(parent, {})
        target[leaf] = value
    return changed


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=OVERRIDES)
@example(changes={"description": "\x85 \u2028 \ufeff"})  # line ends to PyYAML, which it folds when it reads them
@example(changes={"description": "β ≥ 0", "student.path": "null"})
def test_dump_and_load_give_the_same_recipe(changes: dict[str, Any], values: dict[str, Any], tmp_path: Path) -> None:
    recipe = validate_recipe(_with(values, changes), origin="test")
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    again = load_recipe(path)
    assert again == recipe
    assert config_hash(again) == config_hash(recipe)
    assert diff_recipes(again, recipe) == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=OVERRIDES)
def test_the_hash_tells_recipes_apart_and_the_diff_names_the_fields(
    changes: dict[str, Any], values: dict[str, Any]
) -> None:
    plain, changed = validate_recipe(values, origin="a"), validate_recipe(_with(values, changes), origin="b")
    found = [change.field for change in diff_recipes(plain, changed)]
    assert (config_hash(plain) == config_hash(changed)) == (not found)
    assert set(found) <= set(changes)


def test_hash_does_not_depend_on_how_the_yaml_is_written(values: dict[str, Any], tmp_path: Path) -> None:
    flow, block = tmp_path / "flow.yaml", tmp_path / "block.yaml"
    flow.write_text("# a comment\n" + yaml.safe_dump(values, default_flow_style=True, sort_keys=True))
    text = yaml.safe_dump(values, default_flow_style=False, sort_keys=False)
    assert "learning_rate: 1.0e-06" in text
    block.write_text(text.replace("1.0e-06", "0.000001") + "seed: 0\nverification:\n  workers: 2\n")  # defaults
    assert config_hash(load_recipe(flow)) == config_hash(load_recipe(block))


def test_hash_is_stable(load: Load) -> None:
    """Pinned: a new hash for an old recipe makes every existing run unusable, so it must be meant."""
    recipe = load("stage1.learning_rate=1", "stage2.temperature=1")
    assert config_hash(recipe) == config_hash(load("stage1.learning_rate=1.0", "stage2.temperature=1.0"))
    assert len(config_hash(recipe)) == 64


def test_an_sft_recipe_of_before_means_what_it_meant(tmp_path: Path) -> None:
    """Written out by kdrl when `sft` had three fields; its hash is of that time. Nothing else is taken for one."""
    before = {"keep": "reward", "temperature": 0.6, "aggregation": "token_mean"}
    sft = ["stage2.objective=sft", "stage2.temperature=0.6", "stage2.sft.samples=4"]
    told = load_recipe("miniature", [*sft, *(f"stage2.sft.{name}={value}" for name, value in before.items())])
    assert config_hash(told) == "5d5e561cf8198b781ffd289bb5bffce90d4c0bc8fbca79eb81d8e1a84326b5ae"
    new = load_recipe("miniature", sft)
    assert (new.stage("stage2").sft.keep, new.stage("stage2").sft.aggregation) == ("accuracy", "response_mean")
    assert config_hash(new) != config_hash(told)

    path = tmp_path / "frozen.yaml"
    for recipe in (told, new):
        path.write_text(dump_recipe(recipe))
        assert load_recipe(path) == recipe
        values = yaml.safe_load(path.read_text())
        for name in before:
            del values["stage2"]["sft"][name]
        path.write_text(yaml.safe_dump(values))
        assert load_recipe(path) == told
    del values["stage2"]["topk"]  # as a person writes it
    path.write_text(yaml.safe_dump(values))
    assert load_recipe(path) == new


def test_diff_shows_old_and_new(load: Load) -> None:
    changes = diff_recipes(load(), load("stage2.beta.init=0.004", "teacher.path=other", "stage1.beta=null"))
    assert [str(change) for change in changes] == [
        "teacher.path: 'models/teacher' → 'other'",
        "stage2.beta.init: 0.002 → 0.004",
    ]


def test_diff_of_a_removed_stage_names_its_fields(load: Load) -> None:
    changes = {change.field: (change.old, change.new) for change in diff_recipes(load(), load("stage1=null"))}
    assert changes["stage1.steps"] == (4, None)
    assert changes["stage1.objective"] == ("grpo", None)


SAFE = [
    "description=another",
    "stage2.steps=5",
    "stage1.evaluate_every=2",
    "stage2.evaluate_every=2",
    "stage1.checkpoint.every=3",
    "stage2.checkpoint.keep_last=9",
    "verification.workers=7",
    "verification.max_failed_share=0.5",
    "trainer={engine: deepspeed, ranks: 2, zero_stage: 3, offload_optimizer: true}",  # the last bits, as new hardware
    "trainer.activation_checkpointing=true",
    "trainer.step_timeout_s=60.0",
]
UNSAFE = [
    "stage2.steps=3",  # fewer: published steps would be beyond the end
    "stage1.steps=5",  # stage 2 started from the end of stage 1
    "stage1.steps=3",
    "stage1=null",
    "seed=1",
    "name=other",
    "student.path=other",
    "teacher.path=other",
    "prompt.template='{question}!'",
    "reward.require_format=false",
    "stage2.learning_rate=2e-6",
    "stage2.temperature=0.7",
    "stage2.beta.init=0.003",
    "stage2.kl_estimator=k3",
    "stage2.data.files=[other.json]",
    "stage1.data.max_problems=5",
    "stage2.group_size=4",
    "stage2.micro_batch_tokens=100",
    "verification.timeout_s=3.0",
    "verification.memory_limit_mb=100",
    "evaluation.temperature=0.7",
    "evaluation.benchmarks.0.samples=2",
    "runtime.num_threads=2",
    "runtime.dtype=bfloat16",
    "runtime.rollout_batch_size=2",
]


@pytest.mark.parametrize("override", SAFE)
def test_safe_changes_may_be_resumed_with(override: str, load: Load) -> None:
    assert diff_recipes(load(), load(override))
    assert unsafe_changes(load(), load(override)) == []


@pytest.mark.parametrize("override", UNSAFE)
def test_other_changes_may_not(override: str, load: Load) -> None:
    field = override.split("=")[0]
    changes = unsafe_changes(load(), load(override))
    assert changes
    assert all(change.field.startswith(field.split(".0.")[0]) for change in changes)


def test_a_lone_first_stage_may_grow(load: Load) -> None:
    assert unsafe_changes(load("stage2=null"), load("stage2=null", "stage1.steps=5")) == []


def test_adding_a_stage_is_unsafe(load: Load) -> None:
    assert unsafe_changes(load("stage2=null"), load())


def test_builtin_paths_are_the_assets() -> None:
    assert resolve_path("builtin:miniature/student") == (ASSETS / "miniature" / "student").resolve()


@pytest.mark.parametrize(
    "path", ["builtin:../..", "builtin:../../errors.py", "builtin:/etc/passwd", "package:yaml/../.."]
)
def test_builtin_and_package_paths_do_not_leave_their_root(path: str) -> None:
    with pytest.raises(RecipeError, match="leaves"):
        resolve_path(path)


def test_package_paths_are_the_installed_package() -> None:
    assert resolve_path("package:yaml/loader.py") == Path(yaml.__file__).parent.joinpath("loader.py").resolve()


@pytest.mark.parametrize("path", ["package:no_such_package_x/y", "package:", "package:no_such.inner/y", "package:/x"])
def test_unknown_package_is_refused_with_the_command_that_helps(path: str) -> None:
    with pytest.raises(RecipeError, match="is not installed; run pip install"):
        resolve_path(path)


def test_plain_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert resolve_path("models/x") == tmp_path / "models" / "x"
    assert resolve_path("~/x") == Path("/home/someone/x")
    assert resolve_path("/a/b") == Path("/a/b")


def test_set_changes_one_of_two_aliased_sections(values: dict[str, Any], tmp_path: Path) -> None:
    values["stage2"]["data"] = values["stage1"]["data"]
    path = tmp_path / "aliased.yaml"
    path.write_text(yaml.safe_dump(values))
    assert "*id" in path.read_text()
    recipe = load_recipe(path, ["stage1.data.max_problems=5"])
    assert recipe.stage("stage1").data.max_problems == 5
    assert recipe.stage("stage2").data.max_problems is None


def test_variables_of_the_chat_template(load: Load) -> None:
    recipe = load("prompt.chat_template_kwargs={enable_thinking: false, budget: [1, {a: null}], mode: x}")
    assert recipe.prompt.chat_template_kwargs == {"enable_thinking": False, "budget": [1, {"a": None}], "mode": "x"}
    assert config_hash(recipe) != config_hash(load())
    assert config_hash(load("prompt.chat_template_kwargs={}", "prompt.think_opened=null")) == config_hash(load())
    assert load("prompt.chat_template_kwargs.enable_thinking=false").prompt.chat_template_kwargs == {
        "enable_thinking": False
    }
    assert load("prompt.think_opened=closed").prompt.think_opened == "closed"
    assert load("prompt.think_opened=true").prompt.think_opened is True


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prompt.chat_template_kwargs={tokenize: true}", "kdrl itself sets tokenize"),
        ("prompt.chat_template_kwargs={messages: []}", "kdrl itself sets messages"),
        ("prompt.chat_template_kwargs={enable-thinking: false}", "'enable-thinking' is not the name of a variable"),
        ("prompt.chat_template_kwargs={'': 1}", "'' is not the name of a variable"),
        ("prompt.chat_template_kwargs={a: .nan}", "prompt.chat_template_kwargs"),
        ("prompt.chat_template_kwargs={a: [.inf]}", "prompt.chat_template_kwargs"),
        ("prompt.chat_template_kwargs=[enable_thinking]", "prompt.chat_template_kwargs"),
        ("prompt.chat_template_kwargs=on", "prompt.chat_template_kwargs"),
        ("prompt.think_opened=shut", "prompt.think_opened"),
    ],
)
def test_bad_variables_are_refused_with_the_field(load: Load, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load(override)
    assert message in str(refused.value)
