"""What a recipe says is what is planned; what a plan needs beyond it is said, as settings that can be copied."""

import re
from collections.abc import Sequence
from math import floor
from pathlib import Path
from typing import Any

import pytest

from kdrl_core.config import load_recipe
from kdrl_core.look.planning.cluster import Cluster, Engines, default_gpus, engines_of, work_of
from kdrl_core.look.planning.conditions import conditions, largest_share, ranks_note
from kdrl_core.look.planning.cost import Rates, step_time
from kdrl_core.look.planning.measured import rates_of, scaled
from kdrl_core.look.planning.memory import engine_weights
from kdrl_core.look.planning.placement import KV_CACHE, Placement, phase_memories
from kdrl_core.look.planning.shapes import KNOWN_SHAPES, shape_of
from kdrl_core.look.planning.stage_plan import StagePlan, plan_stage, time_alone
from kdrl_core.models import gpu_share

SERVED = ["rollout.engine=server", "rollout.server.urls=['http://127.0.0.1:8000/v1']"]


SLEEPING = [
    *SERVED,
    "rollout.server.sleep=true",
    "teacher.server={urls: ['http://127.0.0.1:9000/v1'], temperature: 0.6, sleep: true}",
]


def planned(
    overrides: Sequence[str] = (),
    *,
    stage: str = "stage2",
    recipe: str = "paper-1.5b",
    gpus: int = 8,
    memory: float = 80e9,
) -> tuple[StagePlan, list[str]]:
    """The plan, and what it needs beyond the recipe."""
    loaded = load_recipe(recipe, overrides)
    cluster = Cluster(gpus=gpus, gpus_per_node=min(gpus, 8), gpu_memory=memory)
    plan = plan_stage(work_of(loaded, stage), engines_of(loaded), cluster)
    return plan, conditions(plan, loaded)


def components(plan: StagePlan, phase: str) -> dict[str, float]:
    return next(each.components for each in plan.candidates[0].memory if each.phase == phase)


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("rollout.engine=transformers", "rollout", "transformers"),
        ("teacher.engine=transformers", "teacher", "transformers"),
        ("trainer={engine: torch}", "trainer", "torch"),
        ("runtime.dtype=float32", "dtype", "float32"),
        ("trainer.zero_stage=3", "zero_stage", 3),
        ("trainer.activation_checkpointing=false", "is_checkpointed", False),
        ("trainer.offload_optimizer=true", "offloads_optimizer", True),
        ("vllm.tensor_parallel=4", "tensor_parallel", 4),
        ("vllm.max_num_seqs=64", "max_sequences", 64),
        ("vllm.gpu_memory_utilization=0.4", "memory_share", 0.4),
        ("vllm.kv_cache_gb=2", "kv_cache_bytes", 2.0 * 2**30),
    ],
)
def test_each_field_of_a_recipe_is_one_of_the_plan(override: str, field: str, value: Any) -> None:
    before, after = (engines_of(load_recipe("paper-1.5b", given)) for given in ([], [override]))
    assert getattr(before, field) != value
    assert getattr(after, field) == value


def test_served_rollouts_are_replicas_with_so_many_requests() -> None:
    engines = engines_of(load_recipe("paper-1.5b", [*SERVED, "rollout.server.concurrency=512"]))
    assert (engines.rollout, engines.concurrency) == ("server", 512)


@pytest.mark.parametrize(
    ("recipe", "overrides", "gpus"),
    [
        ("miniature", [], 1),
        ("miniature-vllm", [], 2),
        ("paper-1.5b", [], 8),
        ("paper-1.5b", SERVED, 16),  # nine, in whole nodes
        ("paper-1.5b", [*SERVED, "trainer.ranks=4", "vllm.tensor_parallel=2", "vllm.replicas=1"], 6),
        ("paper-1.5b", ["trainer={engine: torch}", "vllm.tensor_parallel=4", "vllm.replicas=1"], 4),
        ("paper-1.5b", ["trainer={engine: torch}", "vllm.tensor_parallel=2", "vllm.replicas=3"], 6),
    ],
)
def test_a_plan_is_for_the_gpus_that_the_recipe_uses(recipe: str, overrides: list[str], gpus: int) -> None:
    assert default_gpus(load_recipe(recipe, overrides), gpus_per_node=8) == gpus


