"""Every placement of a stage, with its memory and time. Checks whether the engines can use these GPUs at all. If no
placement fits, lists changes that make one fit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import ceil

from kdrl_core.errors import RecipeError
from kdrl_core.look.planning.cluster import Cluster, Engines, Role, Work
from kdrl_core.look.planning.cost import Rates, StepTime, step_time
from kdrl_core.look.planning.lengths import cut
from kdrl_core.look.planning.placement import SAMPLING, PhaseMemory, Placement, phase_memories, sequence_bytes
from kdrl_core.look.planning.shapes import ModelShape

GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One placement, with its memory and its time."""

    placement: Placement
    memory: tuple[PhaseMemory, ...]
    time: StepTime
    usable: float
    share: float
    """Bytes of a GPU that a vLLM engine of the run may take (vllm.gpu_memory_utilization)."""

    @property
    def worst(self) -> PhaseMemory:
        return max(self.memory, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool:
        return self.cramped is None and self.worst.total <= self.usable * (1 + 1e-9)

    @property
    def cramped(self) -> PhaseMemory | None:
        """The first phase whose engine needs more than its share; None if every engine has enough."""
        return next((phase for phase in self.memory if phase.taken > self.share * (1 + 1e-9)), None)

    @property
    def reason(self) -> str:
        """Why the placement does not fit: the phase and its largest parts."""
        worst, cramped = self.worst, self.cramped
        if cramped is not None and worst.total <= self.usable:
            return (
                f"{self.placement.name} does not fit, because the engine of {cramped.phase} needs "
                f"{cramped.taken / GB:.2f} GB, and vllm.gpu_memory_utilization gives it {self.share / GB:.2f} GB"
            )
        parts = sorted(worst.components.items(), key=lambda part: -part[1])[:3]
        largest = ", ".join(f"{name} {value / GB:.1f}" for name, value in parts)
        return (
            f"{self.placement.name} does not fit, because {worst.phase} needs {worst.total / GB:.1f} GB on "
            f"{worst.gpus}, and {self.usable / GB:.1f} GB are usable (largest: {largest} GB)"
        )


def candidates_of(work: Work, engines: Engines, cluster: Cluster, rates: Rates) -> list[Candidate]:
    """All placements: those that fit, fastest first; then the others, least memory first."""
    found = []
    for placement in _placements(work, engines, cluster):
        memory = tuple(_as_measured(phase, rates) for phase in phase_memories(work, engines, cluster, placement))
        held = next((phase.sequences for phase in memory if phase.phase in ("rollout", SAMPLING)), None)
        time = step_time(work, engines, cluster, placement, rates, kv_sequences=held)
        share = (engines.memory_share or cluster.utilization) * cluster.gpu_memory
        found.append(
            Candidate(placement=placement, memory=memory, time=time, usable=cluster.usable_memory, share=share)
        )
    return sorted(found, key=lambda one: (not one.fits, one.time.total if one.fits else one.worst.total))


def _as_measured(phase: PhaseMemory, rates: Rates) -> PhaseMemory:
    """The update's phase with all memory that the ranks of a run reserved, if that was more than is planned."""
    if phase.phase != "update" or (more := (rates.reserved_bytes or 0.0) - phase.total) <= 0:
        return phase
    return replace(phase, components={**phase.components, "measured beyond the plan": more})


def _placements(work: Work, engines: Engines, cluster: Cluster) -> Iterator[Placement]:
    step = engines.tensor_parallel
    shares = [
        gpus
        for gpus in range(step, cluster.gpus, step)
        if cluster.gpus <= 16 or gpus % (cluster.gpus // 16) == 0  # above 16 GPUs, only sixteenths
    ]
    may_split = work.teacher is not None and engines.teacher == "vllm" and not work.sampled
    for teacher in [0, *(shares if may_split else [])]:
        for rollout in shares if engines.rollout == "server" and not work.sampled else [0]:
            if (student := cluster.gpus - teacher - rollout) > 0:
                yield Placement(student_gpus=student, teacher_gpus=teacher, rollout_gpus=rollout)


def check_gpus(work: Work, engines: Engines, cluster: Cluster) -> None:
    """Raise RecipeError if the engines cannot use these GPUs at all."""
    split = engines.tensor_parallel
    scores_alone = work.teacher is None or engines.teacher == "transformers"
    if cluster.gpus > 1 and engines.rollout == "transformers" and engines.trainer == "torch" and scores_alone:
        teacher = " --set teacher.engine=vllm" if engines.teacher == "transformers" else ""
        raise RecipeError(
            f"the recipe's engines, transformers and torch, are one process on one GPU, and {cluster.gpus} GPUs are "
            f"planned; plan --gpus 1, or use them: --set rollout.engine=vllm{teacher} --set trainer.engine=deepspeed "
            f"--set trainer.ranks={cluster.gpus}"
        )
    if engines.rollout == "server" and cluster.gpus <= split:
        raise RecipeError(
            f"rollout.engine=server: replicas (vllm.tensor_parallel={split} GPUs each) have GPUs of their own, apart "
            f"from the trainer's, and {cluster.gpus} are planned; plan --gpus {2 * split} or more"
        )
    if cluster.gpus > cluster.gpus_per_node and cluster.gpus % cluster.gpus_per_node:
        raise RecipeError(
            f"{cluster.gpus} GPUs do not fill whole nodes of {cluster.gpus_per_node}; change --gpus or --gpus-per-node"
        )
    if split > min(cluster.gpus, cluster.gpus_per_node) or cluster.gpus % split:
        raise RecipeError(
            f"vllm.tensor_parallel={split} does not divide {cluster.gpus} GPUs in nodes of {cluster.gpus_per_node}; "
            "an engine stays within its node: set another number, or plan other --gpus"
        )
    for role, shape in (("student", work.student), ("teacher", work.teacher)):
        is_cut = engines.split("rollout" if role == "student" else "teacher") > 1
        if shape is not None and is_cut and shape.heads % split:
            raise RecipeError(
                f"vllm.tensor_parallel={split} does not divide the {role}'s {shape.heads} attention heads; "
                "set a number that does"
            )
        if shape is not None and shape.max_context is not None and work.context > shape.max_context:
            raise RecipeError(
                f"{work.stage}: prompt and response take {work.context} tokens, but {shape.name} ({role}) has "
                f"{shape.max_context}; lower {work.stage}.max_response_tokens"
            )
    _check_kv_cache(work, engines)


def _check_kv_cache(work: Work, engines: Engines) -> None:
    """Raise RecipeError if a vLLM engine of this process cannot hold one longest sequence."""
    if (given := engines.kv_cache_bytes) is None:
        return
    longest = max(work.context, work.evaluation_context if work.evaluation_responses else 0)
    needs: list[tuple[Role, ModelShape, int]] = [("rollout", work.student, longest)]
    if work.teacher is not None:
        needs.append(("teacher", work.teacher, work.context))
    for role, shape, context in needs:
        one = sequence_bytes(role, shape, engines, context=context)
        if engines.engine(role) == "vllm" and given < one:
            raise RecipeError(
                f"vllm.kv_cache_gb={given / 2**30:g} is less than one sequence of {context:,} tokens of {shape.name} "
                f"({role}) needs; set it to {ceil(one / 2**30 * 100) / 100:g} or more, or to null"
            )


_LARGER_GPUS = (24 * GB, 40 * GB, 48 * GB, 80 * GB, 96 * GB, 141 * GB, 192 * GB, 288 * GB)


def remedies_of(
    work: Work,
    engines: Engines,
    cluster: Cluster,
    rates: Rates,
    *,
    fits: Callable[[Work, Engines, Cluster], bool] | None = None,
) -> Iterator[str]:
    """Single changes that make the stage fit; if none does alone, the first few that do together. Then other GPUs.
    `fits`: None: any placement may."""

    def fits_somewhere(work: Work, engines: Engines, cluster: Cluster) -> bool:
        return candidates_of(work, engines, cluster, rates)[0].fits

    fits = fits or fits_somewhere

    changes = list(_changes(work, engines, cluster))
    single = [name for name, change in changes if fits(*change(work, engines), cluster)]
    yield from single
    if not single:
        names: list[str] = []
        both = (work, engines)
        for name, change in changes:
            names.append(name)
            both = change(*both)
            if fits(*both, cluster):
                yield " ".join(names)
                break
    for memory in _LARGER_GPUS:
        if memory > cluster.gpu_memory and fits(work, engines, replace(cluster, gpu_memory=memory)):
            yield f"GPUs with {memory / GB:.0f} GB"
            break
    for factor in (2, 4, 8):
        gpus = cluster.gpus * factor
        if engines.trainer == "deepspeed" and fits(work, engines, replace(cluster, gpus=gpus)):
            yield f"{gpus} GPUs (kdrl plan --gpus {gpus})"
            break


_Change = Callable[[Work, Engines], tuple[Work, Engines]]


def _changes(work: Work, engines: Engines, cluster: Cluster) -> Iterator[tuple[str, _Change]]:
    """Changes of settings, from the cheapest to those that change the method."""
    if not engines.is_checkpointed:
        yield "--set trainer.activation_checkpointing=true", lambda w, e: (w, replace(e, is_checkpointed=True))
    if engines.memory_share is not None and "vllm" in (engines.rollout, engines.teacher):
        yield "--set vllm.gpu_memory_utilization=null", lambda w, e: (w, replace(e, memory_share=None))
    if engines.rollout == "transformers" and (fewer := work.num_in_process // 4):
        yield f"--set runtime.rollout_batch_size={fewer}", lambda w, e: (replace(w, num_in_process=fewer), e)
    if (budget := work.context) < work.micro_batch_tokens:
        name = f"--set {work.stage}.micro_batch_tokens={budget}"
        yield name, lambda w, e: (replace(w, micro_batch_tokens=budget), e)
    if engines.trainer == "deepspeed":
        if cluster.gpus > 1 and engines.zero_stage < 3:
            yield "--set trainer.zero_stage=3", lambda w, e: (w, replace(e, zero_stage=3))
        if not engines.offloads_optimizer and engines.zero_stage > 0:
            yield "--set trainer.offload_optimizer=true", lambda w, e: (w, replace(e, offloads_optimizer=True))
    else:
        stage = engines.zero_stage or 2
        name = f"--set trainer.engine=deepspeed --set trainer.zero_stage={stage} --set trainer.offload_optimizer=true"
        yield name, lambda w, e: (w, replace(e, trainer="deepspeed", zero_stage=stage, offloads_optimizer=True))
    if engines.rollout != "transformers" and engines.tensor_parallel == 1:
        widest = next((split for split in (8, 4, 2) if _divides(split, work, cluster)), None)
        if widest is not None:
            yield f"--set vllm.tensor_parallel={widest}", lambda w, e: (w, replace(e, tensor_parallel=widest))
    for part in (2, 4):
        limit = work.max_response // part
        name = f"--set {work.stage}.max_response_tokens={limit}"
        if (one := work.max_prompt + limit) < work.micro_batch_tokens:
            name += f" --set {work.stage}.micro_batch_tokens={one}"
        yield name, partial(_shorten, limit)


def _shorten(limit: int, work: Work, engines: Engines) -> tuple[Work, Engines]:
    budget = min(work.micro_batch_tokens, work.max_prompt + limit)
    mean, longest = cut(work.mean_response, work.longest_response, limit)
    work = replace(work, max_response=limit, mean_response=mean, longest_response=longest)
    return replace(work, micro_batch_tokens=budget), engines


def _divides(split: int, work: Work, cluster: Cluster) -> bool:
    shapes = [shape for shape in (work.student, work.teacher) if shape is not None]
    return (
        split <= min(cluster.gpus, cluster.gpus_per_node)
        and cluster.gpus % split == 0
        and all(shape.heads % split == 0 for shape in shapes)
    )
