"""Conditions on rollouts, as users give them, and as SQL over the index."""

from dataclasses import dataclass, fields
from typing import Any

from kdrl_core.config import did_you_mean
from kdrl_core.errors import DataError
from kdrl_core.look.rollouts.index_rows import INDEX
from kdrl_core.look.rollouts.record import RECORD
from kdrl_core.types import FinishReason, VerdictKind


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutFilter:
    """Conditions on rollouts. A rollout must meet all that are given; None is no condition."""

    run: str | None = None
    stage: str | None = None
    step_min: int | None = None
    step_max: int | None = None
    prompt_id: str | None = None
    sample: int | None = None
    verdicts: tuple[str, ...] | None = None
    finish_reason: str | None = None
    reward_min: float | None = None
    reward_max: float | None = None
    length_min: float | None = None
    length_max: float | None = None
    kl_min: float | None = None
    kl_max: float | None = None
    """Of `kl_mean`, the mean over the response's tokens."""
    text: str | None = None
    """Part of the prompt or the response; capitals and small letters are the same."""

    def __post_init__(self) -> None:
        """Raise DataError for an unknown verdict or finish reason."""
        for name, given, known in (
            ("verdict", self.verdicts or (), [kind.value for kind in VerdictKind]),
            ("finish reason", (self.finish_reason,) if self.finish_reason else (), [one.value for one in FinishReason]),
        ):
            for word in given:
                if word not in known:
                    raise DataError(f"no {name} {word!r}{did_you_mean(word, known)}; there are {', '.join(known)}")

    def conditions(self) -> tuple[str, list[Any]]:
        """SQL over the index's columns, and its parameters. Without `text`: texts are not in the index."""
        parts, parameters = ["true"], []
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or field.name == "text":
                continue
            if field.name == "verdicts":
                parts.append(f"verdict in ({', '.join('?' * len(value))})" if value else "false")
                parameters.extend(value)
                continue
            column, operator = _CONDITIONS.get(field.name, (field.name, "="))
            parts.append(f"{column} {operator} ?")
            parameters.append(value)
        return " and ".join(parts), parameters


_CONDITIONS = {
    f"{name}_{end}": (column, operator)
    for name, column in (("step", "step"), ("reward", "reward"), ("length", "length"), ("kl", "kl_mean"))
    for end, operator in (("min", ">="), ("max", "<="))
}

SORTABLE = ("run", *(name for name in INDEX.names if name not in ("row", "response_preview")))


def order_by(sort: str, *, descending: bool) -> str:
    """`order by` of a sort column. Equal rollouts are sorted by run, stage, step and row.

    Raises:
        DataError: there is no such column; the message names the nearest.
    """
    if sort not in SORTABLE:
        near = (
            "" if sort in RECORD.names else did_you_mean(sort, SORTABLE)
        )  # a known column that cannot be sorted by is no typing error
        raise DataError(f"cannot sort by {sort!r}{near}; columns: {', '.join(SORTABLE)}")
    direction = "desc" if descending else "asc"
    if sort == "step":
        return f"order by run, stage {direction}, step {direction}, row"
    return f"order by {sort} {direction} nulls last, run, stage, step, row"
