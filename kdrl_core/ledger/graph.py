"""The artifacts of a run, each declared once: where it lies, what it is made from, when a recipe has it.

    rollouts    rollouts/stage={stage}/step={step:06d}/rollouts.parquet  from pool; checkpoint k or update k − 1
    rewards     …/rewards.parquet                                        from rollouts
    teacher     …/teacher.parquet       if the stage scores one          from rollouts
    update      …/update.parquet                                         from rollouts, rewards, teacher, reference
    checkpoint  checkpoints/{stage}/step-{step:06d}                      from update k − 1

A *node* is one artifact of one run: a row of the table with its stage, and with its step, its shard or its label.
Everything else is derived from the rows: the path of a node and the node of a path, the inputs of a node and its
consumers, the artifacts of a finished run, and what two runs may share.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import takewhile

from kdrl_core.config import Recipe, StageConfig
from kdrl_core.ledger.artifact import ARTIFACTS, DERIVED, EVERY, Artifact, At, Choice, Node

_OF_CHECKPOINT = Artifact(name="label", pattern="{stage}-step-{step:06d}")


def evaluated_labels(recipe: Recipe) -> list[str]:
    """Labels of the final evaluation: the student before training and after each stage, the teacher, and the models
    that the recipe names for comparison."""
    return ["base", *recipe.stages, *(["teacher"] if recipe.teacher is not None else []), *recipe.evaluation.also]


def checkpoint_label(stage: str, step: int) -> str:
    """Label of a checkpoint's evaluation."""
    return _OF_CHECKPOINT.place(stage, step)


def checkpoint_step(label: str, stage: str) -> int | None:
    """The step of `checkpoint_label`; None for any other label."""
    found = labelled_checkpoint(label)
    return found[1] if found is not None and found[0] == stage else None


def labelled_checkpoint(label: str) -> tuple[str, int] | None:
    """Stage and step of `checkpoint_label`; None for any other label."""
    match _OF_CHECKPOINT.find(label):
        case Node(stage=str(stage), at=int(step)):
            return stage, step
    return None


def model_node(recipe: Recipe, label: str) -> Node | None:
    """The checkpoint behind an evaluation's label; None for a model that lies outside of the run."""
    if label in recipe.stages:
        return final_checkpoint(recipe, label)
    found = labelled_checkpoint(label)
    return CHECKPOINT.node(*found) if found is not None and found[0] in recipe.stages else None


def final_checkpoint(recipe: Recipe, stage: str | None = None) -> Node:
    """The checkpoint that ends a stage (default: the last stage)."""
    stage = stage or recipe.stages[-1]
    return CHECKPOINT.node(stage, recipe.stage(stage).steps)


def initial_checkpoint(recipe: Recipe, stage: str) -> Node | None:
    """The checkpoint that a stage starts from; None for the first stage, which starts from the recipe's student."""
    stages = list[str](recipe.stages)
    position = stages.index(stage)
    return final_checkpoint(recipe, stages[position - 1]) if position else None


def _alone(*nodes: Node) -> tuple[Choice, ...]:
    return tuple((node,) for node in nodes)


def _beside(*rows: Artifact) -> Callable[[Recipe, Node], tuple[Choice, ...]]:
    """The inputs are these rows' nodes of the same step or shard."""
    return lambda recipe, node: _alone(*(row.node(node.stage, node.at) for row in rows))


def _of_pool(recipe: Recipe, node: Node) -> tuple[Choice, ...]:
    return _alone(POOL.node())


def _of_shards(recipe: Recipe, node: Node) -> tuple[Choice, ...]:
    return _alone(SAMPLE_ROLLOUTS.node(node.stage, EVERY), SAMPLE_REWARDS.node(node.stage, EVERY))


def _of_pool_and_policy(recipe: Recipe, node: Node) -> tuple[Choice, ...]:
    """A step's policy is its checkpoint or, where none is kept, the update that made it."""
    assert node.stage is not None
    assert isinstance(node.at, int)
    if node.at > 0:
        return (POOL.node(),), (CHECKPOINT.node(node.stage, node.at), UPDATE.node(node.stage, node.at - 1))
    policy = initial_checkpoint(recipe, node.stage)
    return _alone(POOL.node(), *(() if policy is None else (policy,)))


def _of_step(recipe: Recipe, node: Node) -> tuple[Choice, ...]:
    assert node.stage is not None
    config = recipe.stage(node.stage)
    if _samples(config):
        return _alone(SFT_DATASET.node(node.stage))
    rows = (row for row in (ROLLOUTS, REWARDS, TEACHER, REFERENCE) if row.when(config))
    return _beside(*rows)(recipe, node)


