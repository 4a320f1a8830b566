"""The types of a run's graph: an `Artifact` is a row of the table in `kdrl_core.ledger.graph`, a `Node` an instance."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from kdrl_core.config import Recipe, StageConfig

EVERY = "*"
"""In place of the number of a shard: all shards. Their number depends on the pool alone."""

At = int | str | None
"""Step or shard, label of an evaluated model, or None if a run or a stage has only one."""


@dataclass(frozen=True, slots=True)
class Node:
    """One artifact of one run."""

    name: str
    """Name of its row: `rollouts`, `checkpoint`, …"""
    stage: str | None = None
    at: At = None

    @property
    def row(self) -> "Artifact":
        """Its row of the table."""
        return ARTIFACTS[self.name] if self.name in ARTIFACTS else DERIVED[self.name]

    @property
    def place(self) -> str:
        """Path relative to the run; a glob pattern if `at` is EVERY."""
        return self.row.place(self.stage, self.at)


Choice = tuple[Node, ...]
"""Alternatives for one input of a node: it is made from the first of them that is published."""


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A row of the table."""

    name: str
    pattern: str
    """Place in the run, with `{stage}`, and `{step:06d}`, `{shard:06d}` or `{label}` where a stage or run has many."""
    needs: Callable[[Recipe, Node], tuple[Choice, ...]] = lambda recipe, node: ()
    """Inputs of a node of the row. Models outside of the run are not nodes."""
    when: Callable[[StageConfig], bool] = lambda config: True
    """Whether a stage has it."""
    schemas: tuple[str, ...] = ()
    """Names in `kdrl_core.tables.schemas`; a file has one of them. Empty for a folder or JSON."""
    is_wide: Callable[[Recipe, str], bool] = lambda recipe, stage: recipe.stage(stage).needs_topk
    """Whether its file has the last of `schemas` in a stage of a recipe: the teacher's for Top-K (A.3)."""
    reads: Callable[[Recipe, Node], tuple[str, ...]] = lambda recipe, node: ()
    """`CLAIMED` fields that it depends on; the fields of its inputs count too. `!` excludes fields again."""
    shared_as: str | None = "{stage}"
    """The part of a run that it belongs to when runs share their work; None: every run makes its own."""
    is_exact: bool = True
    """Whether it has the same bytes when it is made again. An artifact that holds times has not."""
    by_model: bool = False
    """Whether a model computes it. Then it has the same bytes again only where `Recipe.is_exact` holds."""
    follows: bool = False
    """Whether it is made again after its inputs are. If so, its inputs need not keep their bytes."""
    is_pruned: bool = False
    """Whether the retention may delete it."""

    def schema_in(self, recipe: Recipe, stage: str) -> str:
        """Which of `schemas` its file has in a stage of a recipe."""
        return self.schemas[-1 if self.is_wide(recipe, stage) else 0]

    def node(self, stage: str | None = None, at: At = None) -> Node:
        """The row's artifact of a stage, step, shard or label."""
        return Node(self.name, stage, at)

    def place(self, stage: str | None = None, at: At = None) -> str:
        """Path of such a node relative to the run."""
        pattern = self.pattern if isinstance(at, int) else self.pattern.replace(":06d", "")
        return pattern.format(stage=stage, step=at, shard=at, label=at)

    def find(self, place: str) -> Node | None:
        """The node that lies at `place`; None if that place is not of this row."""
        if (match := self._regex.fullmatch(place)) is None:
            return None
        found = match.groupdict()
        number = found.get("step") or found.get("shard")
        return self.node(found.get("stage"), int(number) if number is not None else found.get("label"))

    @cached_property
    def per(self) -> str | None:
        """What tells its nodes apart: `step`, `shard` or `label`; None if a stage or run has only one."""
        return next((name for name in ("step", "shard", "label") if f"{{{name}" in self.pattern), None)

    @cached_property
    def is_of_stage(self) -> bool:
        """Whether each stage has its own."""
        return "{stage}" in self.pattern

    @cached_property
    def glob(self) -> str:
        """Glob pattern of the places of all its nodes."""
        return re.sub(r"\{.*?\}", "*", self.pattern)

    @property
    def file(self) -> str:
        """Last part of its pattern: of a file, its name."""
        return self.pattern.rpartition("/")[2]

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        text = re.sub(r"\\\{(\w+):06d\\\}", r"(?P<\1>\\d{6,})", re.escape(self.pattern))
        return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", text))


ARTIFACTS: dict[str, Artifact] = {}
"""Every row by its name, in the order in which a run makes them."""

DERIVED: dict[str, Artifact] = {}
"""Files that are rebuilt from the manifests of updates. They have no manifests of their own, and nothing needs them."""
