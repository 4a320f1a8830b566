"""A page far down the table at the price of the first.

Sorted by step, rows lie as the steps do, and how many each step has is known: so a page is asked of the steps that it
lies in, and nobody sorts and skips millions of rows. Other orders, and filters that look into rows, go to the store.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any

from kdrl_core.rollouts.query import Page, RolloutFilter, RolloutStore

_OF_STEPS = ("run", "stage", "step_min", "step_max")


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of consecutive steps of one stage: `limit` of them, after the first `offset`."""

    where: RolloutFilter
    limit: int
    offset: int


def page_of(store: RolloutStore, where: RolloutFilter, *, sort: str, descending: bool, limit: int, offset: int) -> Page:
    """`store.page(…)`, the same rows in the same order."""
    if sort != "step" or any(
        getattr(where, one.name) is not None for one in fields(where) if one.name not in _OF_STEPS
    ):
        return store.page(where, sort=sort, descending=descending, limit=limit, offset=offset)
    steps = [
        step
        for step in store.steps(run=where.run, stage=where.stage)
        if (where.step_min is None or step["step"] >= where.step_min)
        and (where.step_max is None or step["step"] <= where.step_max)
    ]
    steps.sort(key=lambda step: (step["stage"], step["step"]), reverse=descending)
    steps.sort(key=lambda step: str(step["run"]))  # runs come in their order either way
    rows: list[dict[str, Any]] = []
    for part in _parts(steps, limit, offset):
        found = store.page(part.where, sort=sort, descending=descending, limit=part.limit, offset=part.offset)
        rows += found.rows
    return Page(total=sum(step["num_rollouts"] for step in steps), rows=rows)


def _parts(steps: Sequence[dict[str, Any]], limit: int, offset: int) -> Iterator[_Part]:
    """The stages' parts of rows `offset` to `offset + limit` of all rows of `steps`, which are in the order of rows."""
    begin = 0
    for (run, stage), of_stage in groupby(steps, key=lambda step: (step["run"], step["stage"])):
        covered: list[int] = []
        first = taken = 0
        for step in of_stage:
            end = begin + step["num_rollouts"]
            if begin < offset + limit and end > offset:
                if not covered:
                    first = begin
                covered.append(step["step"])
                taken = end
            begin = end
        if covered:
            where = RolloutFilter(run=run, stage=stage)
            start = max(offset, first)
            yield _Part(
                where=replace(where, step_min=min(covered), step_max=max(covered)),
                limit=min(offset + limit, taken) - start,
                offset=start - first,
            )
