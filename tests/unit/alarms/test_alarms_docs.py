"""docs/alarms.md says what the code does: its table has the defaults, its automation is one that Prefect takes."""

import re
from pathlib import Path

import yaml
from prefect.automations import AutomationCore
from prefect.server.events.schemas.automations import EventTrigger
from prefect.server.events.schemas.events import Resource

from kdrl_core.config.alarms import AlarmsConfig, FallRule, FloorRule, JumpRule, ThresholdRule

TEXT = (Path(__file__).parents[3] / "docs" / "alarms.md").read_text(encoding="utf-8")
RULES = AlarmsConfig().rules


def test_the_table_has_every_rule_with_its_defaults() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("| `")
    ]
    assert [row[0].strip("`") for row in rows] == list(RULES)
    for name, metric, condition, patience, severity in rows:
        rule = RULES[name.strip("`")]
        assert metric == f"`{rule.metric}`"
        assert (patience, severity) == (f"{rule.patience} steps", rule.severity)
        if isinstance(rule, FallRule):
            assert f"`share` {100 * rule.share:.0f} %" in condition
            assert f"`window` {rule.window} steps" in condition
            assert f"`min_best` {rule.min_best}" in condition
        elif isinstance(rule, ThresholdRule):
            assert f"`above` {rule.above}" in condition
            assert rule.less is None or f"`less` `{rule.less}`" in condition
            assert not rule.min_clip_ratio or f"`min_clip_ratio` {100 * rule.min_clip_ratio:.0f} %" in condition
        elif isinstance(rule, FloorRule):
            assert f"`at_most` {rule.at_most}" in condition
        else:
            assert isinstance(rule, JumpRule)
            assert rule.window == 10
            assert f"by {rule.min_change:g}" in condition or f"`min_change` {rule.min_change:g}" in condition
            assert f"`factor` {rule.factor:g}" in condition or rule.direction == "both"


def test_the_automation_is_valid_and_hears_critical_alarms() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    values = yaml.safe_load(example)
    AutomationCore.model_validate(values)  # as the command line reads it
    trigger = EventTrigger.model_validate(values["trigger"])  # as the server does
    assert trigger.expects("kdrl.alarm.reward_collapse")
    assert not trigger.expects("kdrl.other")
    labels = {"prefect.resource.id": "kdrl.run.r", "kdrl.severity": "critical"}
    assert trigger.match.matches(Resource(labels))
    assert not trigger.match.matches(Resource({**labels, "kdrl.severity": "warning"}))
