"""The table of artifacts says what the manifests of real runs say, and what is derived from it agrees with it."""

import dataclasses
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from crash.damage import manifest_for
from crash.tiny_run import TINY, finish, train
from hypothesis import given
from hypothesis import strategies as st
from support import KeptVerifier
from vllm_models import needs_vllm

from kdrl_core.boxes.check import Remedy, check_run
from kdrl_core.boxes.completion import is_finished
from kdrl_core.boxes.evaluate import evaluate_model
from kdrl_core.boxes.filter import filter_run
from kdrl_core.boxes.make import make as make_artifact
from kdrl_core.boxes.session import close_sessions, stage_session
from kdrl_core.boxes.sft import select, sft_step, teacher_sample, verify_samples
from kdrl_core.boxes.shards import open_shards
from kdrl_core.boxes.sharing import adopt_parts, parts_of
from kdrl_core.boxes.stage import open_stage
from kdrl_core.config import BetaConfig, ModelConfig, Recipe, list_recipes, load_recipe
from kdrl_core.config.changes import leaf_fields
from kdrl_core.config.stage_parts import TermConfig
from kdrl_core.errors import ForeignFileError
from kdrl_core.ledger import (
    Run,
    create_run,
    manifest_of,
    open_run,
    publish_directory,
    publish_file,
    published_below,
    run_lock,
    verify_own,
)
from kdrl_core.ledger.artifact import ARTIFACTS, DERIVED, EVERY, Artifact, Node
from kdrl_core.ledger.graph import (
    CHECKPOINT,
    EVALUATION,
    POOL,
    ROLLOUTS,
    SAMPLE_ROLLOUTS,
    STUDENT,
    UPDATE,
    checkpoint_label,
    consumers,
    final_checkpoint,
    needs,
    node_at,
    nodes,
    part_of,
    required,
    results,
)
from kdrl_core.ledger.names import stage_and_step
from kdrl_core.tables.schemas import SCHEMAS

pytestmark = pytest.mark.usefixtures("fast_sessions")

SHIPPED = list_recipes()
SPARSE = ["stage2.checkpoint.every=3"]
_FIELDS = ("objective=sft", "max_response_tokens=40", "sft.samples=3", "sft.shard_prompts=24", "sft.batch_size=5")
SFT = [f"stage2.{field}" for field in _FIELDS]


@cache
def shipped(name: str, *overrides: str) -> Recipe:
    """A shipped recipe, of a few steps."""
    stages = load_recipe(name).stages
    return load_recipe(name, [*(f"{stage}.steps={3 + index}" for index, stage in enumerate(stages)), *overrides])


# --- against the manifests of real runs ------------------------------------------------------------------------------


def make(artifacts: Path, recipe: str, overrides: Sequence[str] = ()) -> Run:
    """A whole tiny run: data, all stages with SFT and periodic evaluations, final evaluation, student, report."""
    close_sessions()
    stages = load_recipe(recipe).stages
    tiny = [setting for setting in TINY if not setting.startswith("stage") or setting.split(".")[0] in stages]
    run = create_run("r", load_recipe(recipe, [*tiny, *overrides]), artifacts=artifacts)
    with run_lock(run.paths.lock):
        filter_run(run)
        for stage in run.recipe.stages:
            steps = open_stage(run, stage)
            if run.recipe.stage(stage).objective == "sft":
                session = stage_session(run.paths.root, stage)
                for shard in open_shards(run, stage):
                    make_artifact(session, teacher_sample, shard)
                    make_artifact(session, verify_samples, shard)
                make_artifact(session, select)
                for step in steps:
                    sft_step(session, step)
            else:
                train(run, until=None if stage == run.recipe.stages[-1] else (run.recipe.stages[-1], 0))
        label = checkpoint_label(run.recipe.stages[-1], run.recipe.stage(run.recipe.stages[-1]).steps)
        evaluate_model(run, label, ["validation"])
    finish(run)
    close_sessions()
    return run


def edges_of(run: Run) -> set[tuple[str, str]]:
    """What the manifests say: place of an input, place of what was made from it; models outside of the run left out."""
    found = set()
    for path in published_below(run.paths.root):
        inputs = manifest_of(path).inputs
        found |= {(name, run.paths.relative(path)) for name in inputs if not Path(name).is_absolute()}
    return found


