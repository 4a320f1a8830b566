"""Rules on series whose alarms can be worked out by hand."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrl_core.alarms import Alarm, alarms_of
from kdrl_core.config import Recipe, load_recipe, unsafe_changes
from kdrl_core.config.alarms import AlarmsConfig
from kdrl_core.config.load import config_hash
from kdrl_core.errors import RecipeError

METRICS = {
    "reward_collapse": "reward/mean",
    "clip_ratio": "response/clip_ratio",
    "repetition": "response/repetition_overlong",
    "length": "response/length_mean",
    "kl_jump": "kd/kl_unmasked",
    "entropy_jump": "entropy",
    "entropy_collapse": "entropy",
    "engine_gap": "engine/logprob_gap_mean",
    "timeouts": "verdict/timeout",
}


def _alarms(rule: str, values: list[float | None], **fields: Any) -> list[Alarm]:
    """The alarms of one rule alone over a series."""
    others = {name: {"enabled": False} for name in METRICS if name != rule}
    config = AlarmsConfig.model_validate({**others, rule: fields} if fields else others)
    return alarms_of("stage2", [{"step": step, METRICS[rule]: value} for step, value in enumerate(values)], config)


def test_reward_collapse_golden() -> None:
    # Means of two steps: 0.4 0.6 0.6 0.5 0.4 0.3; limit 0.7 × 0.6 = 0.42, so 0.4 at step 5 is the first below.
    (alarm,) = _alarms("reward_collapse", [0.2, 0.6, 0.6, 0.6, 0.4, 0.4, 0.2], window=2)
    assert (alarm.step, alarm.rule, alarm.stage) == (5, "reward_collapse", "stage2")
    assert (alarm.value, alarm.limit) == (pytest.approx(0.4), pytest.approx(0.42))
    assert alarm.text == "reward/mean fell to 0.4 (mean of 2 steps), 33% below its best, 0.6 3 steps ago"
    assert alarm.look == "--stage stage2 --step 5 --sort reward"
    assert _alarms("reward_collapse", [0.04, 0.04, 0.0, 0.0], window=1) == []  # it never was above 0.05


def test_ceilings_golden() -> None:
    # Means of two steps: 0.3 0.6 0.9 0.45; above 0.5 from step 2 on: one alarm, since it lasts.
    (alarm,) = _alarms("clip_ratio", [0.0, 0.6, 0.6, 1.2, -0.3], window=2)
    assert (alarm.step, alarm.value, alarm.limit) == (2, pytest.approx(0.6), 0.5)
    assert alarm.text == "response/clip_ratio is 0.6 (mean of 2 steps), above 0.5"
    assert [a.step for a in _alarms("timeouts", [0.0, 0.06, 0.06, 0.0, 0.2])] == [1, 4]  # ceased and came anew
    assert [a.step for a in _alarms("engine_gap", [0.1, 0.11])] == [1]  # above, not at
    assert [a.step for a in _alarms("repetition", [0.6, 0.6, 0.6], window=1, threshold=0.55)] == [0]


def test_growth_and_shrinking_golden() -> None:
    # Windows of two: 10 (the start) … 15 20 25; above 2 × 10 = 20 is 25 alone.
    (alarm,) = _alarms("length", [10.0, 10.0, 20.0, 20.0, 30.0], window=2)
    assert (alarm.step, alarm.value, alarm.limit) == (4, pytest.approx(25.0), pytest.approx(20.0))
    assert alarm.text == "response/length_mean grew to 25 (mean of 2 steps), 2.5 times its start, 10"
    (alarm,) = _alarms("entropy_collapse", [1.0, 0.5, 0.09], window=1)
    assert (alarm.step, alarm.limit) == (2, pytest.approx(0.1))
    assert "shrank to 0.09, 0.09 times its start, 1" in alarm.text


def test_jumps_golden() -> None:
    # Five before it, 1 1 2 2 3: median 2; 6 is 3 × 2 and no alarm, 6.1 is one.
    assert _alarms("kl_jump", [1.0, 1.0, 2.0, 2.0, 3.0, 6.0]) == []
    (alarm,) = _alarms("kl_jump", [1.0, 1.0, 2.0, 2.0, 3.0, 6.1])
    assert (alarm.step, alarm.limit) == (5, pytest.approx(6.0))
    assert alarm.text == "kd/kl_unmasked jumped to 6.1, 3 times the median of 5 steps, 2"
    assert _alarms("entropy_jump", [1.0, 1.0, 1.0, 1.0, 9.0]) == []  # four before it are too few
    assert [a.step for a in _alarms("entropy_jump", [1.0, 9.0], window=1)] == [1]  # unless one was asked for


def test_steps_without_the_metric_are_no_news() -> None:
    assert [a.step for a in _alarms("timeouts", [None, 0.2, None, 0.2])] == [1]
    assert alarms_of("stage1", [{"step": 0, "loss/sft": 3.0}], AlarmsConfig()) == []


def test_a_rule_can_be_left_out() -> None:
    assert _alarms("timeouts", [1.0], enabled=False) == []


SERIES = st.lists(st.floats(0.0, 100.0, allow_nan=False), max_size=40)
RULES = st.sampled_from(sorted(METRICS))


@settings(deadline=None)
@given(rule=RULES, values=SERIES, cut=st.integers(0, 40), window=st.integers(1, 6))
def test_more_steps_change_no_alarm_of_before(rule: str, values: list[float], cut: int, window: int) -> None:
    whole = _alarms(rule, list(values), window=window)
    assert _alarms(rule, list(values[:cut]), window=window) == [alarm for alarm in whole if alarm.step < cut]


@settings(deadline=None)
@given(value=st.floats(0.0, 0.04), steps=st.integers(0, 40))
def test_a_series_that_stands_still_raises_none(value: float, steps: int) -> None:
    for rule in METRICS:
        assert _alarms(rule, [value] * steps) == []


@settings(deadline=None)
@given(rule=RULES, values=SERIES)
def test_alarms_of_one_rule_are_apart(rule: str, values: list[float]) -> None:
    """Between two there is a step on which the condition did not hold."""
    steps = [alarm.step for alarm in _alarms(rule, list(values), window=1)]
    assert all(later - earlier >= 2 for earlier, later in pairwise(steps))


def test_a_rule_given_in_part_keeps_its_other_values() -> None:
    recipe = load_recipe("miniature", ["alarms.length.stop=true", "alarms.clip_ratio.threshold=0.2"])
    assert (recipe.alarms.length.threshold, recipe.alarms.length.window, recipe.alarms.length.stop) == (2.0, 5, True)
    assert (recipe.alarms.clip_ratio.threshold, recipe.alarms.clip_ratio.window) == (0.2, 5)


def test_rules_change_no_run_and_may_change_on_resume() -> None:
    plain, strict = load_recipe("miniature"), load_recipe("miniature", ["alarms.length.stop=true"])
    assert unsafe_changes(plain, strict) == []
    dumped = Recipe.model_validate_json(json.dumps(plain.model_dump(mode="json")))
    assert config_hash(dumped) == config_hash(plain)
    assert "alarms" not in plain.model_dump(exclude_defaults=True)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("alarms.lenght.stop=true", "unknown field, did you mean 'length'"),
        ("alarms.length.thresold=1", "unknown field, did you mean 'threshold'"),
        ("alarms.length.window=0", "alarms.length.window"),
        ("alarms.length=3", "alarms.length"),
    ],
)
def test_bad_input(override: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe("miniature", [override])