def _of_update(recipe: Recipe, node: Node) -> tuple[Choice, ...]:
    assert isinstance(node.at, int)
    return _alone(UPDATE.node(node.stage, node.at - 1)) if node.at > 0 else ()


def _of_model(recipe: Recipe, node: Node) -> tuple[Choice, ...]:
    model = model_node(recipe, str(node.at))
    return () if model is None else _alone(model)


def _samples(config: StageConfig) -> bool:
    return config.objective == "sft"


def _rolls_out(config: StageConfig) -> bool:
    return not _samples(config)


_TEACHER = ("teacher", "teacher.*")
_ENGINES = ("rollout.*", "vllm.*", "trainer", "trainer.*")
_LORA = ("student.lora", "student.lora.*")
CLAIMED = ("stage?.*", "evaluation.*", *_TEACHER, *_ENGINES, *_LORA)
"""Fields of a recipe that count only for artifacts whose `reads` name them. All other fields count for every artifact,
also those of a section that is new to recipes."""


def _read_by_samples(recipe: Recipe, node: Node) -> tuple[str, ...]:
    names = ("objective", "temperature", "max_response_tokens", "sft.samples", "sft.shard_prompts", "prompts_per_step")
    return *_TEACHER, *_ENGINES, *(f"{node.stage}.{name}" for name in names)


def _read_by_stage(recipe: Recipe, node: Node) -> tuple[str, ...]:
    """All of the stage's fields except those that its objective does not read."""
    assert node.stage is not None
    config = recipe.stage(node.stage)
    is_read = {
        "sft.*": _samples(config),
        "beta": _rolls_out(config),  # plain GRPO reports it as a metric
        "beta.*": _rolls_out(config),
        "kl_estimator": config.scores_teacher,
        "topk.*": config.needs_topk,
        "ref_kl_estimator": config.ref_beta > 0.0,
    }
    left_out = (f"!{node.stage}.{name}" for name, read in is_read.items() if not read)
    return *_ENGINES, *_LORA, f"{node.stage}.*", *left_out


def _read_by_evaluation(recipe: Recipe, node: Node) -> tuple[str, ...]:
    """Of the models beside the run's own, an evaluation reads the one that it is of."""
    others = (f"!evaluation.also.{name}.*" for name in recipe.evaluation.also if name != node.at)
    return "evaluation.*", "!evaluation.also", *others, *_ENGINES, *(_TEACHER * (node.at == "teacher"))


STEP = Artifact(name="step", pattern="rollouts/stage={stage}/step={step:06d}")
"""The folder of a step's files. It is not an artifact itself."""
_SHARD, _SAMPLES = "samples/stage={stage}/shard={shard:06d}", "samples of {stage}"
_METRICS = "metrics/stage={stage}"
_REWARDS = ("REWARDS", "REWARDS_OF_FUNCTIONS")

# fmt: off
POOL = Artifact(name="pool", pattern="data/pool.parquet", shared_as="data",
                reads=lambda recipe, node: ("stage?.data.*", "stage?.max_prompt_tokens"))
FILTER_REPORT = Artifact(name="filter_report", pattern="data/filter.json", needs=_of_pool, shared_as="data")

SAMPLE_ROLLOUTS = Artifact(name="sample_rollouts", pattern=f"{_SHARD}/rollouts.parquet", schemas=("ROLLOUTS",),
                           needs=_of_pool, when=_samples, reads=_read_by_samples, shared_as=_SAMPLES, by_model=True)
SAMPLE_REWARDS = Artifact(name="sample_rewards", pattern=f"{_SHARD}/rewards.parquet", schemas=_REWARDS,
                          needs=_beside(SAMPLE_ROLLOUTS), when=_samples, shared_as=_SAMPLES, follows=True,
                          is_wide=lambda recipe, stage: bool(recipe.reward.functions))
SFT_DATASET = Artifact(name="sft_dataset", pattern="samples/stage={stage}/dataset.parquet", schemas=("SFT_DATASET",),
                       needs=_of_shards, when=_samples, reads=_read_by_stage)

ROLLOUTS = Artifact(name="rollouts", pattern=f"{STEP.pattern}/rollouts.parquet", schemas=("ROLLOUTS",),
                    needs=_of_pool_and_policy, when=_rolls_out, reads=_read_by_stage, by_model=True)