@pytest.mark.parametrize(
    ("overrides", "stage", "gpus", "memory"),
    [
        (["trainer.activation_checkpointing=false"], "stage2", 8, 80e9),
        ([], "stage1", 2, 16e9),
        (["trainer={engine: torch}", "rollout.engine=transformers"], "stage1", 1, 80e9),
        (["trainer={engine: torch}"], "stage1", 1, 24e9),
        (["vllm.gpu_memory_utilization=0.05"], "stage2", 8, 80e9),
        ([], "stage2", 8, 16e9),
    ],
)
def test_remedies_are_settings_that_make_it_fit(overrides: list[str], stage: str, gpus: int, memory: float) -> None:
    plan, needed = planned(overrides, stage=stage, gpus=gpus, memory=memory)
    assert plan.best is None
    assert needed == []
    settings = [remedy for remedy in plan.remedies if remedy.startswith("--set ")]
    assert settings
    for remedy in settings:
        again = planned(
            [*overrides, *remedy.removeprefix("--set ").split(" --set ")], stage=stage, gpus=gpus, memory=memory
        )
        assert again[0].best is not None, remedy


def test_a_run_with_one_engine_of_each_role_is_told_what_more_would_save() -> None:
    plan, needed = planned(["vllm.replicas=1"])
    assert plan.best is not None
    assert plan.best.placement.name == "colocated"
    assert needed[0].startswith("this plan has 8 vLLM engines of each role, the recipe 1 (vllm.replicas), with which a")
    assert re.search(r" takes 3,\d\d\d s in place of 70\d: --set vllm.replicas=8$", needed[0])
    assert planned(["vllm.replicas=8", "vllm.gpu_memory_utilization=null"])[1] == []


def test_more_nodes_need_servers_beside_the_engines_of_the_run() -> None:
    _, needed = planned(["teacher.engine=transformers", "trainer.zero_stage=0", "vllm.replicas=1"], gpus=16)
    assert any("--set vllm.replicas=8 on this node, and kdrl serve on the others" in each for each in needed)


