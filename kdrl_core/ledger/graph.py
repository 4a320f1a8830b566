"""The artifacts of a run, each declared once: where it lies, what it is made from, when a recipe has it.

    rollouts    rollouts/stage={stage}/step={at:06d}/rollouts.parquet  from pool; checkpoint `at` or update `at − 1`
    rewards     …/rewards.parquet                                      from rollouts
    teacher     …/teacher.parquet       if the stage scores one        from rollouts
    update      …/update.parquet                                       from rollouts, rewards, teacher, reference
    checkpoint  checkpoints/{stage}/step-{at:06d}                      from update `at − 1`

A *node* is one artifact of one run: a row of the table with its stage, and with its step, its shard or its label.
Everything else is derived from the rows: the path of a node, the node of a path, what a node was made from, and what
may have been made from it.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from kdrl_core.config import Recipe, StageConfig

EVERY = "*"
"""In place of the number of a shard: every one that there is."""

At = int | str | None
"""Step or shard, label of an evaluated model, or None for what a run or stage has once."""


@dataclass(frozen=True, slots=True)
class Node:
    """One artifact of one run."""

    name: str
    """Its row: `rollouts`, `checkpoint`, …"""
    stage: str | None = None
    at: At = None

    @property
    def row(self) -> "Artifact":
        """Its row of the table."""
        return ARTIFACTS[self.name]

    @property
    def place(self) -> str:
        """Path relative to the run."""
        return self.row.pattern.format(stage=self.stage, at=self.at)


Choice = tuple[Node, ...]
"""Something that a node is made from: the first of these nodes that is published."""


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A row of the table."""

    name: str
    pattern: str
    """Place in the run, with `{stage}` and `{at}`; `{at:06d}` is a number."""
    needs: Callable[[Recipe, Node], tuple[Choice, ...]] = lambda recipe, node: ()
    """What a node of the row is made from. Models outside of the run are no nodes."""
    when: Callable[[StageConfig], bool] = lambda config: True
    """Whether a stage has it."""
    schema: str | None = None
    """Name of its schema in `kdrl_core.tables.schemas`; None: a folder, or JSON."""
    is_exact: bool = True
    """Whether it has the same bytes when it is made again. What holds times has not."""

    def node(self, stage: str | None = None, at: At = None) -> Node:
        """The row's artifact of a stage, step, shard or label."""
        return Node(self.name, stage, at)

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        text = re.escape(self.pattern).replace(r"\{stage\}", r"(?P<stage>[^/]+)")
        text = text.replace(r"\{at:06d\}", r"(?P<number>\d{6,})").replace(r"\{at\}", r"(?P<label>[^/]+)")
        return re.compile(text)

    def find(self, place: str) -> Node | None:
        """The node that lies at `place`; None if that is no place of this row."""
        if (match := self._regex.fullmatch(place)) is None:
            return None
        found = match.groupdict()
        number = found.get("number")
        return self.node(found.get("stage"), int(number) if number is not None else found.get("label"))


def final_step(recipe: Recipe, stage: str) -> Node:
    """The checkpoint that ends a stage."""
    return CHECKPOINT.node(stage, recipe.stage(stage).steps)


def initial_checkpoint(recipe: Recipe, stage: str) -> Node | None:
    """The checkpoint that a stage starts from; None for the first stage, which starts from the recipe's student."""
    stages = list[str](recipe.stages)
    position = stages.index(stage)
    return final_step(recipe, stages[position - 1]) if position else None


def model_node(recipe: Recipe, label: str) -> Node | None:
    """The checkpoint behind an evaluation's label; None for a model that lies outside of the run."""
    stage, _, step = label.partition("-step-")
    if stage not in recipe.stages:
        return None
    return CHECKPOINT.node(stage, int(step) if step else recipe.stage(stage).steps)


def evaluated_labels(recipe: Recipe) -> list[str]:
    """Labels of the final evaluation: the student before, after each stage, and the teacher."""
    return ["base", *recipe.stages, *(["teacher"] if recipe.teacher is not None else [])]


def _alone(*nodes: Node) -> tuple[Choice, ...]:
    return tuple((node,) for node in nodes)


def _of_pool(recipe: Recipe, node: Node) -> tuple[Choice, ...]:
    return _alone(POOL.node())


def _of_rollouts(recipe: Recipe, node: Node) -> tuple[Choice, ...]:
    return _alone(ROLLOUTS.node(node.stage, node.at))


def _of_samples(recipe: Recipe, node: Node) -> tuple[Choice, ...]:
    return _alone(SAMPLE_ROLLOUTS.node(node.stage, node.at))


def _of_shards(recipe: Recipe, node: Node) -> tuple[Choice, ...]:
    return _alone(SAMPLE_ROLLOUTS.node(node.stage, EVERY), SAMPLE_REWARDS.node(node.stage, EVERY))


def _of_pool_and_policy(recipe: Recipe, node: Node) -> tuple[Choice, ...]:
    """A step's policy is its checkpoint or, where none is kept, the update that made it."""
    assert node.stage is not None
    assert isinstance(node.at, int)
    pool = (POOL.node(),)
    if node.at > 0:
        return pool, (CHECKPOINT.node(node.stage, node.at), UPDATE.node(node.stage, node.at - 1))
    policy = initial_checkpoint(recipe, node.stage)
    return (pool,) if policy is None else (pool, (policy,))


def _of_step(recipe: Recipe, node: Node) -> tuple[Choice, ...]:
    assert node.stage is not None
    config = recipe.stage(node.stage)
    if config.objective == "sft":
        return _alone(SFT_DATASET.node(node.stage))
    rows = (ROLLOUTS, REWARDS, TEACHER, REFERENCE)
    return _alone(*(row.node(node.stage, node.at) for row in rows if row.when(config)))