REWARDS = Artifact(name="rewards", pattern=f"{STEP.pattern}/rewards.parquet", schemas=_REWARDS,
                   needs=_beside(ROLLOUTS), when=_rolls_out, follows=True,
                   is_wide=lambda recipe, stage: bool(recipe.reward.functions))
TEACHER = Artifact(name="teacher", pattern=f"{STEP.pattern}/teacher.parquet", schemas=("TEACHER", "TEACHER_TOPK"),
                   needs=_beside(ROLLOUTS), when=lambda config: config.scores_teacher,
                   reads=lambda recipe, node: (*_TEACHER, *_ENGINES), follows=True, by_model=True)
REFERENCE = Artifact(name="reference", pattern=f"{STEP.pattern}/reference.parquet", schemas=("REFERENCE",),
                     needs=_beside(ROLLOUTS), when=lambda config: _rolls_out(config) and config.ref_beta > 0.0,
                     follows=True, by_model=True)
UPDATE = Artifact(name="update", pattern=f"{STEP.pattern}/update.parquet", schemas=("UPDATE",),
                  needs=_of_step, reads=_read_by_stage, by_model=True)
CHECKPOINT = Artifact(name="checkpoint", pattern="checkpoints/{stage}/step-{step:06d}", needs=_of_update,
                      is_pruned=True, by_model=True)

EVALUATION = Artifact(name="evaluation", pattern="evaluation/{label}", needs=_of_model, is_exact=False,
                      reads=_read_by_evaluation,
                      shared_as="evaluation of {label}")
STUDENT = Artifact(name="student", pattern="student", shared_as=None,
                   needs=lambda recipe, node: _alone(final_checkpoint(recipe)))
REPORT = Artifact(name="report", pattern="report", shared_as=None, is_exact=False,
                  needs=lambda recipe, node: _alone(*(EVALUATION.node(at=each) for each in evaluated_labels(recipe))))

METRICS = Artifact(name="metrics", pattern=f"{_METRICS}/metrics.parquet")
TIMINGS = Artifact(name="timings", pattern=f"{_METRICS}/timings.parquet", is_exact=False)
ALARMS = Artifact(name="alarms", pattern=f"{_METRICS}/alarms.parquet", schemas=("ALARMS",))
# fmt: on

_ROWS = (
    *(POOL, FILTER_REPORT, SAMPLE_ROLLOUTS, SAMPLE_REWARDS, SFT_DATASET),
    *(ROLLOUTS, REWARDS, TEACHER, REFERENCE, UPDATE, CHECKPOINT, EVALUATION, STUDENT, REPORT),
)
ARTIFACTS |= {row.name: row for row in _ROWS}
DERIVED |= {row.name: row for row in (METRICS, TIMINGS, ALARMS)}


def node_at(place: str) -> Node | None:
    """The node that lies at `place`, a path relative to the run; None if no artifact lies there."""
    rows = (*ARTIFACTS.values(), *DERIVED.values())
    return next((node for row in rows if (node := row.find(place)) is not None), None)


def folders() -> set[str]:
    """Names of the folders of a run that hold its artifacts."""
    return {row.pattern.split("/")[0] for row in (*ARTIFACTS.values(), *DERIVED.values())}


def needs(recipe: Recipe, node: Node) -> tuple[Choice, ...]:
    """Inputs of a node: of each choice, the first that is published."""
    return node.row.needs(recipe, node)


def consumers(recipe: Recipe, node: Node) -> Iterator[Node]:
    """Every node that may have been made from `node`, in the order of the table.

    This is the inverse of `needs` for this recipe and for the shorter one that the run may have had before its last
    stage got more steps.
    """
    yield from _inverse(recipe, node)
    last = recipe.stages[-1]
    config = recipe.stage(last)
    if node.name == CHECKPOINT.name and node.stage == last and isinstance(node.at, int) and 0 < node.at < config.steps:
        shorter = recipe.model_copy(update={last: config.model_copy(update={"steps": node.at})})
        known = {*_inverse(recipe, node)}
        yield from (each for each in _inverse(shorter, node) if not each.row.is_of_stage and each not in known)


def made_from(recipe: Recipe, node: Node) -> list[Node]:
    """Every node that may have been made from `node`, directly or by way of others, the latest first."""
    stages, rows = list[str](recipe.stages), list(ARTIFACTS)
    found: dict[Node, None] = {}
    left = [node]
    if node.stage in stages:  # a later stage may be SFT, whose updates do not name their first policy
        left += [UPDATE.node(later, 0) for later in stages[stages.index(node.stage) + 1 :]]
        found |= dict.fromkeys(left[1:])
    while left:
        new = [each for each in consumers(recipe, left.pop()) if each not in found]
        found |= dict.fromkeys(new)
        left += new

    def when(one: Node) -> tuple[int, int, int]:
        place = stages.index(one.stage) if one.stage in stages else len(stages)
        return place, one.at if isinstance(one.at, int) else -1, rows.index(one.name)

    return sorted(found, key=when, reverse=True)


