"""The differences between two recipes, and which of them allow a run to be resumed."""

import fnmatch
from dataclasses import dataclass
from typing import Any

from kdrl_core.config.recipe import Recipe

SAFE_FIELDS = (
    "description", "stage?.evaluate_every", "stage?.checkpoint.*", "verification.workers",
    "verification.max_failed_share", "teacher.server.urls", "teacher.server.api_key", "teacher.server.timeout_s",
    "teacher.server.retry_for_s", "teacher.server.first_pause_s", "teacher.server.concurrency",
    "teacher.server.sleep", "rollout.server.*", "rollout.sync_tolerance", "vllm.*", "trainer.*", "tracking.*",
    "alarms.*",
)  # fmt: skip
"""Fields that change no published result, so a run may be resumed with new values of them.

Fields of `vllm` and `trainer` change the order of sums, hence the last bits of later updates, as other hardware does
too. They are safe because a stage must be able to go on with the ranks that are left. All trainers write the same
checkpoints."""

MORE_IS_SAFE = ("stage?.steps",)
"""Numbers that may grow as long as no later stage has begun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldChange:
    """One field that differs."""

    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.field}: {self.old!r} → {self.new!r}"


def diff_recipes(old: Recipe, new: Recipe) -> list[FieldChange]:
    """Every leaf field that differs between two recipes, in the order of the fields."""
    before, after = leaf_fields(old), leaf_fields(new)
    return [
        FieldChange(field=field, old=before.get(field), new=after.get(field))
        for field in dict.fromkeys([*before, *after])
        if before.get(field) != after.get(field)
    ]


def unsafe_changes(old: Recipe, new: Recipe) -> list[FieldChange]:
    """The differences that forbid resuming a run of `old` with `new`."""
    return [change for change in diff_recipes(old, new) if not _is_safe(change, new)]


def _is_safe(change: FieldChange, new: Recipe) -> bool:
    if any(fnmatch.fnmatch(change.field, pattern) for pattern in SAFE_FIELDS):
        return True
    grows = isinstance(change.old, int) and isinstance(change.new, int) and change.new > change.old
    is_last_stage = change.field.split(".")[0] == new.stages[-1]
    return grows and is_last_stage and any(fnmatch.fnmatch(change.field, pattern) for pattern in MORE_IS_SAFE)


def leaf_fields(recipe: Recipe) -> dict[str, Any]:
    """Every field of a recipe that is not a section, by its path: `stage2.beta.init`."""
    return leaves(recipe.model_dump(mode="json"))


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """The same of plain values."""
    if isinstance(value, dict) and value:
        return {k: v for key, child in value.items() for k, v in leaves(child, f"{prefix}{key}.").items()}
    return {prefix.removesuffix("."): value}
