"""What changed between two sides: the arithmetic by hand, and sides that share nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from rollout_runs import GROUP_SIZE, PROMPTS, make_run, publish, step_table, write_step

from kdrl_core.errors import DataError
from kdrl_core.look.rollouts.diff import compare
from kdrl_core.look.rollouts.query import RolloutFilter, RolloutStore


def at(step: int, **others: str) -> RolloutFilter:
    return RolloutFilter(step_min=step, step_max=step, **others)  # type: ignore[arg-type]


@pytest.fixture
def moved(artifacts: Path) -> Iterator[RolloutStore]:
    """At step 1 q-a is solved twice instead of once, q-b no longer, q-c as before; step 2 draws other prompts."""
    run = make_run(artifacts, "moved", steps=1)
    write_step(run, "stage2", 1, until="teacher")
    rewards = {"reward": [1.0, 1.0, 0.0, 0.0, 0.0, 0.0], "verdict": ["correct"] * 2 + ["wrong"] * 4}
    publish(run, "stage2", 1, "rewards", step_table("rewards", 1, **rewards))
    publish(run, "stage2", 1, "update", step_table("update", 1))
    others = [f"{prompt}2" for prompt in PROMPTS for _ in range(GROUP_SIZE)]
    for part in ("rollouts", "teacher", "rewards", "update"):
        publish(run, "stage2", 2, part, step_table(part, 2, prompt_id=others))
    with RolloutStore.open(["moved"]) as store:
        yield store


def test_two_steps_golden(moved: RolloutStore) -> None:
    found = compare(moved, at(0), at(1), ("before", "after"))
    assert (found.before.label, found.before.num_rollouts, found.before.num_prompts) == ("before", 6, 3)
    assert (found.before.reward_mean, found.after.reward_mean) == pytest.approx((1 / 3, 1 / 3))
    assert found.before.kl_mean == pytest.approx(11.6 / 84)
    assert found.before.verdicts == pytest.approx(
        {"correct": 1 / 3, "malformed": 1 / 6, "no_answer": 1 / 6, "wrong": 1 / 3}
    )
    assert [change.prompt_id for change in found.prompts] == ["q-a", "q-b", "q-c"]  # by change, then by name
    first, second, third = found.prompts
    assert (first.reward, first.reward_change, first.correct, first.num_rollouts) == ((0.5, 1.0), 0.5, (1, 2), (2, 2))
    assert (first.verdict, first.length) == (("correct", "correct"), (6.0, 6.0))
    assert first.kl == pytest.approx((1.2 / 12, 1.2 / 12))
    assert (second.correct, second.verdict) == ((1, 0), ("correct", "wrong"))
    assert (third.reward_change, third.verdict) == (0.0, ("no_answer", "wrong"))
    assert found.counts == {
        "common": 3,
        "better": 1,
        "worse": 1,
        "same": 1,
        "newly_solved": 0,
        "no_longer_solved": 1,
        "other_verdict": 2,
    }
    assert found.to_json()["prompts"][0]["reward"] == (0.5, 1.0)


def test_sides_that_share_no_problem(moved: RolloutStore) -> None:
    found = compare(moved, at(0), at(2), ("a", "b"))
    assert (found.prompts, found.counts["common"]) == ([], 0)
    assert found.before.reward_mean == found.after.reward_mean


def test_a_side_without_rollouts_is_refused(moved: RolloutStore) -> None:
    with pytest.raises(
        DataError, match="there are no rollouts of step 9; kdrl rollouts stats shows which steps there are"
    ):
        compare(moved, at(0), at(9), ("step 0", "step 9"))


def test_two_runs(moved: RolloutStore, artifacts: Path) -> None:
    make_run(artifacts, "other", steps=1)
    with RolloutStore.open(["moved", "other"]) as store:
        found = compare(store, at(1, run="moved"), at(0, run="other"), ("moved", "other"))
        assert [change.reward_change for change in found.prompts] == [-0.5, 0.5, 0.0]
