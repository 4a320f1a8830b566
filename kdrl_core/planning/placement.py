"""Where models go: colocated (every GPU does every phase in turn) or split (some GPUs hold the teacher alone)."""

from collections.abc import Iterator
from dataclasses import dataclass

from kdrl_core.planning.cluster import Cluster, Engines, Work
from kdrl_core.planning.memory import (
    Components,
    decode_workspace,
    engine_weights,
    gradient_bytes,
    kv_bytes,
    optimizer_bytes,
    optimizer_step_components,
    score_workspace,
    trainer_states,
    update_components,
)
from kdrl_core.planning.shapes import ModelShape

KV_CACHE = "KV cache"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """GPUs of the student and of the teacher; 0: colocated, or no teacher."""

    student_gpus: int
    teacher_gpus: int = 0

    @property
    def is_split(self) -> bool:
        """Whether the teacher has GPUs of its own."""
        return self.teacher_gpus > 0

    @property
    def name(self) -> str:
        """For people."""
        if not self.is_split:
            return "colocated"
        return f"split {self.student_gpus}+{self.teacher_gpus}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseMemory:
    """Bytes on one GPU in one phase, by component."""

    phase: str
    gpus: str
    """`every GPU`, `student GPUs` or `teacher GPUs`."""
    components: Components
    sequences: int | None = None
    """Of the longest kind that the KV cache holds, where there is one."""

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.components.values())


def phase_memories(work: Work, engines: Engines, cluster: Cluster, placement: Placement) -> list[PhaseMemory]:
    """What lies on a GPU in each phase. The KV cache takes what it can use of what is left, one sequence at least."""
    return list(_phases(work, engines, cluster, placement))


def _phases(work: Work, engines: Engines, cluster: Cluster, placement: Placement) -> Iterator[PhaseMemory]:
    student, split = work.student, engines.tensor_parallel
    gpus = "student GPUs" if placement.is_split else "every GPU"
    training = engines.training(placement.student_gpus)
    states = trainer_states(student, training)
    if not engines.sleeps:
        states = {**states, "gradients": gradient_bytes(student, training)}  # freed when the next update begins
    resident = {} if engines.sleeps else _models(work, engines, with_teacher=not placement.is_split)
    rollout_weights = engine_weights(student, width=engines.width, tensor_parallel=split)
    own_weights = {"rollout weights": rollout_weights} if engines.sleeps else {}

    def generating(phase: str, context: int, responses: int) -> PhaseMemory:
        sequences = in_flight(work, engines, placement.student_gpus, responses)
        workspace = decode_workspace(student, sequences=sequences, width=engines.width, tensor_parallel=split)
        others = {**states, **resident, **own_weights, "workspace": workspace}
        return _with_kv_cache(phase, gpus, others, student, engines, cluster, context=context, sequences=sequences)

    yield generating("rollout", work.context, work.responses)
    if work.teacher is not None:
        where = "teacher GPUs" if placement.is_split else gpus
        others = {} if placement.is_split else {**states, **resident}
        yield _scoring("teacher-score", where, others, "teacher weights", work.teacher, work, engines, cluster)
    if work.has_reference:
        others = {**states, **resident}
        yield _scoring("reference-score", gpus, others, "reference weights", student, work, engines, cluster)
    update = update_components(student, training, micro_batch_tokens=work.micro_batch_tokens, longest=work.context)
    yield PhaseMemory(phase="update", gpus=gpus, components={**update, **resident})
    step = optimizer_step_components(student, training)
    yield PhaseMemory(phase="optimizer step", gpus=gpus, components={**step, **resident})
    sync = {**states, **resident, **own_weights, "sync buffer": 4 * student.embedding}
    yield PhaseMemory(phase="weight sync", gpus=gpus, components=sync)
    if work.evaluation_responses:
        phase = generating("evaluation", work.evaluation_context, work.evaluation_responses)
        if engines.sleeps:
            yield phase
        else:  # which loads a model of its own
            extra = {**phase.components, "evaluated weights": rollout_weights}
            yield PhaseMemory(phase=phase.phase, gpus=gpus, components=extra, sequences=phase.sequences)


def in_flight(work: Work, engines: Engines, gpus: int, responses: int) -> int:
    """Responses that one engine generates at a time."""
    if not engines.sleeps:
        return min(work.num_in_process, responses)
    replicas = max(1, gpus // engines.tensor_parallel)
    return max(1, min(engines.max_sequences, -(-responses // replicas)))


def host_bytes(work: Work, engines: Engines, cluster: Cluster, placement: Placement) -> float:
    """Memory of one node's host that sleeping models and offloaded optimiser states take."""
    gpus = min(placement.student_gpus, cluster.gpus_per_node)
    training = engines.training(placement.student_gpus)
    total = gpus * optimizer_bytes(work.student, training) if engines.offloads_optimizer else 0.0
    if engines.sleeps:
        models = [work.student, *([work.student] if work.has_reference else [])]
        models += [work.teacher] if work.teacher is not None and not placement.is_split else []
        total += (
            sum(engine_weights(m, width=engines.width, tensor_parallel=engines.tensor_parallel) for m in models) * gpus
        )
    return total


def _models(work: Work, engines: Engines, *, with_teacher: bool) -> Components:
    """Weights that engines in process keep in memory all the time."""
    found = {"rollout weights": engine_weights(work.student, width=engines.width, tensor_parallel=1)}
    if work.teacher is not None and with_teacher:
        found["teacher weights"] = engine_weights(work.teacher, width=engines.width, tensor_parallel=1)
    if work.has_reference:
        found["reference weights"] = engine_weights(work.student, width=engines.width, tensor_parallel=1)
    return found


def _scoring(
    phase: str,
    gpus: str,
    others: Components,
    weights: str,
    shape: ModelShape,
    work: Work,
    engines: Engines,
    cluster: Cluster,
) -> PhaseMemory:
    width, split = engines.width, engines.tensor_parallel
    tokens = engines.score_tokens if engines.sleeps else max(work.score_tokens_in_process, work.context)
    workspace = score_workspace(shape, tokens=tokens, width=width, tensor_parallel=split, is_chunked=not engines.sleeps)
    found = {**others, weights: engine_weights(shape, width=width, tensor_parallel=split), "workspace": workspace}
    if not engines.sleeps:
        return PhaseMemory(phase=phase, gpus=gpus, components=found)
    sequences = max(1, min(16, work.responses))  # more do not make a pass over a few thousand tokens faster
    return _with_kv_cache(phase, gpus, found, shape, engines, cluster, context=work.context, sequences=sequences)


def _with_kv_cache(
    phase: str,
    gpus: str,
    others: Components,
    shape: ModelShape,
    engines: Engines,
    cluster: Cluster,
    *,
    context: int,
    sequences: int,
) -> PhaseMemory:
    per_sequence = context * kv_bytes(shape, width=engines.width, tensor_parallel=engines.tensor_parallel)
    if engines.sleeps:
        left = cluster.usable_memory - sum(others.values())
        held = max(per_sequence, min(sequences * per_sequence, left))
    else:  # one tensor per layer, which is copied when it grows
        held = sequences * per_sequence * (1 + 2 / shape.layers)
    return PhaseMemory(
        phase=phase,
        gpus=gpus,
        components={**others, KV_CACHE: held},
        sequences=min(sequences, int(held / per_sequence)),
    )