def _inverse(recipe: Recipe, node: Node) -> Iterator[Node]:
    wanted = {node, Node(node.name, node.stage, EVERY)}
    for candidate in nodes(recipe, near=node):
        if not all(wanted.isdisjoint(choice) for choice in needs(recipe, candidate)):
            yield candidate


def nodes(recipe: Recipe, *, near: Node | None = None) -> Iterator[Node]:
    """Every node that a run of `recipe` may have; with `near` only those that can be made from that one."""
    for row in ARTIFACTS.values():
        for stage in recipe.stages if row.is_of_stage else (None,):
            if stage is None or row.when(recipe.stage(stage)):
                yield from (row.node(stage, at) for at in _numbers(recipe, row, stage, near))


def _numbers(recipe: Recipe, row: Artifact, stage: str | None, near: Node | None) -> Iterable[At]:
    """Steps, shards or labels of a row's nodes. Near a step are its neighbours, and the first of other stages."""
    if row.per == "label":
        return _labels(recipe, near)
    if row.per is None or stage is None:
        return (None,)
    number = near.at if near is not None and isinstance(near.at, int) else None
    if row.per == "shard":
        return (number if number is not None and near is not None and near.stage == stage else EVERY,)
    steps = range(1, recipe.stage(stage).steps + 1) if row.is_pruned else range(recipe.stage(stage).steps)
    if near is None or number is None:
        return steps
    around = range(number - 1, number + 2) if near.stage == stage else range(2)
    return (step for step in around if step in steps)


def _labels(recipe: Recipe, near: Node | None) -> Iterator[str]:
    yield from evaluated_labels(recipe)
    if near is not None and near.name == CHECKPOINT.name:
        yield checkpoint_label(str(near.stage), int(str(near.at)))
    elif near is None:
        yield from (checkpoint_label(s, step) for s in recipe.stages for step in range(1, recipe.stage(s).steps + 1))


def results(recipe: Recipe) -> Iterator[Node]:
    """Nodes that a finished run must have. Files of steps may be gone, and checkpoints except each stage's last."""
    for row in ARTIFACTS.values():
        for stage in recipe.stages if row.is_of_stage else (None,):
            if stage is not None and not row.when(recipe.stage(stage)):
                continue
            if row.per is None:
                yield row.node(stage)
            elif row.per == "label":
                yield from (row.node(at=label) for label in evaluated_labels(recipe))
            elif row.is_pruned:
                yield final_checkpoint(recipe, stage)


def required(recipe: Recipe, stage: str, steps: int) -> Iterator[Node]:
    """Nodes that must exist once a stage has done `steps` steps: the rows before the steps, and the steps' files.
    Checkpoints may be gone, and so may shards, which only the dataset needs."""
    config = recipe.stage(stage)
    rows = [row for row in ARTIFACTS.values() if not row.is_of_stage or row.when(config)]
    if steps:
        before = takewhile(lambda row: row.per != "step", rows)
        yield from (row.node(stage if row.is_of_stage else None) for row in before if row.per is None)
    for step in range(steps):
        yield from (row.node(stage, step) for row in rows if row.per == "step" and not row.is_pruned)


def part_of(recipe: Recipe, node: Node) -> str | None:
    """Name of the part that a node belongs to when runs share their work; None if every run makes its own.
    The evaluations that a stage makes while it trains belong to the stage."""
    if node.name == EVALUATION.name and (made := labelled_checkpoint(str(node.at))) is not None:
        stage, step = made
        return stage if stage in recipe.stages and recipe.stage(stage).is_evaluation_due(step) else None
    return node.row.shared_as and node.row.shared_as.format(stage=node.stage, label=node.at)


def part_ends(recipe: Recipe) -> Iterator[tuple[str, Node, str]]:
    """The nodes that end the parts of a run, in order: the part, the node, and the place that tells that it is made.
    The number of shards is not known, but all are made once there is the dataset, which is made from them."""
    for node in results(recipe):
        if node.name == SFT_DATASET.name:
            shards = SAMPLE_REWARDS.node(node.stage, EVERY)
            yield str(part_of(recipe, shards)), shards, node.place
        if (name := part_of(recipe, node)) is not None:
            yield name, node, node.place
