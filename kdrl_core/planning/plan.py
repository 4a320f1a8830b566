"""From a stage's work and a cluster to the placement that fits and is fastest, or to why none fits and what would."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from kdrl_core.errors import RecipeError
from kdrl_core.planning.cluster import Cluster, Engines, Work
from kdrl_core.planning.cost import Rates, StepTime, gradient_traffic, rollout_s, step_time, sync_traffic
from kdrl_core.planning.placement import PhaseMemory, Placement, host_bytes, phase_memories

GB = 1e9
# B.2: 280 KDRL steps ≈ 200 KD-RKL steps ≈ 460 GRPO steps ≈ 80 hours.
_REPORTED_STEPS = {"kdrl": 280, "kd_rkl": 200, "grpo": 460}
_REPORTED_S = 80 * 3600.0
_REPORTED_STUDENT, _REPORTED_RESPONSE = "DeepSeek-R1-Distill-Qwen-1.5B", 20_480
_LARGER_GPUS = (24 * GB, 40 * GB, 48 * GB, 80 * GB, 96 * GB, 141 * GB, 192 * GB, 288 * GB)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One placement, with its memory and its time."""

    placement: Placement
    memory: tuple[PhaseMemory, ...]
    time: StepTime
    usable: float

    @property
    def worst(self) -> PhaseMemory:
        """The phase with the most memory."""
        return max(self.memory, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool:
        """Whether every phase does."""
        return self.worst.total <= self.usable * (1 + 1e-9)

    @property
    def reason(self) -> str:
        """Why it does not fit, with the phase and its largest parts."""
        worst = self.worst
        parts = sorted(worst.components.items(), key=lambda part: -part[1])[:3]
        largest = ", ".join(f"{name} {value / GB:.1f}" for name, value in parts)
        return (
            f"{self.placement.name} does not fit, because {worst.phase} needs {worst.total / GB:.1f} GB on "
            f"{worst.gpus}, and {self.usable / GB:.1f} GB are usable (largest: {largest} GB)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """All placements of a stage, the fastest that fits first."""

    work: Work
    cluster: Cluster
    engines: Engines
    rates: Rates
    candidates: tuple[Candidate, ...]
    remedies: tuple[str, ...]
    """Where nothing fits: changes that make it fit."""

    @property
    def best(self) -> Candidate | None:
        """The fastest placement that fits."""
        return self.candidates[0] if self.candidates[0].fits else None

    @property
    def step_s(self) -> float | None:
        """Seconds of a step."""
        return self.best.time.total if self.best else None

    @property
    def reported_step_s(self) -> float | None:
        """Seconds of a step in the paper, for the setting that it reports (B.2), on GPUs that we do not know of."""
        is_reported = self.work.student.name == _REPORTED_STUDENT and self.work.max_response == _REPORTED_RESPONSE
        steps = _REPORTED_STEPS.get(self.work.objective) if is_reported else None
        return _REPORTED_S / steps if steps else None

    @property
    def evaluation_s(self) -> float:
        """Seconds of all periodic evaluations of the stage."""
        if self.best is None or not self.work.evaluation_responses:
            return 0.0
        one = rollout_s(
            replace(self.work, max_response=self.work.evaluation_context - self.work.max_prompt),
            self.engines,
            self.cluster,
            self.best.placement.student_gpus,
            self.rates,
            responses=self.work.evaluation_responses,
        )
        return one * self.work.evaluations

    @property
    def hours(self) -> float | None:
        """Of all steps of the stage, periodic evaluations included."""
        return (self.step_s * self.work.steps + self.evaluation_s) / 3600 if self.step_s is not None else None

    def to_json(self) -> dict[str, Any]:
        """Plain values: bytes, seconds, hours."""
        return {
            "stage": self.work.stage,
            "fits": self.best is not None,
            "placement": self.best.placement.name if self.best else None,
            "usable_bytes_per_gpu": self.cluster.usable_memory,
            "step_s": self.step_s,
            "paper_step_s": self.reported_step_s,
            "steps": self.work.steps,
            "evaluation_s": self.evaluation_s,
            "hours": self.hours,
            "gpu_hours": self.hours * self.cluster.gpus if self.hours is not None else None,
            "parameters": {
                "student": self.work.student.parameters,
                "teacher": self.work.teacher.parameters if self.work.teacher else None,
            },
            "assumed": {
                "mean_prompt_tokens": self.work.mean_prompt,
                "mean_response_tokens": self.work.mean_response,
                "engines": asdict(self.engines),
                "cluster": asdict(self.cluster),
                "rates": asdict(self.rates),
            },
            "placements": [_candidate_json(self, candidate) for candidate in self.candidates],
            "remedies": list(self.remedies),
        }


def _candidate_json(plan: StagePlan, candidate: Candidate) -> dict[str, Any]:
    gpus = candidate.placement.student_gpus
    return {
        "placement": candidate.placement.name,
        "student_gpus": gpus,
        "teacher_gpus": candidate.placement.teacher_gpus,
        "fits": candidate.fits,
        "reason": None if candidate.fits else candidate.reason,
        "memory": [
            {
                "phase": phase.phase,
                "gpus": phase.gpus,
                "bytes": phase.total,
                "components": phase.components,
                "kv_sequences": phase.sequences,
            }
            for phase in candidate.memory
        ],
        "host_bytes_per_node": host_bytes(plan.work, plan.engines, plan.cluster, candidate.placement),
        "time_s": {**asdict(candidate.time), "total": candidate.time.total},
        "gradient_bytes_per_gpu": gradient_traffic(plan.work, plan.engines, gpus),
        "sync_bytes": sync_traffic(plan.work, plan.cluster),
    }


def plan_stage(work: Work, engines: Engines, cluster: Cluster, rates: Rates | None = None) -> StagePlan:
    """Judge every placement of a stage.

    Raises:
        RecipeError: the engines cannot use these GPUs at all.
    """
    _check(work, engines, cluster)
    rates = rates or Rates()
    candidates = _candidates(work, engines, cluster, rates)
    remedies = () if candidates[0].fits else tuple(_remedies(work, engines, cluster, rates))
    return StagePlan(
        work=work, cluster=cluster, engines=engines, rates=rates, candidates=tuple(candidates), remedies=remedies
    )


def _candidates(work: Work, engines: Engines, cluster: Cluster, rates: Rates) -> list[Candidate]:
    found = []
    for placement in _placements(work, engines, cluster):
        memory = phase_memories(work, engines, cluster, placement)
        held = next(phase.sequences for phase in memory if phase.phase == "rollout")
        time = step_time(work, engines, cluster, placement, rates, kv_sequences=held)
        found.append(Candidate(placement=placement, memory=tuple(memory), time=time, usable=cluster.usable_memory))
    return sorted(found, key=lambda one: (not one.fits, one.time.total if one.fits else one.worst.total))


def _placements(work: Work, engines: Engines, cluster: Cluster) -> Iterator[Placement]:
    yield Placement(student_gpus=cluster.gpus)
    if work.teacher is None or not engines.sleeps:
        return
    for teacher in range(engines.tensor_parallel, cluster.gpus, engines.tensor_parallel):
        if cluster.gpus <= 16 or teacher % (cluster.gpus // 16) == 0:  # sixteenths do where there are hundreds
            yield Placement(student_gpus=cluster.gpus - teacher, teacher_gpus=teacher)


def _check(work: Work, engines: Engines, cluster: Cluster) -> None:
    split = engines.tensor_parallel
    if cluster.gpus > cluster.gpus_per_node and cluster.gpus % cluster.gpus_per_node:
        raise RecipeError(
            f"{cluster.gpus} GPUs are no whole number of nodes of {cluster.gpus_per_node}; "
            "change --gpus or --gpus-per-node"
        )
    if split > min(cluster.gpus, cluster.gpus_per_node) or cluster.gpus % split:
        raise RecipeError(
            f"--tensor-parallel {split} does not divide {cluster.gpus} GPUs in nodes of {cluster.gpus_per_node}; "
            "an engine stays within its node"
        )
    for role, shape in (("student", work.student), ("teacher", work.teacher)):
        if shape is not None and shape.heads % split:
            raise RecipeError(f"--tensor-parallel {split} does not divide the {role}'s {shape.heads} attention heads")
        if shape is not None and shape.max_context is not None and work.context > shape.max_context:
            raise RecipeError(
                f"{work.stage}: prompt and response take {work.context} tokens, but {shape.name} ({role}) has "
                f"{shape.max_context}; lower {work.stage}.max_response_tokens"
            )
    if engines.offloads_optimizer and (engines.trainer == "torch" or engines.zero_stage == 0):
        raise RecipeError("--offload-optimizer needs a partitioned optimiser: --trainer deepspeed, --zero-stage 2 or 3")
    if not engines.sleeps and cluster.gpus > 1 and engines.trainer == "torch":
        raise RecipeError("transformers and torch run in one process on one GPU; plan --gpus 1, or other engines")


def _remedies(work: Work, engines: Engines, cluster: Cluster, rates: Rates) -> Iterator[str]:
    """Single changes that make it fit; where none does, the first few of them together that do."""

    def fits(work: Work, engines: Engines, cluster: Cluster = cluster) -> bool:
        return _candidates(work, engines, cluster, rates)[0].fits

    changes = list(_changes(work, engines, cluster))
    single = [name for name, change in changes if fits(*change(work, engines))]
    yield from single
    if not single:
        names: list[str] = []
        both = (work, engines)
        for name, change in changes:
            names.append(name)
            both = change(*both)
            if fits(*both):
                yield " ".join(names)
                break
    for memory in _LARGER_GPUS:
        if memory > cluster.gpu_memory and fits(work, engines, replace(cluster, gpu_memory=memory)):
            yield f"GPUs with {memory / GB:.0f} GB"
            break
    for factor in (2, 4, 8):
        gpus = cluster.gpus * factor
        if engines.trainer == "deepspeed" and fits(work, engines, replace(cluster, gpus=gpus)):
            yield f"--gpus {gpus}"
            break


_Change = Callable[[Work, Engines], tuple[Work, Engines]]


def _changes(work: Work, engines: Engines, cluster: Cluster) -> Iterator[tuple[str, _Change]]:
    """What can be asked for in place of what was, from the cheapest to what changes the method."""
    if not engines.is_checkpointed:
        yield "--activation-checkpointing", lambda w, e: (w, replace(e, is_checkpointed=True))
    if not engines.sleeps and (fewer := work.num_in_process // 4):
        yield f"--set runtime.rollout_batch_size={fewer}", lambda w, e: (replace(w, num_in_process=fewer), e)
    if (budget := work.context) < work.micro_batch_tokens:
        name = f"--set {work.stage}.micro_batch_tokens={budget}"
        yield name, lambda w, e: (replace(w, micro_batch_tokens=budget), e)
    if engines.trainer == "deepspeed":
        if cluster.gpus > 1 and engines.zero_stage < 3:
            yield "--zero-stage 3", lambda w, e: (w, replace(e, zero_stage=3))
        if not engines.offloads_optimizer and engines.zero_stage > 0:
            yield "--offload-optimizer", lambda w, e: (w, replace(e, offloads_optimizer=True))
    if engines.sleeps and engines.tensor_parallel == 1:
        most = next((split for split in (8, 4, 2) if _divides(split, work, cluster)), None)
        if most is not None:
            yield f"--tensor-parallel {most}", lambda w, e: (w, replace(e, tensor_parallel=most))
    for part in (2, 4):
        limit = work.max_response // part
        yield f"--set {work.stage}.max_response_tokens={limit}", partial(_shorten, limit)


def _shorten(limit: int, work: Work, engines: Engines) -> tuple[Work, Engines]:
    budget = min(work.micro_batch_tokens, work.max_prompt + limit)
    mean = min(work.mean_response, limit)
    return replace(work, max_response=limit, mean_response=mean, micro_batch_tokens=budget), engines


def _divides(split: int, work: Work, cluster: Cluster) -> bool:
    shapes = [shape for shape in (work.student, work.teacher) if shape is not None]
    return (
        split <= min(cluster.gpus, cluster.gpus_per_node)
        and cluster.gpus % split == 0
        and all(shape.heads % split == 0 for shape in shapes)
    )


def kv_note(plan: StagePlan, candidate: Candidate) -> str:
    """What the rollout's KV cache holds, in words."""
    phase = next(each for each in candidate.memory if each.phase == "rollout")
    held = phase.sequences or 0
    if not plan.engines.sleeps:
        return f"{held} responses are generated at a time"
    mean = int(held * plan.work.context / plan.work.mean_sequence)
    return (
        f"the KV cache holds {held} responses of {plan.work.context:,} tokens at a time, "
        f"or {mean} of the mean {plan.work.mean_sequence:,.0f}"
    )


def total_hours(plans: Sequence[StagePlan]) -> float | None:
    """Of all stages; None if one does not fit."""
    hours = [plan.hours for plan in plans]
    return None if None in hours else sum(hour for hour in hours if hour is not None)
