"""Rules in a recipe: defaults that are filled in, bounds, and that they never stand in the way of resuming."""

from pathlib import Path

import pytest
import yaml

from kdrl_core.boxes.sharing import parts_of
from kdrl_core.config import config_hash, dump_recipe, list_recipes, load_recipe, unsafe_changes
from kdrl_core.config.alarms import DEFAULTS, AlarmsConfig, FallRule, ThresholdRule
from kdrl_core.errors import RecipeError
from kdrl_core.ledger import create_run, open_run


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_has_every_rule_and_stops_for_none(name: str) -> None:
    rules = load_recipe(name).alarms.rules
    assert set(rules) == set(DEFAULTS)
    assert not any(rule.stop for rule in rules.values())


def test_what_is_not_said_of_a_rule_is_its_default() -> None:
    alarms = load_recipe("miniature", ["alarms.reward_collapse.stop=true", "alarms.clip_ratio.above=0.9"]).alarms
    assert alarms.reward_collapse == FallRule(**{**DEFAULTS["reward_collapse"], "stop": True})
    assert alarms.clip_ratio == ThresholdRule(metric="response/clip_ratio", above=0.9, patience=5)
    assert alarms.timeouts == AlarmsConfig().timeouts


def test_null_switches_a_rule_off_and_set_on_again() -> None:
    recipe = load_recipe("miniature", ["alarms.timeouts=null"])
    assert "timeouts" not in recipe.alarms.rules
    assert load_recipe("miniature", ["alarms.timeouts=null", "alarms.timeouts={}"]) == load_recipe("miniature")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("alarms.reward_colapse.stop=true", "field 'alarms.reward_colapse': unknown field, did you mean 'reward_coll"),
        ("alarms.clip_ratio.abov=1", "field 'alarms.clip_ratio.abov': unknown field, did you mean 'above'"),
        ("alarms.kl_jump.metric=kd/kll", "field 'alarms.kl_jump.metric': Input should be 'reward/mean'"),
        ("alarms.reward_collapse.share=1.0", "field 'alarms.reward_collapse.share': Input should be less than 1"),
        ("alarms.timeouts.patience=0", "field 'alarms.timeouts.patience': Input should be greater than or equal to 1"),
        ("alarms.entropy_jump.patience=6", "patience 6 is more than half of window 10"),
        ("alarms.acknowledged.stage2=-1", "field 'alarms.acknowledged.stage2': Input should be greater than"),
        ("alarms.clip_ratio=on", "field 'alarms.clip_ratio'"),
    ],
)
def test_bad_rules_are_refused_with_the_field(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe("miniature", [override])
    assert message in str(refused.value)


def test_a_recipe_with_rules_comes_back_from_its_file(tmp_path: Path) -> None:
    recipe = load_recipe("miniature", ["alarms.kl_jump=null", "alarms.clip_ratio.stop=true"])
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "r.yaml") == recipe


def test_a_run_from_before_there_were_alarms_opens_as_it_was(artifacts: Path) -> None:
    recipe = load_recipe("miniature")
    run = create_run("old", recipe)
    values = yaml.safe_load(run.paths.recipe.read_text())
    del values["alarms"]
    run.paths.recipe.write_text(yaml.safe_dump(values, sort_keys=False))
    assert open_run("old").recipe == recipe
    assert config_hash(recipe) == "8536a83b58372e735f91f4331306bd0dfda62146cc371fb4d6a03891285be146"  # before alarms
    create_run("old", load_recipe("miniature", ["alarms.clip_ratio.stop=true", "alarms.kl_jump=null"]))
    assert open_run("old").recipe.alarms.kl_jump is None


def test_every_change_of_the_rules_is_safe() -> None:
    old = load_recipe("miniature")
    changes = ["alarms.clip_ratio=null", "alarms.reward_collapse.stop=true", "alarms.acknowledged.stage2=7"]
    assert unsafe_changes(old, load_recipe("miniature", changes)) == []
    assert unsafe_changes(load_recipe("miniature", changes), old) == []


def test_cells_that_differ_in_alarms_alone_share_all_work() -> None:
    keys = [part.key for part in parts_of(load_recipe("miniature"))]
    assert [part.key for part in parts_of(load_recipe("miniature", ["alarms.clip_ratio.stop=true"]))] == keys


def test_with_functions_the_defaults_do_not_take_a_reward_for_a_share() -> None:
    functions = "reward.functions=[{function: exact, weight: -1}]"
    rules = load_recipe("miniature", [functions]).alarm_rules
    assert rules["no_reward"].metric == "reward/accuracy"
    assert "format_wrong" not in rules
    kept = load_recipe("miniature", [functions, "alarms.no_reward.at_most=-1", "alarms.format_wrong.above=1"])
    assert kept.alarm_rules == kept.alarms.rules
    plain = load_recipe("miniature")
    assert plain.alarm_rules == plain.alarms.rules


def test_a_rule_may_watch_a_function_that_the_reward_has() -> None:
    functions, rule = "reward.functions=[{function: exact, name: mine}]", "alarms.no_reward.metric=reward/mine/mean"
    assert load_recipe("miniature", [functions, rule]).alarm_rules["no_reward"].metric == "reward/mine/mean"
    load_recipe("miniature", [functions, rule.replace("mine/", "mine.part/")])
    with pytest.raises(RecipeError, match=r"reward/mine/mean is of mine, which is none of reward.functions \(there ar"):
        load_recipe("miniature", [rule])
