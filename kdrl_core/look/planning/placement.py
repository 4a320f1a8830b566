"""Where models go: colocated (every GPU does every phase in turn), split (some GPUs hold only the teacher), or with
replicas that generate on GPUs of their own."""

from collections.abc import Iterator
from dataclasses import dataclass

from kdrl_core.look.planning import memory
from kdrl_core.look.planning.cluster import Cluster, Engines, Role, Work
from kdrl_core.look.planning.memory import Components
from kdrl_core.look.planning.shapes import ModelShape

KV_CACHE = "KV cache"
SAMPLING = "teacher-sample"
"""The phase before the first step of sft, as the run names it."""
_TEACHER_GPUS = "teacher GPUs"
"""Here the teacher is served, so the recipe's settings for engines in process do not apply."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Number of GPUs for the student, the teacher, and replicas that generate; 0: on the student's GPUs."""

    student_gpus: int
    teacher_gpus: int = 0
    rollout_gpus: int = 0

    @property
    def is_split(self) -> bool:
        """Whether the teacher has GPUs of its own."""
        return self.teacher_gpus > 0

    @property
    def generating_gpus(self) -> int:
        """GPUs that generate."""
        return self.rollout_gpus or self.student_gpus

    @property
    def name(self) -> str:
        """For people."""
        if self.rollout_gpus:
            teacher = f", {self.teacher_gpus} score" if self.is_split else ""
            return f"{self.rollout_gpus} generate, {self.student_gpus} train{teacher}"
        if not self.is_split:
            return "colocated"
        return f"split {self.student_gpus}+{self.teacher_gpus}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseMemory:
    """Bytes on one GPU in one phase, by component."""

    phase: str
    gpus: str
    """`every GPU`, or `student GPUs`, `rollout GPUs`, `teacher GPUs`."""
    components: Components
    sequences: int | None = None
    """Number of longest sequences that the KV cache holds; None without a cache."""
    beside: float | None = None
    """Bytes of other components on a GPU where a vLLM engine in process takes its share; None on other GPUs."""

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.components.values())

    @property
    def taken(self) -> float:
        """Bytes of the engine, if it takes a share of the GPU; otherwise 0."""
        return self.total - self.beside if self.beside is not None else 0.0


def phase_memories(work: Work, engines: Engines, cluster: Cluster, placement: Placement) -> Iterator[PhaseMemory]:
    """The memory of a GPU in each phase. The KV cache takes what it can use of the rest, at least one sequence."""
    student = work.student
    gpus = "student GPUs" if placement.is_split or placement.rollout_gpus else "every GPU"
    training = engines.training(placement.student_gpus)
    resident = _resident(work, engines, placement)
    between = {**memory.trainer_states(student, training), **resident}
    if engines.rollout == "transformers" or engines.trainer == "torch":
        between["gradients"] = memory.gradient_bytes(student, training)  # freed when the next update begins
    weights = {"rollout weights": _weights("rollout", student, engines)}
    sync_buffer = {"sync buffer": 4.0 * student.embedding}

    def generating(phase: str, context: int, responses: int, role: Role = "rollout") -> PhaseMemory:
        shape, split = shape_for(role, work), engines.split(role)
        sequences = in_flight(work, engines, placement.generating_gpus, responses, role=role)
        workspace = memory.decode_workspace(shape, sequences=sequences, width=engines.width, tensor_parallel=split)
        own = {f"{role} weights": _weights(role, shape, engines), "workspace": workspace}
        own |= sync_buffer if placement.rollout_gpus else {}
        where, others = ("rollout GPUs", {}) if placement.rollout_gpus else (gpus, between)
        running = _Running(role=role, shape=shape, own=own, context=context, sequences=sequences)
        return _with_kv_cache(phase, where, others, running, engines, cluster)

    if work.sampled:
        if work.teacher is not None:
            yield generating(SAMPLING, work.context, work.sampled_together, "teacher")
    else:
        yield generating("rollout", work.context, work.responses)
    if work.teacher is not None and not work.sampled:
        where, others = (_TEACHER_GPUS, {}) if placement.is_split else (gpus, between)
        yield _scoring("teacher", where, others, work.teacher, work, engines, cluster)
    if work.has_reference:
        yield _scoring("reference", gpus, between, student, work, engines, cluster)
    update = memory.update_components(
        student, training, micro_batch_tokens=work.micro_batch_tokens, longest=work.context
    )
    yield PhaseMemory(phase="update", gpus=gpus, components={**update, **resident})
    step = memory.optimizer_step_components(student, training)
    yield PhaseMemory(phase="optimizer step", gpus=gpus, components={**step, **resident})
    if not placement.rollout_gpus and not work.sampled:  # replicas load beside their KV cache, in the phase `rollout`
        yield PhaseMemory(phase="weight sync", gpus=gpus, components={**between, **weights, **sync_buffer})
    if work.evaluation_responses:
        phase = generating("evaluation", work.evaluation_context, work.evaluation_responses)
        if engines.rollout == "transformers":  # evaluation loads a second model
            extra = {**phase.components, "evaluated weights": weights["rollout weights"]}
            yield PhaseMemory(phase=phase.phase, gpus=gpus, components=extra, sequences=phase.sequences)
        else:
            yield phase


