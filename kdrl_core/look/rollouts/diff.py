"""Differences between two sets of rollouts: the same problems at two steps, or in two runs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kdrl_core.errors import DataError
from kdrl_core.look.rollouts.index_rows import IS_RIGHT
from kdrl_core.look.rollouts.query import RolloutFilter, RolloutStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """All rollouts of one side in numbers; None if not known."""

    label: str
    num_rollouts: int
    num_prompts: int
    reward_mean: float | None
    length_mean: float | None
    clip_ratio: float | None
    kl_mean: float | None
    verdicts: dict[str, float]
    """Verdict → share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptChange:
    """One problem that is on both sides; `(before, after)`."""

    prompt_id: str
    ground_truth: str | None
    reward: tuple[float | None, float | None]
    correct: tuple[int, int]
    num_rollouts: tuple[int, int]
    verdict: tuple[str | None, str | None]
    """The most frequent one; in a tie, the first in the alphabet."""
    length: tuple[float | None, float | None]
    kl: tuple[float | None, float | None]

    @property
    def reward_change(self) -> float:
        """Mean reward after − mean reward before; 0 if one is not known."""
        before, after = self.reward
        return 0.0 if before is None or after is None else after - before


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Two sides, and the problems on both, sorted by the change of their reward, largest first."""

    before: Side
    after: Side
    prompts: list[PromptChange] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of common problems by how they changed."""
        changes = [prompt.reward_change for prompt in self.prompts]
        return {
            "common": len(changes),
            "better": sum(change > 0 for change in changes),
            "worse": sum(change < 0 for change in changes),
            "same": sum(change == 0 for change in changes),
            "newly_solved": sum(p.correct[0] == 0 < p.correct[1] for p in self.prompts),
            "no_longer_solved": sum(p.correct[1] == 0 < p.correct[0] for p in self.prompts),
            "other_verdict": sum(p.verdict[0] != p.verdict[1] for p in self.prompts),
        }

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "counts": self.counts}


def compare(store: RolloutStore, before: RolloutFilter, after: RolloutFilter, labels: tuple[str, str]) -> Difference:
    """Compare the rollouts that meet two filters. Raises DataError if no rollout meets one of them."""
    sides = [store.aggregate(where, _SQL) for where in (before, after)]
    for rows, label in zip(sides, labels, strict=True):
        if not rows:
            raise DataError(f"there are no rollouts of {label}; kdrl rollouts stats shows which steps there are")
    old, new = ({row["prompt_id"]: row for row in rows} for rows in sides)
    changes = [_change(old[prompt_id], new[prompt_id]) for prompt_id in old if prompt_id in new]
    changes.sort(key=lambda change: (-abs(change.reward_change), change.prompt_id))
    return Difference(before=_side(labels[0], sides[0]), after=_side(labels[1], sides[1]), prompts=changes)


_SQL = f"""
    select prompt_id, any_value(ground_truth) as ground_truth, count(*) as num_rollouts,
        count(reward) as num_rewards, sum(reward)::double as rewards, count(*) filter ({IS_RIGHT}) as num_correct,
        count(length) as num_lengths, sum(length)::double as lengths,
        count(finish_reason) as num_finished, count(*) filter (finish_reason = 'length') as num_clipped,
        sum(kl_sum)::double as kl, sum(length) filter (kl_sum is not null)::double as kl_tokens,
        list(verdict order by verdict) filter (verdict is not null) as verdicts
    from rows group by prompt_id order by prompt_id
"""


def _side(label: str, rows: Sequence[dict[str, Any]]) -> Side:
    def ratio(part: str, whole: str) -> float | None:
        total = sum(row[whole] or 0 for row in rows)
        return sum(row[part] or 0 for row in rows) / total if total else None

    verdicts = [verdict for row in rows for verdict in row["verdicts"] or []]
    return Side(
        label=label,
        num_rollouts=sum(row["num_rollouts"] for row in rows),
        num_prompts=len(rows),
        reward_mean=ratio("rewards", "num_rewards"),
        length_mean=ratio("lengths", "num_lengths"),
        clip_ratio=ratio("num_clipped", "num_finished"),
        kl_mean=ratio("kl", "kl_tokens"),
        verdicts={kind: verdicts.count(kind) / len(verdicts) for kind in sorted(set(verdicts))},
    )


def _change(old: dict[str, Any], new: dict[str, Any]) -> PromptChange:
    def both(part: str, whole: str) -> tuple[float | None, float | None]:
        found = [row[part] / row[whole] if row[whole] else None for row in (old, new)]
        return found[0], found[1]

    return PromptChange(
        prompt_id=old["prompt_id"],
        ground_truth=new["ground_truth"],
        reward=both("rewards", "num_rewards"),
        correct=(old["num_correct"], new["num_correct"]),
        num_rollouts=(old["num_rollouts"], new["num_rollouts"]),
        verdict=(_most_frequent(old["verdicts"]), _most_frequent(new["verdicts"])),
        length=both("lengths", "num_lengths"),
        kl=both("kl", "kl_tokens"),
    )


def _most_frequent(verdicts: list[str] | None) -> str | None:
    return max(sorted(set(verdicts)), key=verdicts.count) if verdicts else None
