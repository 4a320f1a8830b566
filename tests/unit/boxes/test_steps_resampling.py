"""Dynamic sampling: groups that teach nothing make room for others, and the run tells which and why."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from crash.tiny_run import differing, open_tiny, rows, train

from kdrl_core.boxes.resampling import resampled, spare_problems
from kdrl_core.ledger import Run, manifest_of, prompts_of_step
from kdrl_core.tables.files import load_metrics

GRPO = ["stage1=null", "stage2.steps=3", "stage2.objective=grpo", "stage2.beta=null", "stage2.max_response_tokens=44"]
FIELDS = [*GRPO, "stage2.dynamic_sampling_rounds=2", "stage2.checkpoint.every=2"]


def by_hand(rounds: int, spare: Sequence[str]) -> tuple[list[str], dict[str, Any], list[list[str]]]:
    """A step of a, b, c with two responses each, whose rewards are the digits below."""
    rewards = {"a": (1, 1), "b": (0, 1), "c": (0, 0), "d": (1, 1), "e": (1, 0), "f": (0, 0), "g": (0, 1)}
    asked = []

    def table(names: Sequence[str]) -> pa.Table:
        return pa.table({"prompt_id": [name for name in names for _ in range(2)], "length": [5, 7] * len(names)})

    def sample(names: Sequence[str]) -> pa.Table:
        asked.append(list(names))
        return table(names)

    def judge(found: pa.Table) -> tuple[list[float], list[bool], list[bool]]:
        names = found["prompt_id"].to_pylist()[::2]
        values = [float(reward) for name in names for reward in rewards[name]]
        return values, [len(set(rewards[name])) > 1 for name in names for _ in range(2)], [True] * len(values)

    found, told = resampled(table("abc"), rounds=rounds, group_size=2, spare=iter(spare), sample=sample, judge=judge)
    return found["prompt_id"].to_pylist()[::2], told, asked


def test_groups_are_replaced_in_place_up_to_the_bound() -> None:
    """Round 1: a and c make room for d and e. Round 2: d for f. Round 3: f for g. Mean reward of a, b, c: 3 of 6."""
    names, told, asked = by_hand(1, "defg")
    assert (names, asked) == (["d", "b", "e"], [["d", "e"]])
    assert told["teach_nothing"] == 1  # d, as the last round leaves it
    names, told, asked = by_hand(9, "defg")
    assert (names, asked) == (["g", "b", "e"], [["d", "e"], ["f"], ["g"]])
    assert [(each["round"], each["prompt_id"], each["reward"]) for each in told.pop("dropped")] == [
        (1, "a", 1.0),
        (1, "c", 0.0),
        (2, "d", 1.0),
        (3, "f", 0.0),
    ]
    assert told == {"rounds": 3, "teach_nothing": 0, "reward_mean": 0.5, "num_tokens": 7 * 12}  # a, b, c; d, e; f; g


def test_a_group_of_which_nothing_is_trained_on_is_told_as_such() -> None:
    groups = {name: pa.table({"prompt_id": [name] * 2, "length": [1, 1]}) for name in "abc"}
    judged = {
        "a": ([0.25, 1.0], [False, False], [False, True]),
        "b": ([0.0, 0.0], [False, False], [False, False]),
        "c": ([0.0, 1.0], [True, True], [True, True]),
    }
    found, told = resampled(
        groups["a"],
        rounds=2,
        group_size=2,
        spare=iter("bc"),
        sample=lambda names: groups[names[0]],
        judge=lambda table: judged[table["prompt_id"][0].as_py()],
    )
    assert found["prompt_id"].to_pylist() == ["c", "c"]
    assert [each["reason"] for each in told["dropped"]] == [
        "rewards lie between 0.25 and 1, but overlong_filtering leaves out what differs",
        "all 2 responses were cut, and overlong_filtering leaves them out",
    ]


def test_what_cannot_be_replaced_stays() -> None:
    names, told, asked = by_hand(2, "e")  # one problem is left for two places
    assert (names, asked, told["teach_nothing"]) == (["e", "b", "c"], [["e"]], 1)
    untouched = {**told, "rounds": 0, "dropped": [], "teach_nothing": 2, "num_tokens": 36}
    assert by_hand(2, "") == (["a", "b", "c"], untouched, [])


def test_spare_problems_are_a_shuffle_of_the_step_without_what_it_has() -> None:
    ids = [f"p{number}" for number in range(20)]
    orders = [list(spare_problems(ids, ["p3", "p7"], seed=0, stage="stage2", step=step)) for step in range(2)]
    assert all(sorted(order) == sorted({*ids} - {"p3", "p7"}) for order in orders)
    assert orders[0] != orders[1]
    assert orders[0] == list(spare_problems(ids[::-1], ["p7", "p3"], seed=0, stage="stage2", step=0))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = open_tiny(tmp_path_factory.mktemp("resampled"), "whole", FIELDS)
    train(run)
    return run


@pytest.mark.usefixtures("fast_sessions")
def test_the_ledger_tells_what_was_dropped_and_why(trained: Run) -> None:
    pool = sorted({str(row["problem_id"]) for row in rows(trained.paths.pool)})
    num_dropped = 0
    for step, metrics in enumerate(load_metrics(trained, "stage2")):
        told = manifest_of(trained.paths.rollouts("stage2", step)).metadata["resampling"]
        dropped = [each["prompt_id"] for each in told["dropped"]]
        used = [str(row["prompt_id"]) for row in rows(trained.paths.rollouts("stage2", step))]
        assert set(Counter(used).values()) == {4}
        assert len(set(used)) == 4
        drawn = prompts_of_step(pool, seed=0, stage="stage2", step=step, prompts_per_step=4)
        assert set(drawn) <= {*used, *dropped}
        assert not {*used}.intersection(dropped)
        rewards = np.array([row["reward"] for row in rows(trained.paths.rewards("stage2", step))], float).reshape(4, 4)
        assert (rewards.std(1) == 0).sum() == told["teach_nothing"] == metrics["sampling/teach_nothing"]
        for each in told["dropped"]:
            assert (
                each["reason"]
                == f"all 4 responses have reward {each['reward']:g}; no advantage, and no KD acts on them"
            )
            assert each["reward"] in (0.0, 1.0)
        assert metrics["sampling/dropped_groups"] == len(dropped)
        num_dropped += len(dropped)
    assert num_dropped > 2
    plain = open_tiny(trained.paths.root.parent.parent, "plain", GRPO)
    train(plain, until=("stage2", 1))  # step 0 has the same first prompts and responses
    expected = np.mean([row["reward"] for row in rows(plain.paths.rewards("stage2", 0))])
    assert load_metrics(trained, "stage2")[0]["reward/mean_first"] == pytest.approx(expected)


@pytest.mark.usefixtures("fast_sessions")
def test_a_resumed_run_ends_in_the_same_bytes(trained: Run, tmp_path: Path) -> None:
    run = open_tiny(tmp_path, "stopped", FIELDS)
    train(run, until=("stage2", 1))
    train(open_tiny(tmp_path, "stopped", FIELDS))
    assert differing(run, trained) == []


@pytest.mark.usefixtures("fast_sessions")
def test_where_kd_acts_a_group_stays(tmp_path: Path) -> None:
    """kd_masking=group: groups that have all failed are what KD is for; those that are all right make room."""
    fields = ["stage1=null", "stage2.steps=2", "stage2.kd_masking=group", "stage2.max_response_tokens=44"]
    run = open_tiny(tmp_path, "r", [*fields, "stage2.dynamic_sampling_rounds=1"])
    train(run)
    failed = 0
    for step in range(2):
        told = manifest_of(run.paths.rollouts("stage2", step)).metadata["resampling"]
        assert all(each["reward"] == 1.0 for each in told["dropped"])
        rewards = np.array([row["reward"] for row in rows(run.paths.rewards("stage2", step))], float).reshape(4, 4)
        failed += (rewards.max(1) == 0).sum()
    assert failed > 0