def _of_update(recipe: Recipe, node: Node) -> tuple[Choice, ...]:
    assert isinstance(node.at, int)
    return _alone(UPDATE.node(node.stage, node.at - 1)) if node.at > 0 else ()


def _of_model(recipe: Recipe, node: Node) -> tuple[Choice, ...]:
    model = model_node(recipe, str(node.at))
    return () if model is None else _alone(model)


def _of_last_stage(recipe: Recipe, node: Node) -> tuple[Choice, ...]:
    return _alone(final_step(recipe, recipe.stages[-1]))


def _of_evaluations(recipe: Recipe, node: Node) -> tuple[Choice, ...]:
    return _alone(*(EVALUATION.node(at=label) for label in evaluated_labels(recipe)))


def _samples(config: StageConfig) -> bool:
    return config.objective == "sft"


def _rolls_out(config: StageConfig) -> bool:
    return config.objective != "sft"


_STEP = "rollouts/stage={stage}/step={at:06d}"
_SHARD = "samples/stage={stage}/shard={at:06d}"

POOL = Artifact(name="pool", pattern="data/pool.parquet", schema="POOL")
FILTER_REPORT = Artifact(name="filter_report", pattern="data/filter.json", needs=_of_pool)
SAMPLE_ROLLOUTS = Artifact(
    name="sample_rollouts", pattern=f"{_SHARD}/rollouts.parquet", needs=_of_pool, when=_samples, schema="ROLLOUTS"
)
SAMPLE_REWARDS = Artifact(
    name="sample_rewards", pattern=f"{_SHARD}/rewards.parquet", needs=_of_samples, when=_samples, schema="REWARDS"
)
SFT_DATASET = Artifact(
    name="sft_dataset",
    pattern="samples/stage={stage}/dataset.parquet",
    needs=_of_shards,
    when=_samples,
    schema="SFT_DATASET",
)
ROLLOUTS = Artifact(
    name="rollouts",
    pattern=f"{_STEP}/rollouts.parquet",
    needs=_of_pool_and_policy,
    when=_rolls_out,
    schema="ROLLOUTS",
)
REWARDS = Artifact(
    name="rewards", pattern=f"{_STEP}/rewards.parquet", needs=_of_rollouts, when=_rolls_out, schema="REWARDS"
)
TEACHER = Artifact(
    name="teacher",
    pattern=f"{_STEP}/teacher.parquet",
    needs=_of_rollouts,
    when=lambda config: config.scores_teacher,
    schema="TEACHER",
)
REFERENCE = Artifact(
    name="reference",
    pattern=f"{_STEP}/reference.parquet",
    needs=_of_rollouts,
    when=lambda config: _rolls_out(config) and config.ref_beta > 0.0,
    schema="REFERENCE",
)
UPDATE = Artifact(name="update", pattern=f"{_STEP}/update.parquet", needs=_of_step, schema="UPDATE")
CHECKPOINT = Artifact(name="checkpoint", pattern="checkpoints/{stage}/step-{at:06d}", needs=_of_update)
EVALUATION = Artifact(name="evaluation", pattern="evaluation/{at}", needs=_of_model, is_exact=False)
STUDENT = Artifact(name="student", pattern="student", needs=_of_last_stage)
REPORT = Artifact(name="report", pattern="report", needs=_of_evaluations, is_exact=False)

ARTIFACTS: dict[str, Artifact] = {
    row.name: row
    for row in (
        *(POOL, FILTER_REPORT, SAMPLE_ROLLOUTS, SAMPLE_REWARDS, SFT_DATASET),
        *(ROLLOUTS, REWARDS, TEACHER, REFERENCE, UPDATE, CHECKPOINT),
        *(EVALUATION, STUDENT, REPORT),
    )
}
"""Every row, in the order in which a run makes them."""


def node_at(place: str) -> Node | None:
    """The node that lies at `place`, a path relative to the run; None if no artifact lies there."""
    return next((node for row in ARTIFACTS.values() if (node := row.find(place)) is not None), None)


def needs(recipe: Recipe, node: Node) -> tuple[Choice, ...]:
    """What a node is made from; in each choice the first that is published."""
    return node.row.needs(recipe, node)


def consumers(recipe: Recipe, node: Node) -> Iterator[Node]:
    """Every node that may have been made from `node`: those near it that need it, in the order of the table."""
    wanted = {node, Node(node.name, node.stage, EVERY)}
    for candidate in _near(recipe, node):
        if any(wanted.intersection(choice) for choice in needs(recipe, candidate)):
            yield candidate


def _near(recipe: Recipe, node: Node) -> Iterator[Node]:
    """What can be made from a node: of its stage the same step and its neighbours, of others the first, and labels."""
    stages = [stage for stage in recipe.stages if node.stage in (None, stage)]
    if node.name == CHECKPOINT.name and isinstance(node.at, int):
        stages = list(recipe.stages)
    numbers = sorted(
        {0, *(node.at + by for by in (-1, 0, 1) if node.at + by >= 0)} if isinstance(node.at, int) else {0}
    )
    labels = [*evaluated_labels(recipe)]
    if node.name == CHECKPOINT.name:
        labels.append(f"{node.stage}-step-{node.at:06d}")
    for row in ARTIFACTS.values():
        if "{stage}" not in row.pattern:
            yield from (row.node(at=label) for label in labels) if "{at}" in row.pattern else [row.node()]
            continue
        for stage in stages:
            if row.when(recipe.stage(stage)):
                ats = numbers if "{at" in row.pattern else [None]
                yield from (row.node(stage, at) for at in ats)
