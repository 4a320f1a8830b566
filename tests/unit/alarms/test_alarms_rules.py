"""The rules' arithmetic by hand, and what must hold of any series."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdrl_core.alarms import _LOOK_AT, Alarm, raised_at_last
from kdrl_core.config.alarms import DEFAULTS, AlarmRule, AlarmsConfig, FallRule, FloorRule, JumpRule, ThresholdRule

RULES = AlarmsConfig().rules


def raised(rows: Sequence[Mapping[str, Any]], rules: Mapping[str, AlarmRule]) -> list[Alarm]:
    """What every step raises, as a run does: each from the rows up to it."""
    return [alarm for end in range(1, len(rows) + 1) for alarm in raised_at_last(rows[:end], rules, stage="stage2")]


def series(metric: str, values: Sequence[float | None], **others: float) -> list[dict[str, Any]]:
    return [{"step": step, metric: value, **others} for step, value in enumerate(values)]


def steps_of(metric: str, values: Sequence[float | None], rule: AlarmRule, **others: float) -> list[int]:
    return [alarm.step for alarm in raised(series(metric, values, **others), {"r": rule})]


def test_reward_collapse_golden() -> None:
    rule = FallRule(metric="reward/mean", share=0.3, window=2, patience=2)
    # means of 2   –    0.40  0.50  0.45  0.30  0.20  0.20     best so far 0.50, threshold 0.7 · 0.50 = 0.35
    values = [0.3, 0.5, 0.5, 0.4, 0.2, 0.2, 0.2]
    # steps 4 (0.30) and 5 (0.20) are below 0.35: the second in a row is step 5; step 6 tells nothing new
    (alarm,) = raised(series("reward/mean", values), {"reward_collapse": rule})
    assert (alarm.step, alarm.since, alarm.rule, alarm.stage) == (5, 4, "reward_collapse", "stage2")
    assert (alarm.value, alarm.threshold) == (pytest.approx(0.2), pytest.approx(0.35))
    assert alarm.text == (
        "reward/mean fell: its mean over 2 steps is 0.2, 60 % below its best so far, 0.5, 2 steps in a row"
    )


def test_a_collapse_is_told_again_after_a_recovery() -> None:
    rule = FallRule(metric="reward/mean", share=0.3, window=1, patience=1)
    assert steps_of("reward/mean", [0.5, 0.2, 0.2, 0.5, 0.2], rule) == [1, 4]


def test_a_fall_exactly_to_the_threshold_is_none() -> None:
    rule = FallRule(metric="reward/mean", share=0.5, window=1)
    assert steps_of("reward/mean", [0.5, 0.25], rule) == []
    assert steps_of("reward/mean", [0.5, math.nextafter(0.25, 0)], rule) == [1]


def test_a_reward_that_never_rose_cannot_collapse() -> None:
    rule = FallRule(metric="reward/mean", share=0.3, window=1, min_best=0.05)
    assert steps_of("reward/mean", [0.04, 0.0], rule) == []
    assert steps_of("reward/mean", [0.05, 0.0], rule) == [1]


@pytest.mark.parametrize("rule", ["clip_ratio", "logprob_gap", "timeouts"])
def test_thresholds_golden(rule: str) -> None:
    config = RULES[rule]
    assert isinstance(config, ThresholdRule)
    low, high = config.above, config.above * 1.01
    values = [high] * (config.patience - 1) + [low] + [high] * (config.patience + 2)
    # the streak is broken by a step that is at the threshold, not above it
    (alarm,) = raised(series(config.metric, values), {rule: config})
    assert (alarm.step, alarm.since) == (2 * config.patience - 1, config.patience)
    assert (alarm.value, alarm.threshold, alarm.severity) == (high, config.above, config.severity)
    assert alarm.text == f"{config.metric} is {high:.4g}, above {low:.4g}, {config.patience} steps in a row"


def test_a_run_without_any_reward_is_told_once() -> None:
    rule = RULES["no_reward"]
    assert isinstance(rule, FloorRule)
    dead = [0.0] * (rule.patience - 1)
    assert steps_of("reward/mean", [*dead, 1 / 1024, *dead], rule) == []  # one response is enough
    (alarm,) = raised(series("reward/mean", [*dead, 0.0, 0.0, 0.0]), {"no_reward": rule})
    assert (alarm.step, alarm.since, alarm.severity) == (rule.patience - 1, 0, "critical")
    assert alarm.text == f"reward/mean is 0, not above 0, {rule.patience} steps in a row"


def test_right_answers_in_a_wrong_format_golden() -> None:
    rule = RULES["format_wrong"].model_copy(update={"patience": 2})
    assert isinstance(rule, ThresholdRule)
    # accuracy − reward    0.11  0.1   0.2   0.4: the last two are above 0.1, two in a row
    accuracy = [0.11, 0.5, 0.6, 0.8]
    rewards = [0.0, 0.4, 0.4, 0.4]
    rows = series("reward/accuracy", accuracy)
    for row, reward in zip(rows, rewards, strict=True):
        row["reward/mean"] = reward
    (alarm,) = raised(rows, {"format_wrong": rule})
    assert (alarm.step, alarm.since, alarm.value) == (3, 2, pytest.approx(0.4))
    assert alarm.text == "reward/accuracy minus reward/mean is 0.4, above 0.1, 2 steps in a row"
    for row in rows:
        row["reward/mean"] = row["reward/accuracy"]  # the format is not required
    assert raised(rows, {"format_wrong": rule}) == []
    del rows[2]["reward/mean"]  # a step without the other metric is passed over
    assert raised(rows, {"format_wrong": rule}) == []


def test_a_template_that_closes_the_thought_unnoticed_raises_both() -> None:
    """Format 0 for ever, however right the answers are."""
    rows = [{"step": step, "reward/mean": 0.0, "reward/format": 0.0, "reward/accuracy": 0.4} for step in range(8)]
    assert [(alarm.rule, alarm.step) for alarm in raised(rows, RULES)] == [("no_reward", 4), ("format_wrong", 4)]


def test_repetition_counts_where_enough_is_cut() -> None:
    rule = RULES["repetition"].model_copy(update={"patience": 2})
    values = [0.9, 0.9, 0.9, 0.9]
    cut = [0.06, 0.01, 0.05, 0.5]  # step 1 says little: too few responses; 0, 2 and 3 count, 2 is the second in a row
    rows = series("response/repetition_overlong", values)
    for row, share in zip(rows, cut, strict=True):
        row["response/clip_ratio"] = share
    assert [alarm.step for alarm in raised(rows, {"repetition": rule})] == [2]
    for row in rows:
        del row["response/clip_ratio"]
    assert raised(rows, {"repetition": rule}) == []


def test_kl_jump_golden() -> None:
    rule = JumpRule(metric="kd/kl_unmasked", factor=3.0, min_change=0.1, window=4, patience=2)
    # median of 0.1 0.2 0.3 0.4 is 0.25: 0.25 + max(0.1, 2 · 0.25) = 0.75; then of 0.2 0.3 0.4 0.8: 0.35 + 0.7 = 1.05
    assert steps_of("kd/kl_unmasked", [0.1, 0.2, 0.3, 0.4, 0.8, 1.0], rule) == []
    (alarm,) = raised(series("kd/kl_unmasked", [0.1, 0.2, 0.3, 0.4, 0.8, 1.1]), {"kl_jump": rule})
    assert (alarm.step, alarm.since, alarm.value) == (5, 4, 1.1)
    assert alarm.threshold == pytest.approx(1.05)
    assert alarm.text.startswith("kd/kl_unmasked rose to 1.1 from 0.35, the median of the 4 steps before, 2 steps")


def test_a_small_kl_has_to_move_by_min_change() -> None:
    rule = JumpRule(metric="ref/kl", factor=5.0, min_change=0.1, window=2)
    assert steps_of("ref/kl", [0.001, 0.001, 0.1], rule) == []
    assert steps_of("ref/kl", [0.001, 0.001, 0.102], rule) == [2]
    # a k1 estimate may be negative: −0.2 + max(0.1, 4 · 0.2) = 0.6
    assert steps_of("ref/kl", [-0.2, -0.2, 0.59], rule) == []
    assert steps_of("ref/kl", [-0.2, -0.2, 0.61], rule) == [2]


def test_entropy_jumps_either_way() -> None:
    rule = JumpRule(metric="entropy", factor=2.0, min_change=0.1, window=2, direction="both")
    assert steps_of("entropy", [0.5, 0.5, 1.0], rule) == [2]
    assert steps_of("entropy", [0.5, 0.5, 0.25], rule) == [2]  # 0.5 − max(0.1, 0.5 · 0.5)
    assert steps_of("entropy", [0.5, 0.5, 0.26], rule) == []
    (alarm,) = raised(series("entropy", [0.5, 0.5, 0.2]), {"entropy_jump": rule})
    assert "entropy fell to 0.2 from 0.5" in alarm.text
    down = rule.model_copy(update={"direction": "down"})
    assert steps_of("entropy", [0.5, 0.5, 1.0], down) == []


def test_length_explosion_golden() -> None:
    rule = RULES["length_explosion"]
    assert isinstance(rule, JumpRule)
    calm = [100.0] * 10
    assert steps_of("response/length_mean", [*calm, 199.0, 199.0, 199.0], rule) == []
    assert steps_of("response/length_mean", [*calm, 200.0, 210.0, 250.0], rule) == [12]
    assert steps_of("response/length_mean", [*calm, 20.0, 20.0, 20.0], rule) == []  # shorter is no explosion
    grows = [100.0 * 1.03**step for step in range(100)]  # 19 times longer in 100 steps, as R1-Zero does
    assert steps_of("response/length_mean", grows, rule) == []


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_steps_without_a_number_are_passed_over(value: float | None) -> None:
    rule = ThresholdRule(metric="entropy", above=1.0, patience=2)
    assert steps_of("entropy", [2.0, value, 2.0], rule) == [2]
    assert steps_of("entropy", [2.0, 2.0, value], rule) == [1]


NUMBERS = st.floats(-10.0, 10.0)
ROWS = st.lists(st.fixed_dictionaries({rule.metric: st.none() | NUMBERS for rule in RULES.values()}), max_size=30).map(
    lambda rows: [{"step": step, **row} for step, row in enumerate(rows)]
)


@st.composite
def rules(draw: st.DrawFn) -> dict[str, AlarmRule]:
    """One of each kind, quick to tell."""
    patience = draw(st.integers(1, 3))
    window = draw(st.integers(1, 4))
    return {
        "fall": FallRule(metric="reward/mean", share=draw(st.floats(0.01, 0.99)), window=window, patience=patience),
        "threshold": ThresholdRule(metric="response/clip_ratio", above=draw(NUMBERS), patience=patience),
        "jump": JumpRule(
            metric="entropy",
            factor=draw(st.floats(1.01, 5.0)),
            min_change=draw(st.floats(0.01, 1.0)),
            direction=draw(st.sampled_from(["up", "down", "both"])),
            window=2 * patience + window,
            patience=patience,
        ),
    }


@given(rows=ROWS, rules=rules(), cut=st.integers(0, 30))
@settings(deadline=None)
def test_what_a_step_raises_does_not_depend_on_later_steps(
    rows: list[dict[str, Any]], rules: dict[str, AlarmRule], cut: int
) -> None:
    before = raised(rows[:cut], rules)
    assert raised(rows, rules)[: len(before)] == before
    assert [alarm for alarm in raised(rows, rules) if alarm.step < cut] == before


@given(value=NUMBERS, length=st.integers(0, 40))
@settings(deadline=None)
def test_a_constant_series_neither_falls_nor_jumps(value: float, length: int) -> None:
    for name, rule in RULES.items():
        if isinstance(rule, FallRule | JumpRule):
            assert raised(series(rule.metric, [value] * length), {name: rule}) == []


@given(value=NUMBERS, length=st.integers(0, 20))
@settings(deadline=None)
def test_a_constant_series_above_its_threshold_is_told_once(value: float, length: int) -> None:
    rule = ThresholdRule(metric="entropy", above=0.0, patience=3)
    expected = [2] if value > 0 and length >= 3 else []
    assert steps_of("entropy", [value] * length, rule) == expected


@given(rows=ROWS, rules=rules())
@settings(deadline=None)
def test_alarms_of_a_rule_lie_patience_apart(rows: list[dict[str, Any]], rules: dict[str, AlarmRule]) -> None:
    for name, rule in rules.items():
        found = [alarm for alarm in raised(rows, rules) if alarm.rule == name]
        assert all(a.step < b.since for a, b in itertools.pairwise(found))
        assert all(alarm.step - alarm.since >= rule.patience - 1 for alarm in found)


def test_no_rows_raise_nothing() -> None:
    assert raised_at_last([], RULES, stage="stage1") == []


def test_every_rule_says_what_to_look_at() -> None:
    assert set(_LOOK_AT) == set(DEFAULTS) == set(RULES)