def choices_of(run: Run) -> Iterator[tuple[Node, list[set[str]]]]:
    """What the table says of each artifact of the run: places of which one is an input of it, shard by shard."""
    places = [run.paths.relative(path) for path in published_below(run.paths.root)]
    for place in places:
        node = node_at(place)
        assert node is not None, place
        wanted: list[set[str]] = []
        for choice in needs(run.recipe, node):
            if choice[0].at == EVERY:
                pattern = re.compile(re.escape(choice[0].place).replace(re.escape(EVERY), r"\d+"))
                wanted += [{name} for name in places if pattern.fullmatch(name)]
            else:
                wanted.append({each.place for each in choice})
        yield node, wanted


def hold_against_manifests(run: Run) -> int:
    """Number of edges."""
    recorded = edges_of(run)
    for node, wanted in choices_of(run):
        inputs = {source for source, made in recorded if made == node.place}
        assert inputs <= set().union(*wanted), f"{node.place} is made from what the table does not say"
        for choice in wanted:
            assert len(inputs & choice) == 1, f"{node.place} is made from none or several of {choice}"
    return len(recorded)


MADE = {
    "miniature": ("miniature", []),
    "few checkpoints": ("miniature", [*SPARSE, "stage1=null"]),
    "SFT after GRPO": ("miniature", ["stage1.steps=1", *SFT]),
    "R1-Zero, teacher": ("miniature-zero-teacher", ["stage1.steps=2"]),
    "SFT": ("miniature", ["stage1=null", *SFT]),
    "Top-K": ("miniature", ["stage1=null", "stage2.steps=1", "stage2.kl_estimator=topk"]),
    "miniature-study": ("miniature-study", ["stage1.steps=1", "stage2.steps=1"]),
    "R1-Zero": ("miniature-zero", ["stage2.steps=2"]),
}
"""Every shipped recipe that a laptop runs, and the baselines that have other artifacts."""

FAST = ["miniature", "few checkpoints", "SFT after GRPO", "R1-Zero, teacher"]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in MADE if name not in FAST]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, kept_verifier: KeptVerifier) -> Callable[[str], Run]:
    """A finished run by its name in `MADE`. Not to be changed."""
    folder = tmp_path_factory.mktemp("made")

    @cache
    def run(name: str) -> Run:
        recipe, overrides = MADE[name]
        if recipe == "miniature-zero":
            overrides = [*overrides, f"teacher.path={run('R1-Zero, teacher').paths.student}"]
        with pytest.MonkeyPatch.context() as patch:
            kept_verifier.share(patch)
            return make(folder / name.replace(" ", "-"), recipe, overrides)

    return run


@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_the_table_has_the_edges_that_the_manifests_record_and_no_others(name: str, made: Callable[[str], Run]) -> None:
    run = made(name)
    assert hold_against_manifests(run) > 8
    assert check_run(run).findings == []
    assert is_finished(run, verify=True)


def test_how_many_edges_of_a_run_the_lineage_looks_at(made: Callable[[str], Run]) -> None:
    """Of 55 edges of the miniature, 2 and 4 steps long, 34 stood in the list that was written by hand before.

    The 16 that are left out bind nothing: what follows its inputs (verdicts, scores) is made again with them, and a
    report says nothing of the bytes of evaluations, which hold times.
    """
    run = made("miniature")
    looked_at = 0
    edges = edges_of(run)
    for source, made_from_it in edges:
        node, consumer = node_at(source), node_at(made_from_it)
        assert node is not None
        assert consumer in set(consumers(run.recipe, node))
        looked_at += node.row.is_exact and not consumer.row.follows
    assert (len(edges), looked_at) == (55, 39)


@pytest.mark.slow
@needs_vllm
def test_the_table_has_the_edges_of_a_run_of_vllm(tmp_path: Path) -> None:
    run = make(
        tmp_path, "miniature-vllm", ["stage1.steps=1", "stage2.steps=1", "trainer.engine=torch", "trainer.ranks=1"]
    )
    assert hold_against_manifests(run) > 8