def replicas(engines: Engines, role: Role, gpus: int) -> int:
    """Engines of a role on `gpus` GPUs; `transformers` is always one."""
    return 1 if engines.engine(role) == "transformers" else max(1, gpus // engines.tensor_parallel)


def shape_for(role: Role, work: Work) -> ModelShape:
    """The model of a role."""
    if role != "teacher":
        return work.student
    assert work.teacher is not None  # without one, no such role is planned
    return work.teacher


def in_flight(work: Work, engines: Engines, gpus: int, responses: int, *, role: Role = "rollout") -> int:
    """Responses that one engine of a role generates at a time."""
    if engines.engine(role) == "transformers":
        return min(work.num_in_process, responses)
    count = replicas(engines, role, gpus)
    most = engines.max_sequences
    if engines.concurrency is not None and role == "rollout":
        most = min(most, engines.concurrency // count)
    return max(1, min(most, -(-responses // count)))


def host_bytes(work: Work, engines: Engines, cluster: Cluster, placement: Placement) -> float:
    """Host memory per node for sleeping models and offloaded optimiser states."""
    gpus = min(placement.student_gpus, cluster.gpus_per_node)
    training = engines.training(placement.student_gpus)
    offloaded = memory.optimizer_bytes(work.student, training) if engines.offloads_optimizer else 0.0
    return gpus * (offloaded + sum(sleeping_models(work, engines, placement).values()))


def sleeping_models(work: Work, engines: Engines, placement: Placement) -> dict[Role, float]:
    """Role → bytes of weights that leave a student GPU while other phases use it."""
    return {
        role: _weights(role, shape, engines)
        for role, shape in _models(work, engines, placement).items()
        if engines.engine(role) == "vllm"
    }


def _resident(work: Work, engines: Engines, placement: Placement) -> Components:
    """Weights that engines in process always keep in memory."""
    return {
        f"{role} weights": _weights(role, shape, engines)
        for role, shape in _models(work, engines, placement).items()
        if engines.engine(role) == "transformers"
    }


def _models(work: Work, engines: Engines, placement: Placement) -> dict[Role, ModelShape]:
    """Models that generate and score on the GPUs of the student."""
    found: dict[Role, ModelShape] = {}
    if not placement.rollout_gpus:
        found["rollout"] = work.student
    if work.teacher is not None and not placement.is_split and "teacher" not in engines.of_trainer:
        found["teacher"] = work.teacher
    if work.has_reference and "reference" not in engines.of_trainer:
        found["reference"] = work.student
    return found


def _weights(role: Role, shape: ModelShape, engines: Engines) -> float:
    return memory.engine_weights(shape, width=engines.width, tensor_parallel=engines.split(role))


def _scoring(
    role: Role,
    gpus: str,
    others: Components,
    shape: ModelShape,
    work: Work,
    engines: Engines,
    cluster: Cluster,
) -> PhaseMemory:
    is_vllm = engines.engine(role) == "vllm" and role not in engines.of_trainer
    tokens = engines.score_tokens if is_vllm else max(work.score_tokens_in_process, work.context)
    workspace = memory.score_workspace(
        shape, tokens=tokens, width=engines.width, tensor_parallel=engines.split(role), is_chunked=not is_vllm
    )
    phase, own = f"{role}-score", {f"{role} weights": _weights(role, shape, engines), "workspace": workspace}
    if role in engines.of_trainer:
        del own[f"{role} weights"]
    if not is_vllm:
        return PhaseMemory(phase=phase, gpus=gpus, components={**others, **own})
    sequences = max(1, min(16, work.responses))  # more do not make a pass over a few thousand tokens faster
    running = _Running(role=role, shape=shape, own=own, context=work.context, sequences=sequences)
    return _with_kv_cache(phase, gpus, others, running, engines, cluster)


def sequence_bytes(role: Role, shape: ModelShape, engines: Engines, *, context: int) -> float:
    """KV cache of one sequence of `context` tokens on a GPU of the role's engine."""
    return context * memory.kv_bytes(shape, width=engines.width, tensor_parallel=engines.split(role))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Running:
    """An engine that generates or scores up to `sequences` of `context` tokens at a time."""

    role: Role
    shape: ModelShape
    own: Components
    """Its weights and workspace."""
    context: int
    sequences: int


def _with_kv_cache(
    phase: str, gpus: str, others: Components, running: _Running, engines: Engines, cluster: Cluster
) -> PhaseMemory:
    """The phase of an engine beside `others`; its KV cache uses the memory that is left."""
    role, own, sequences = running.role, running.own, running.sequences
    per_sequence = sequence_bytes(role, running.shape, engines, context=running.context)
    engine = "server" if gpus == _TEACHER_GPUS else engines.engine(role)
    components = {**others, **own}
    if engine == "transformers":  # one tensor per layer, which is copied when it grows
        held = sequences * per_sequence * (1 + 2 / running.shape.layers)
    elif engine == "vllm" and engines.kv_cache_bytes is not None:
        held = engines.kv_cache_bytes
    else:
        left = cluster.usable_memory - sum(components.values())
        if engine == "vllm" and engines.memory_share is not None:
            left = min(left, engines.memory_share * cluster.gpu_memory - sum(own.values()))
        held = max(per_sequence, min(sequences * per_sequence, left))
    takes_share = engine == "vllm" and engines.kv_cache_bytes is None
    return PhaseMemory(
        phase=phase,
        gpus=gpus,
        components={**components, KV_CACHE: held},
        sequences=min(sequences, int(held / per_sequence)),
        beside=sum(others.values()) if takes_share else None,
    )
