"""What to set or start so that a run of a recipe follows its plan."""

from collections.abc import Iterator, Sequence
from math import ceil, floor

from kdrl_core.config import Recipe
from kdrl_core.look.planning.candidates import Candidate
from kdrl_core.look.planning.cluster import Role
from kdrl_core.look.planning.placement import in_flight, replicas
from kdrl_core.look.planning.stage_plan import NOTICED, StagePlan, gpus_alone, many, time_alone

RIGHT = 0.5
"""Assumed share of right teacher responses."""


def conditions(plan: StagePlan, recipe: Recipe) -> list[str]:
    """Sentences with the settings to add to `kdrl run`; none if the recipe runs as planned, or does not fit."""
    if (chosen := plan.best) is None:
        return []
    return [
        *_training(plan, recipe, chosen),
        *_samples(plan, recipe),
        *_rollouts(plan, recipe, chosen),
        *_own_engines(plan, chosen),
        *_scores(plan, recipe, chosen),
        *_share(plan, chosen),
        *_device(recipe),
    ]


def _training(plan: StagePlan, recipe: Recipe, chosen: Candidate) -> Iterator[str]:
    ranks, trainer = chosen.placement.student_gpus, recipe.trainer
    if trainer.engine == "torch":
        if ranks > 1:
            yield (
                "trainer.engine=torch trains on one GPU alone; on all that are planned: "
                f"--set trainer.engine=deepspeed --set trainer.ranks={ranks}"
            )
        return
    if trainer.ranks != ranks:
        yield f"{ranks} GPUs train in this plan, {trainer.ranks} in the recipe: --set trainer.ranks={ranks}"
    if ranks > plan.cluster.gpus_per_node and trainer.hostfile is None:
        yield "ranks on several nodes: --set trainer.hostfile=FILE, with a line `HOST slots=GPUS` for each"


def _rollouts(plan: StagePlan, recipe: Recipe, chosen: Candidate) -> Iterator[str]:
    engines, work = plan.engines, plan.work
    if work.sampled:
        return
    if engines.rollout == "server" or "rollout" in engines.served:
        yield from _replicas(plan, recipe, chosen, replicas(engines, "rollout", chosen.placement.generating_gpus))
    if engines.rollout == "transformers" and plan.cluster.gpus > 1:
        yield "rollout.engine=transformers generates on one GPU alone; on more: --set rollout.engine=vllm"
    if rounds := recipe.stage(work.stage).dynamic_sampling_rounds:
        again = many(rounds, "more time")
        yield f"a step samples once in this plan; with {work.stage}.dynamic_sampling_rounds={rounds}, up to {again}"


def _own_engines(plan: StagePlan, chosen: Candidate) -> Iterator[str]:
    """What to do if the run starts fewer vLLM engines than the plan has."""
    engines, gpus = plan.engines, chosen.placement.student_gpus
    alone, planned = time_alone(plan, chosen).total, chosen.time.total
    if plan.work.sampled and engines.teacher == "vllm":
        gpus_here = gpus_alone(engines, gpus)
        alone, planned = plan.sampling_of(plan.work.sampled) * gpus / gpus_here, plan.sampling_s
    if alone - planned <= NOTICED * planned:
        return
    split, node = engines.tensor_parallel, plan.cluster.gpus_per_node
    count = gpus // split
    more = f"--set vllm.replicas={min(count, node // split)}"
    if count * split > node:
        more += " on this node, and kdrl serve on the others"
    what, unit, size = (
        ("the teacher's responses take", "hours", 3600) if plan.work.sampled else ("a step takes", "s", 1)
    )
    yield (
        f"this plan has {many(count, 'vLLM engine')} of each role, the recipe {engines.replicas} (vllm.replicas), with "
        f"which {what} {alone / size:,.0f} {unit} in place of {planned / size:,.0f}: {more}"
    )


def _samples(plan: StagePlan, recipe: Recipe) -> Iterator[str]:
    """What sampling fewer problems would save before sft."""
    work = plan.work
    if not work.sampled:
        return
    samples = recipe.stage(work.stage).sft.samples
    used = work.steps * work.responses
    yield (
        f"the teacher gives {samples} responses to each of {work.sampled // samples:,} problems, {work.sampled:,} in "
        f"all, in {plan.sampling_s / 3600:,.1f} hours; {work.steps} steps train on {used:,}"
    )
    problems = ceil(used / (samples * RIGHT))
    if problems * samples < work.sampled:
        yield (
            f"if {RIGHT:.0%} of them are right, {problems:,} problems give as many: "
            f"--set {work.stage}.data.max_problems={problems} takes {plan.sampling_of(problems * samples) / 3600:,.1f} "
            f"hours, but each problem is seen {samples * RIGHT:.0f} times"
        )