def test_a_run_that_took_over_parts_of_another_has_the_edges_of_its_own(
    made: Callable[[str], Run], tmp_path: Path
) -> None:
    donor = made("miniature")
    shutil.copytree(donor.paths.root, tmp_path / "runs" / "donor")
    grpo = load_recipe("miniature", [*TINY, "stage2.objective=grpo"])
    run = create_run("r", grpo, artifacts=tmp_path)
    assert adopt_parts(run, ["donor"])["stage1"] == "donor"
    train(run)
    finish(run)
    assert hold_against_manifests(run) > 30
    assert check_run(run).findings == []


@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_files_have_the_schema_that_the_table_names(name: str, made: Callable[[str], Run]) -> None:
    run = made(name)
    files = [path for path in published_below(run.paths.root) if path.suffix == Path(POOL.file).suffix]
    for path in files:
        node = node_at(run.paths.relative(path))
        assert node is not None
        if node.row.schemas:
            assert node.stage is not None
            expected = SCHEMAS[node.row.schema_in(run.recipe, node.stage)]
            assert pq.read_schema(path).remove_metadata().equals(expected.remove_metadata()), path
    assert {name for row in (*ARTIFACTS.values(), *DERIVED.values()) for name in row.schemas} <= SCHEMAS.keys()


# --- against itself --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_consumers_are_the_inverse_of_needs(name: str) -> None:
    """By brute force over all nodes of each shipped recipe, as it is and with SFT in its last stage."""
    plain = shipped(name)
    last = plain.stages[-1]
    for recipe in (plain, shipped(name, f"{last}.objective=sft") if plain.teacher is not None else plain):
        everything = list(nodes(recipe))
        assert len(everything) == len(set(everything))
        made_from: dict[Node, set[Node]] = {node: set() for node in everything}
        for node in everything:
            for each in (each for choice in needs(recipe, node) for each in choice):
                assert each in made_from, f"{node} needs {each}, which no such run has"
                made_from[each].add(node)
        final = final_checkpoint(recipe)
        for node, expected in made_from.items():
            found = list(consumers(recipe, node))
            assert len(found) == len(set(found))
            if node.name == CHECKPOINT.name and node.stage == final.stage and node != final:
                expected = expected | {EVALUATION.node(at=last), STUDENT.node()}  # of a run that was shorter once
            assert set(found) == expected, node


@pytest.mark.parametrize("name", SHIPPED)
def test_nothing_is_made_from_itself(name: str) -> None:
    recipe = shipped(name)
    depth: dict[Node, int] = {}

    def visit(node: Node, above: tuple[Node, ...]) -> int:
        assert node not in above, f"{node} is made from itself"
        if node not in depth:
            below = [visit(each, (*above, node)) for choice in needs(recipe, node) for each in choice]
            depth[node] = 1 + max(below, default=0)
        return depth[node]

    assert max(visit(node, ()) for node in nodes(recipe)) > 10


def test_shards_are_made_from_the_pool_and_the_dataset_from_all_of_them() -> None:
    recipe = shipped("miniature", *SFT)
    shard = SAMPLE_ROLLOUTS.node("stage2", 7)
    assert [each.place for each in consumers(recipe, shard)] == [
        "samples/stage=stage2/shard=000007/rewards.parquet",
        "samples/stage=stage2/dataset.parquet",
    ]
    assert SAMPLE_ROLLOUTS.node("stage2", EVERY) in set(consumers(recipe, POOL.node()))


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,11}", fullmatch=True)


@given(
    st.sampled_from([*ARTIFACTS.values(), *DERIVED.values()]), names, st.integers(min_value=0, max_value=10**8), names
)
def test_a_place_is_that_of_one_node(row: Artifact, stage: str, number: int, label: str) -> None:
    at = {"label": label, None: None}.get(row.per, number)
    node = row.node(stage if row.is_of_stage else None, at)
    assert node_at(node.place) == node
    assert stage_and_step(node.place) == (node.stage, node.at if row.per == "step" else None)
    assert stage_and_step(f"{node.place}/inside")[0] == node.stage
    assert [other.name for other in (*ARTIFACTS.values(), *DERIVED.values()) if other.find(node.place)] == [row.name]
    assert node_at(f"{node.place}/inside") is None


