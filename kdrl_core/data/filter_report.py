"""The report of the data filter: how many rows each rule dropped. Its numbers add up."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleCount:
    """How many rows a rule dropped, out of the rows that earlier rules had kept."""

    rule: str
    dropped: int
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterReport:
    """The filter of one stage: `rows_in − Σ dropped = rows_out`. Rules are in the order in which they were applied.

    A rule that the recipe does not set is listed as off, with 0 dropped, so that two reports compare line by line.
    """

    stage: str
    rows_in: int
    rules: tuple[RuleCount, ...]
    rows_out: int
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What a reader should know of single rows, in words: reasons and places. They depend on the order of the input."""

    def __post_init__(self) -> None:
        left = self.rows_in - sum(rule.dropped for rule in self.rules)
        if left != self.rows_out or self.rows_out < 0 or any(rule.dropped < 0 for rule in self.rules):
            raise ValueError(f"filter report of {self.stage}: rules leave {left} rows, rows_out is {self.rows_out}")

    def dropped(self, rule: str) -> int:
        """Rows that the named rule dropped. Raises KeyError for an unknown rule."""
        return {count.rule: count.dropped for count in self.rules}[rule]

    def to_json(self) -> dict[str, Any]:
        """Plain values for data/filter.json."""
        rules = [{"rule": r.rule, "dropped": r.dropped, "description": r.description} for r in self.rules]
        found = {"stage": self.stage, "rows_in": self.rows_in, "rules": rules, "rows_out": self.rows_out}
        return {**found, "notes": list(self.notes)} if self.notes else found

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The report that `to_json` wrote. Raises ValueError if it does not add up."""
        rules = tuple(RuleCount(**rule) for rule in values["rules"])
        return cls(
            stage=values["stage"],
            rows_in=values["rows_in"],
            rules=rules,
            rows_out=values["rows_out"],
            notes=tuple(values.get("notes", ())),
        )

    def lines(self) -> list[tuple[RuleCount, int]]:
        """Each rule with the number of rows that it left."""
        left = itertools.accumulate((-rule.dropped for rule in self.rules), initial=self.rows_in)
        return list(zip(self.rules, itertools.islice(left, 1, None), strict=True))

    def to_text(self) -> str:
        """A table for terminals: rule, rows dropped, rows left, description."""
        rows = [("rule", "dropped", "left", "description"), ("rows in", "", str(self.rows_in), "")]
        rows += [(rule.rule, str(rule.dropped), str(left), rule.description) for rule, left in self.lines()]
        rows.append(("rows out", "", str(self.rows_out), ""))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            f"{name:<{widths[0]}}  {dropped:>{widths[1]}}  {rest:>{widths[2]}}  {description}".rstrip()
            for name, dropped, rest, description in rows
        ]
        return "\n".join([f"filter of {self.stage}", *lines, *self.notes])