def _scores(plan: StagePlan, recipe: Recipe, chosen: Candidate) -> Iterator[str]:
    placement, engines = chosen.placement, plan.engines
    if plan.work.teacher is None:
        if recipe.stage(plan.work.stage).uses_teacher:
            yield "the teacher works on teacher.server: neither its GPUs nor its time are in this plan"
        return
    if placement.is_split:
        count = placement.teacher_gpus // engines.tensor_parallel
        yield (
            f"the teacher has GPUs of its own: serve it there, {many(count, 'replica')} (kdrl serve), and list all in "
            "teacher.server.urls"
        )
    elif engines.engine("teacher") == "transformers" and plan.cluster.gpus > 1:
        yield "teacher.engine=transformers works on one GPU alone; on more: --set teacher.engine=vllm"
    if "teacher" in engines.served and not placement.is_split:
        yield from _listed(recipe, "teacher", replicas(engines, "teacher", placement.student_gpus))


def _replicas(plan: StagePlan, recipe: Recipe, chosen: Candidate, count: int) -> Iterator[str]:
    server, split = recipe.rollout.server, plan.engines.tensor_parallel
    assert server is not None  # the recipe was validated
    if split > 1:
        yield f"replicas have {split} GPUs each: kdrl serve --tensor-parallel {split}"
    yield from _listed(recipe, "rollout", count)
    asked = in_flight(plan.work, plan.engines, chosen.placement.generating_gpus, plan.work.responses)
    room = min(plan.engines.max_sequences, -(-plan.work.responses // count))
    if asked < room:
        yield (
            f"{server.concurrency} requests in flight are {asked} for each replica, which has room for more: "
            f"--set rollout.server.concurrency={room * count}"
        )


def _listed(recipe: Recipe, role: Role, count: int) -> Iterator[str]:
    """What to do if the plan has another number of replicas than the recipe lists."""
    server = recipe.rollout.server if role == "rollout" or recipe.teacher is None else recipe.teacher.server
    listed = len(server.urls) if server is not None else 0
    if listed != count:
        does = "generate" if role == "rollout" else "score"
        asleep = " --asleep" if server is not None and server.sleep else ""
        yield (
            f"{count} replicas {does} in this plan, the recipe lists {listed}: start them with kdrl serve --replicas "
            f"{count}{asleep} and list all in {role}.server.urls"
        )


def largest_share(plan: StagePlan, chosen: Candidate) -> float | None:
    """The largest share of a GPU that a vLLM engine of the run may take beside the trainer and other engines, in
    hundredths; None if no such engine takes a share."""
    beside = [phase.beside for phase in chosen.memory if phase.beside is not None]
    if not beside:
        return None
    return floor(100 * (plan.cluster.usable_memory - max(beside)) / plan.cluster.gpu_memory + 1e-9) / 100


def _share(plan: StagePlan, chosen: Candidate) -> Iterator[str]:
    """vLLM takes its whole share even if the plan needs less. It does not start if others use a part of that share."""
    if (most := largest_share(plan, chosen)) is None:
        return
    given = plan.engines.memory_share
    if given is not None and given > most:
        beside = max(phase.beside for phase in chosen.memory if phase.beside is not None)
        yield (
            f"a vLLM engine takes {given:g} of its GPU, beside {beside / 1e9:.1f} GB of others: "
            f"--set vllm.gpu_memory_utilization={most:g}, or null, which is computed"
        )
    if plan.engines.served:
        share = most if given is None else min(given, most)
        yield (
            "servers that sleep are started asleep, one model after the other: kdrl serve --asleep "
            f"--gpu-memory-utilization {share:g}"
        )


def ranks_note(plans: Sequence[StagePlan]) -> str | None:
    """What to do if stages train on different numbers of GPUs: a recipe has only one `trainer.ranks`."""
    ranks = [plan.candidates[0].placement.student_gpus for plan in plans if plan.engines.trainer == "deepspeed"]
    if len(set(ranks)) < 2:
        return None
    return (
        f"{plans[0].work.stage} trains on {ranks[0]} GPUs, {plans[1].work.stage} on {ranks[1]}: stop the run after "
        f"{plans[0].work.stage}, then kdrl resume RUN --set trainer.ranks={ranks[1]}"
    )


def _device(recipe: Recipe) -> Iterator[str]:
    if recipe.runtime.device == "cpu":
        yield "the recipe runs on a CPU, the plan is for GPUs: --set runtime.device=cuda"