@given(st.text(max_size=40))
def test_any_other_path_is_no_node(place: str) -> None:
    found = node_at(place)
    assert found is None or found.place == place


@pytest.mark.parametrize("name", SHIPPED)
def test_what_a_finished_run_has_and_what_its_steps_have(name: str) -> None:
    recipe = shipped(name)
    ends = [node.place for node in results(recipe)]
    assert ends[:2] == ["data/pool.parquet", "data/filter.json"]
    assert ends[-2:] == ["student", "report"]
    for stage in recipe.stages:
        config = recipe.stage(stage)
        assert f"checkpoints/{stage}/step-{config.steps:06d}" in ends
        files = {node.name for node in required(recipe, stage, 2) if node.at == 1}
        scored = {"teacher"} if config.scores_teacher else set()
        scored |= {"reference"} if config.ref_beta else set()
        assert files == {"rollouts", "rewards", "update"} | scored
        assert not list(required(recipe, stage, 0))


# --- what runs share -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_every_artifact_but_a_run_s_own_results_belongs_to_a_part(name: str) -> None:
    recipe = shipped(name)
    parts = {part.name for part in parts_of(recipe)}
    watched = checkpoint_label(recipe.stages[-1], 2)
    assert part_of(recipe, EVALUATION.node(at=watched)) is None  # none is due at step 2
    due = shipped(name, f"{recipe.stages[-1]}.evaluate_every=2")
    assert part_of(due, EVALUATION.node(at=watched)) == recipe.stages[-1]
    for node in nodes(recipe):
        if node.row.per != "label":
            assert part_of(recipe, node) in (parts if node.row.shared_as else {None})


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_which_fields_count_for_which_part() -> None:
    """Every field of a recipe, changed one by one: which parts have another key then."""
    recipe = load_recipe("miniature")
    plain = {part.name: part.key for part in parts_of(recipe)}
    told_apart: dict[str, set[str]] = {}
    also = {"weak": ModelConfig(path="models/weak")}
    known: dict[str, object] = {
        "objective": "reward_shaping",
        "beta": BetaConfig(init=0.5),
        "also": also,
        "terms": [TermConfig(function="my_package.terms:length", coefficient=0.5)],
    }  # read as such
    for field, value in leaf_fields(recipe).items():
        changed = value + 1 if isinstance(value, int | float) else f"{value} changed"
        other = _with(recipe, field, known.get(field.rpartition(".")[2], changed))
        told_apart[field] = {part.name for part in parts_of(other) if plain.get(part.name) != part.key}
    everything = set(plain)
    of_stage2 = {"stage2", "evaluation of stage2"}
    assert told_apart["seed"] == told_apart["prompt.template"] == told_apart["runtime.dtype"] == everything
    assert told_apart["stage2.data.max_problems"] == everything - {"evaluation of base", "evaluation of teacher"}
    assert told_apart["stage2.learning_rate"] == told_apart["stage2.kd_masking"] == of_stage2
    assert told_apart["evaluation.also"] == {"evaluation of weak"}  # a model for comparison changes no other part
    assert told_apart["teacher.path"] == {*of_stage2, "evaluation of teacher"}
    unread = {f for f, parts in told_apart.items() if not parts and not f.startswith(("alarms", "tracking"))}
    assert unread == {
        *("name", "description", "stage1.kl_estimator", "stage2.ref_kl_estimator"),
        *(f"{stage}.{field}" for stage in ("stage1", "stage2") for field in ("topk.k", "topk.floor")),
        *(
            f"{stage}.sft.{field}"
            for stage in ("stage1", "stage2")
            for field in ("samples", "keep", "batch_size", "temperature", "aggregation", "shard_prompts")
        ),
    }


def _with(recipe: Recipe, field: str, value: object) -> Recipe:
    """The recipe with a field set to what it may not even hold."""
    head, _, rest = field.partition(".")
    if not rest:
        return recipe.model_copy(update={head: value})
    return recipe.model_copy(update={head: _with(getattr(recipe, head), rest, value)})


# --- a new artifact --------------------------------------------------------------------------------------------------


def _critic(recipe: Recipe, node: Node) -> tuple[tuple[Node, ...], ...]:
    return ((ROLLOUTS.node(node.stage, node.at),),)


