"""Dynamic sampling (DAPO; not the paper's): groups that teach nothing are replaced before a step is trained on.

A group teaches nothing if neither an advantage nor KD acts on any of its responses. With GRPO these are the groups
whose rewards are equal. Where KD acts on a group, the group teaches, whatever its rewards: KD is most needed where all
responses failed. So KDRL with `kd_masking: group` loses only groups that are all right, and, with `overlong_filtering`,
groups of which every response was cut, whose update has nothing to learn from. Objectives that distil everywhere are
refused by the recipe.

The step keeps its size and its order: a new group takes the place of the one that is dropped. In each round as many
problems are sampled as are missing; what teaches nothing after the last round stays. The new problems come from a
shuffle of the pool for this step alone, without those that the step has sampled. So they depend on nothing but the
recipe, the step and the verdicts, and the passes over the pool go on as if nothing had been replaced.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from kdrl_core.boxes.session import StageSession
from kdrl_core.boxes.step import batch_of, verdicts_of
from kdrl_core.ledger import derive_seed

Judge = Callable[[pa.Table], tuple[Sequence[float], Sequence[bool], Sequence[bool]]]
"""From ROLLOUTS of whole groups to each response's reward, whether an advantage or KD acts on it, and whether it takes
part in the loss at all."""


@dataclass(slots=True, kw_only=True)
class _Group:
    rows: pa.Table
    rewards: Sequence[float]
    teaches: bool
    is_cut: bool
    """No response takes part in the loss."""

    @property
    def reward(self) -> float:
        """Mean of its responses."""
        return sum(self.rewards) / len(self.rewards)


def resampled(
    rollouts: pa.Table,
    *,
    rounds: int,
    group_size: int,
    spare: Iterator[str],
    sample: Callable[[Sequence[str]], pa.Table],
    judge: Judge,
) -> tuple[pa.Table, dict[str, Any]]:
    """Replace groups of a step that teach nothing, in at most `rounds` rounds.

    Args:
        rollouts: ROLLOUTS of the step, the G responses to a problem together.
        spare: problems that may be sampled in place of others, in order.
        sample: ROLLOUTS of these problems, G responses each.

    Returns:
        ROLLOUTS of as many groups, and what the manifest tells: the `rounds` that were made, the groups that were
        `dropped` with the reason, how many groups `teach_nothing` still, `reward_mean` of the responses that were
        sampled first, and `num_tokens` of all responses.
    """

    def groups_of(table: pa.Table) -> list[_Group]:
        rewards, teaches, is_kept = judge(table)
        slices = [slice(start, start + group_size) for start in range(0, len(table), group_size)]
        return [
            _Group(
                rows=table.slice(each.start, group_size),
                rewards=rewards[each],
                teaches=any(teaches[each]),
                is_cut=not any(is_kept[each]),
            )
            for each in slices
        ]

    groups = groups_of(rollouts)
    reward_mean = sum(group.reward for group in groups) / len(groups)
    dropped: list[dict[str, Any]] = []
    made, num_tokens = 0, sum(rollouts["length"].to_pylist())
    while made < rounds:
        places = [place for place, group in enumerate(groups) if not group.teaches]
        names = list(islice(spare, len(places)))
        if not names:
            break
        made += 1
        new_rows = sample(names)
        num_tokens += sum(new_rows["length"].to_pylist())
        for place, new in zip(places, groups_of(new_rows), strict=False):  # the pool may have too few problems
            dropped.append({"round": made, **_told(groups[place])})
            groups[place] = new
    found = {
        "rounds": made,
        "dropped": dropped,
        "teach_nothing": sum(not group.teaches for group in groups),
        "reward_mean": reward_mean,
        "num_tokens": num_tokens,
    }
    return pa.concat_tables([group.rows for group in groups]).combine_chunks(), found


def resample_step(
    session: StageSession, at: int, rollouts: pa.Table, *, sample: Callable[[Sequence[str]], pa.Table]
) -> tuple[pa.Table, dict[str, Any]]:
    """`resampled` of the step `at` of a stage. Raises VerificationError as `verdicts_of` does."""

    judged_s = 0.0

    def judge(table: pa.Table) -> tuple[Sequence[float], Sequence[bool], Sequence[bool]]:
        nonlocal judged_s
        started = time.perf_counter()
        rewards = verdicts_of(session, table, where=f"{session.stage} step {at}").content
        judged_s += time.perf_counter() - started
        assert isinstance(rewards, pa.Table)
        batch = batch_of(session, at, table, rewards)
        beta, signals = batch.objective.kd_beta, zip(batch.advantages, batch.kd_weights, strict=True)
        teaches = [bool(advantage or weight * beta) for advantage, weight in signals]
        return rewards["reward"].to_pylist(), teaches, [bool(kept) for kept in batch.loss_mask or [1.0] * len(table)]

    config, taken = session.config, rollouts["prompt_id"].to_pylist()
    table, found = resampled(
        rollouts,
        rounds=config.dynamic_sampling_rounds,
        group_size=config.group_size,
        spare=spare_problems(list(session.pool), taken, seed=session.run.recipe.seed, stage=session.stage, step=at),
        sample=sample,
        judge=judge,
    )
    return table, {**found, "judged_s": judged_s}


def spare_problems(
    problem_ids: Sequence[str], taken: Sequence[str], *, seed: int, stage: str, step: int
) -> Iterator[str]:
    """The problems that a step has not `taken`, in an order of its own."""
    left = set(problem_ids).difference(taken)
    yield from sorted(left, key=lambda problem: (derive_seed(seed, stage, "replacement", step, problem), problem))


def _told(group: _Group) -> dict[str, Any]:
    lowest, highest = min(group.rewards), max(group.rewards)
    if group.is_cut:
        reason = f"all {len(group.rewards)} responses were cut, and overlong_filtering leaves them out"
    elif lowest == highest:
        reason = f"all {len(group.rewards)} responses have reward {lowest:g}; no advantage, and no KD acts on them"
    else:
        reason = f"rewards lie between {lowest:g} and {highest:g}, but overlong_filtering leaves out what differs"
    return {"prompt_id": group.rows["prompt_id"][0].as_py(), "reward": group.reward, "reason": reason}


def metrics_of(found: dict[str, Any]) -> dict[str, float]:
    """Metrics of a step from what its rollouts' manifest tells."""
    return {
        "sampling/rounds": float(found["rounds"]),
        "sampling/dropped_groups": float(len(found["dropped"])),
        "sampling/teach_nothing": float(found["teach_nothing"]),
        "reward/mean_first": found["reward_mean"],
    }