def test_a_share_of_the_gpu_that_is_too_large_is_told_and_one_that_is_left_open_is_computed() -> None:
    """Trainer states of ZeRO-2 on one rank: (2 + 12) · 1.777 GB = 24.88 GB; (72 − 24.88) / 80 = 0.589."""
    one = ["trainer.ranks=1", "vllm.replicas=1"]
    assert planned([*one, "vllm.gpu_memory_utilization=0.8"], gpus=1)[1] == [
        "a vLLM engine takes 0.8 of its GPU, beside 24.9 GB of others: --set vllm.gpu_memory_utilization=0.58, or "
        "null, which is computed"
    ]
    for share in ("0.58", "null"):
        assert planned([*one, f"vllm.gpu_memory_utilization={share}"], gpus=1)[1] == []


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["trainer.ranks=1"],
        ["trainer.zero_stage=3"],
        ["trainer.zero_stage=0"],
        ["trainer.offload_optimizer=true"],
        ["trainer={engine: torch}"],
        ["trainer={engine: torch}", "student.lora={}"],
        ["student.lora={}", "trainer.zero_stage=3"],
        ["runtime.dtype=float32"],
        ["teacher.engine=transformers"],
        ["rollout.engine=transformers"],
    ],
)
def test_the_share_that_a_run_computes_is_the_plans(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run counts the parameters in the headers of the weights; here they are the published ones."""
    monkeypatch.setattr(gpu_share, "_parameters", lambda model: float(shape_of(model, role="any").parameters))
    monkeypatch.setattr(gpu_share, "_adapter", lambda model, lora: shape_of(model, role="any").adapter_parameters(lora))
    recipe = load_recipe("paper-1.5b", [*overrides, "vllm.gpu_memory_utilization=null"])
    cluster = Cluster(gpus=recipe.trainer.ranks, gpus_per_node=8, gpu_memory=80e9)
    memory = phase_memories(
        work_of(recipe, "stage1" if recipe.teacher is None else "stage2"),
        engines_of(recipe),
        cluster,
        Placement(student_gpus=recipe.trainer.ranks),
    )
    for beside in {phase.beside for phase in memory if phase.beside is not None}:
        stays = any(recipe.stage(name).ref_beta > 0 for name in recipe.stages) and recipe.rollout.engine != "vllm"
        beside += stays * engine_weights(KNOWN_SHAPES["DeepSeek-R1-Distill-Qwen-1.5B"], width=2, tensor_parallel=1)
        assert gpu_share.engine_share(recipe, gpu_memory=80e9) == floor(100 * (0.9 - beside / 80e9) + 1e-9) / 100


@pytest.mark.parametrize("name", ["paper-1.5b", "zero-3b", "zero-teacher-7b"])
def test_no_shipped_recipe_takes_more_of_a_gpu_than_its_plan_leaves(name: str) -> None:
    recipe = load_recipe(name)
    cluster = Cluster(gpus=8, gpus_per_node=8, gpu_memory=80e9)
    for stage in recipe.stages:
        plan = plan_stage(work_of(recipe, stage), engines_of(recipe), cluster)
        colocated = next(one for one in plan.candidates if not one.placement.is_split)
        most = largest_share(plan, colocated)
        assert most is not None
        assert (recipe.vllm.gpu_memory_utilization or most) <= most


@pytest.mark.parametrize(
    ("overrides", "gpus", "sentence"),
    [
        (["trainer.ranks=2"], 8, "8 GPUs train in this plan, 2 in the recipe: --set trainer.ranks=8"),
        ([], 16, "the teacher has GPUs of its own: serve it there, 5 replicas"),
        (["teacher.engine=transformers"], 16, "ranks on several nodes: --set trainer.hostfile=FILE"),
        (
            ["trainer={engine: torch, activation_checkpointing: true}"],
            8,
            "trains on one GPU alone; .* --set trainer.engine=deepspeed --set trainer.ranks=5",
        ),
        (
            ["rollout.engine=transformers", "runtime.rollout_batch_size=16"],
            8,
            "rollout.engine=transformers generates on one GPU alone",
        ),
        (["teacher.engine=transformers"], 8, "teacher.engine=transformers works on one GPU alone"),
        (["runtime.device=cpu"], 8, "--set runtime.device=cuda"),
        (
            ["stage2.kd_masking=group", "stage2.dynamic_sampling_rounds=2"],
            8,
            "samples once in this plan; with stage2.dynamic_sampling_rounds=2, up to 2 more times",
        ),
        (
            ["teacher.server={urls: ['http://a:1/v1'], temperature: 0.6}"],
            8,
            "teacher.server: neither its GPUs nor its time are in this plan",
        ),
        (
            SERVED,
            8,
            "replicas generate in this plan, the recipe lists 1: start them with kdrl serve --replicas \\d and",
        ),
        (
            [*SERVED, "rollout.server.concurrency=32"],
            8,
            "32 requests in flight are 8 for each replica, .* --set rollout.server.concurrency=1024",
        ),
        (SLEEPING, 8, "8 replicas generate in this plan, the recipe lists 1: .*kdrl serve --replicas 8 --asleep and"),
        (SLEEPING, 8, "8 replicas score in this plan, the recipe lists 1: .* list all in teacher.server.urls"),
        (SLEEPING, 8, "kdrl serve --asleep --gpu-memory-utilization 0.8"),
        ([*SERVED, "vllm.tensor_parallel=2"], 8, "kdrl serve --tensor-parallel 2"),
    ],
)
def test_what_the_recipe_does_not_say_yet_is_said(overrides: list[str], gpus: int, sentence: str) -> None:
    assert any(re.search(sentence, each) for each in planned(overrides, gpus=gpus)[1])


def test_the_one_engine_of_a_run_takes_as_long_on_any_number_of_nodes() -> None:
    """It holds what its own GPU has room for, not the few responses that many engines would have each."""
    alone = []
    for gpus in (8, 64):
        plan, _ = planned(["trainer.zero_stage=0", "teacher.engine=transformers"], gpus=gpus)
        assert plan.best is not None
        alone.append(time_alone(plan, plan.best))
    assert alone[0].rollout == pytest.approx(alone[1].rollout, rel=0.02)


def test_stages_with_different_ranks_are_named() -> None:
    loaded = load_recipe("paper-1.5b")
    cluster = Cluster(gpus=32, gpus_per_node=8, gpu_memory=80e9)
    plans = [plan_stage(work_of(loaded, stage), engines_of(loaded), cluster) for stage in loaded.stages]
    note = ranks_note(plans)
    assert note is not None
    assert note.startswith("stage1 trains on 32 GPUs, stage2 on 26: ")
    assert ranks_note(plans[:1]) is None


def test_replicas_have_gpus_of_their_own() -> None:
    plan, _ = planned([*SERVED, "rollout.server.concurrency=1024"])
    chosen = plan.candidates[0]
    placement = chosen.placement
    assert placement.rollout_gpus + placement.student_gpus + placement.teacher_gpus == 8
    assert placement.rollout_gpus > 0
    where = {phase.phase: phase.gpus for phase in chosen.memory}
    assert (where["rollout"], where["update"]) == ("rollout GPUs", "student GPUs")
    assert "trainer weights" not in components(plan, "rollout")
    assert "rollout weights" not in components(plan, "update")


def test_replicas_that_sleep_are_the_engines_that_a_plan_counts_on() -> None:
    in_process, _ = planned()
    served, needed = planned(SLEEPING)
    assert served.best is not None
    assert served.best.placement.name == "colocated"
    assert [phase.components for phase in served.best.memory] == [p.components for p in in_process.candidates[0].memory]
    assert time_alone(served, served.best).rollout == served.best.time.rollout
    assert time_alone(served, served.best).teacher_score == served.best.time.teacher_score
    assert not any("vLLM engines of each role" in each for each in needed)
    loaded = load_recipe("paper-1.5b", [*SLEEPING, f"rollout.server.urls={[f'http://a:{n}/v1' for n in range(1, 9)]}"])
    assert default_gpus(loaded, gpus_per_node=8) == 8


def test_requests_in_flight_bound_the_rollouts() -> None:
    def rollout_s(concurrency: int) -> float:
        return planned([*SERVED, f"rollout.server.concurrency={concurrency}"])[0].candidates[0].time.rollout

    assert rollout_s(32) > 3 * rollout_s(1024)


def test_engines_in_process_that_do_not_sleep_stay() -> None:
    plan, _ = planned(["teacher.engine=transformers"], memory=1e12)
    assert components(plan, "update")["teacher weights"] == components(plan, "rollout")["teacher weights"] > 0
    assert "rollout weights" not in components(plan, "update")
    assert plan.candidates[0].time.teacher_score > 7 * planned(memory=1e12)[0].candidates[0].time.teacher_score


ROWS = [
    {
        "throughput/rollout_tokens_per_s": 8000.0,
        "time/teacher_score_s": 100.0,
        "time/reference_score_s": 0.0,
        "time/update_s": 200.0,
    }
]


@pytest.mark.parametrize(
    ("overrides", "gpus", "rollout", "scoring", "update", "passes"),
    [
        ([], None, 1, 1, 8, 4),  # one engine of each kind, eight ranks
        (["trainer.activation_checkpointing=false"], None, 1, 1, 8, 3),
        (["trainer={engine: torch}"], None, 1, 1, 1, 3),
        (["vllm.tensor_parallel=2"], None, 2, 2, 8, 4),
        (["vllm.tensor_parallel=2", "teacher.engine=transformers"], None, 2, 1, 8, 4),
        ([*SERVED, "vllm.tensor_parallel=2"], None, 2, 2, 8, 4),
        (["rollout.engine=server", "rollout.server.urls=['http://a:1/v1','http://b:1/v1']"], None, 2, 1, 8, 4),
        ([], 4, 4, 4, 4, 4),
    ],
)
def test_rates_of_a_run_are_per_gpu_of_each_phase(
    overrides: list[str], gpus: int | None, rollout: int, scoring: int, update: int, passes: int
) -> None:
    """1,024 responses of 1,000 + 200 tokens: more than a longest sequence for each of eight ranks."""
    recipe = load_recipe("paper-1.5b", ["vllm.replicas=1", *overrides])
    work = work_of(recipe, "stage2", mean_response=1000, mean_prompt=200)
    rates = rates_of(recipe, work, ROWS, gpus=gpus)
    assert work.teacher is not None
    tokens = 1024 * 1200
    head = 2 * work.student.embedding
    per_token = passes * work.student.forward_flops(1, context=work.attended) + head
    assert rates.rollout_tokens_per_s == 8000 / rollout
    assert rates.score_flops == pytest.approx(
        tokens * work.teacher.forward_flops(1, context=work.attended) / 100 / scoring
    )
    assert rates.update_flops == pytest.approx(tokens * per_token / 200 / update)
    assert rates.has_collectives == (update > 1)


def test_rates_measured_on_several_ranks_have_their_collectives() -> None:
    work = work_of(load_recipe("paper-1.5b"), "stage2")
    cluster = Cluster(gpus=8, gpus_per_node=8, gpu_memory=80e9)

    def communication(**known: Any) -> float:
        rates = Rates(update_flops=1e14, **known)
        return step_time(work, Engines(), cluster, Placement(student_gpus=8), rates).communication

    assert communication() > 0.0
    assert communication(has_collectives=True) == 0.0


def test_a_share_of_the_gpu_bounds_the_cache() -> None:
    plan, _ = planned(["vllm.gpu_memory_utilization=0.5"])
    parts = components(plan, "rollout")
    assert sum(parts[name] for name in ("rollout weights", "workspace", KV_CACHE)) == pytest.approx(0.5 * 80e9)
    given, _ = planned(["vllm.kv_cache_gb=4"])
    assert components(given, "rollout")[KV_CACHE] == 4 * 2**30
    small, _ = planned(["vllm.gpu_memory_utilization=0.05"])
    assert small.best is None
    assert "vllm.gpu_memory_utilization gives it 4.00 GB" in small.candidates[0].reason


def test_a_served_teacher_has_its_gpu_to_itself() -> None:
    plan, _ = planned(["vllm.gpu_memory_utilization=0.4"], memory=40e9)
    split = next(one for one in plan.candidates if one.placement.teacher_gpus == 4)
    scoring = next(phase for phase in split.memory if phase.phase == "teacher-score")
    assert scoring.total > 0.4 * 40e9
    assert split.cramped is None


def test_memory_that_a_run_reserved_counts_if_it_is_more_than_planned() -> None:
    recipe = load_recipe("paper-1.5b")
    work = work_of(recipe, "stage2")
    rates = rates_of(recipe, work, [{**ROWS[0], "memory/reserved_gib": gib} for gib in (30.0, 40.0)])
    assert rates.reserved_bytes == 40 * 2**30

    def update(rates: Rates) -> float:
        plan = plan_stage(work, engines_of(recipe), Cluster(gpus=8, gpus_per_node=8, gpu_memory=80e9), rates)
        colocated = next(one for one in plan.candidates if not one.placement.is_split)
        return next(phase.total for phase in colocated.memory if phase.phase == "update")

    assert update(rates) == pytest.approx(40 * 2**30)
    assert update(Rates()) == pytest.approx(16.28e9, rel=0.001)
    assert scaled(rates, work, work_of(recipe, "stage1")).reserved_bytes is None  # shorter sequences