CRITIC = Artifact(
    name="critic",
    pattern="rollouts/stage={stage}/step={step:06d}/critic.parquet",
    needs=_critic,
    when=lambda config: config.objective == "kdrl",
)
VALUE_HEAD = Artifact(
    name="value_head",
    pattern="value-head/{stage}",
    needs=lambda recipe, node: ((final_checkpoint(recipe, node.stage),),),
)


@pytest.fixture
def run(made: Callable[[str], Run], tmp_path: Path) -> Run:
    """A finished run to be changed."""
    shutil.copytree(made("miniature").paths.root, tmp_path / "runs" / "r")
    return open_run("r", artifacts=tmp_path)


def test_one_row_is_all_that_a_new_artifact_of_a_step_costs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Path, check, lineage and sharing know it from the table; only the box that makes it would have to be written."""
    monkeypatch.setitem(ARTIFACTS, CRITIC.name, CRITIC)
    places = [CRITIC.place("stage2", step) for step in range(4)]
    findings = {finding.path: finding for finding in check_run(run).findings}
    assert list(findings) == places
    assert {finding.problem for finding in findings.values()} == {"is missing"}
    assert {(finding.stage, finding.remedy) for finding in findings.values()} == {("stage2", Remedy.BACKUP)}

    for step, place in enumerate(places):
        sources = run.inputs(run.paths.rollouts("stage2", step))
        publish_file(run.paths.root / place, lambda file: file.write_bytes(b"values") and None, inputs=sources)
    assert check_run(run).findings == []

    rollouts, other = run.paths.rollouts("stage2", 3), run.paths.root / places[3]
    publish_file(
        other, lambda file: file.write_bytes(b"values") and None, inputs={run.paths.relative(rollouts): "0" * 64}
    )
    found = {finding.path: finding for finding in check_run(run).findings}
    assert "was made from other files than are there now" in found[places[3]].problem
    assert found[places[3]].remedy is Remedy.OWNER
    run.paths.update("stage2", 3).with_name("_update.manifest.json").unlink()  # which binds the rollouts as well
    with pytest.raises(ForeignFileError, match=f"rollouts.parquet is whole, but not the one that {places[3]} was made"):
        verify_own(run, rollouts)

    donor = shutil.copytree(run.paths.root, run.paths.root.with_name("donor"))
    manifest_for(donor / places[3]).unlink()
    again = create_run("again", run.recipe, artifacts=run.paths.root.parent.parent)
    monkeypatch.setattr("kdrl_core.boxes.sharing.verify_own", lambda run, path: manifest_of(path))
    assert adopt_parts(again, ["donor"])["stage2"] == "donor"
    assert [(again.paths.root / place).is_file() for place in places] == [True, True, True, False]


def test_one_row_is_all_that_a_new_result_costs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_finished(run, verify=True)
    monkeypatch.setitem(ARTIFACTS, VALUE_HEAD.name, VALUE_HEAD)
    assert not is_finished(run)
    for stage in run.recipe.stages:
        final = run.paths.root / final_checkpoint(run.recipe, stage).place
        publish_directory(
            run.paths.root / VALUE_HEAD.place(stage),
            lambda folder: (folder / "weights").write_bytes(b"values") and None,
            inputs=run.inputs(final),
        )
    assert is_finished(run, verify=True)
    assert check_run(run).findings == []
    inside = run.paths.root / VALUE_HEAD.place("stage2") / "weights"
    inside.write_bytes(b"others")
    assert not is_finished(run, verify=True)
    assert [finding.path for finding in check_run(run).findings] == ["value-head/stage2"]


def test_what_a_longer_run_left_behind_is_known(run: Run) -> None:
    """The student of a run that got more steps since is still made from its last checkpoint of then."""
    longer = dataclasses.replace(
        run, recipe=load_recipe("miniature", [*TINY, "stage2.steps=6"]).model_copy(update={"name": run.recipe.name})
    )
    checkpoint = CHECKPOINT.node("stage2", 4)
    assert STUDENT.node() in set(consumers(longer.recipe, checkpoint))
    assert {UPDATE.node("stage2", 3)} == {node for choice in needs(longer.recipe, checkpoint) for node in choice}
    assert not is_finished(longer)
