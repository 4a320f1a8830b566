"""From a stage's work and a cluster to the placement that fits and is fastest, or to why none fits and what would."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import ceil
from typing import Any

from kdrl_core.errors import RecipeError
from kdrl_core.look.planning.cluster import Cluster, Engines, Role, Work
from kdrl_core.look.planning.cost import Rates, StepTime, gradient_traffic, rollout_s, step_time, sync_traffic
from kdrl_core.look.planning.placement import PhaseMemory, Placement, host_bytes, phase_memories, sequence_bytes
from kdrl_core.look.planning.shapes import ModelShape

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
    share: float
    """Bytes that a vLLM engine in process may take of a GPU (vllm.gpu_memory_utilization)."""

    @property
    def worst(self) -> PhaseMemory:
        """The phase with the most memory."""
        return max(self.memory, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool:
        """Whether every phase does."""
        return self.cramped is None and self.worst.total <= self.usable * (1 + 1e-9)

    @property
    def cramped(self) -> PhaseMemory | None:
        """A phase whose engine needs more than its share."""
        return next((phase for phase in self.memory if phase.taken > self.share * (1 + 1e-9)), None)

    @property
    def reason(self) -> str:
        """Why it does not fit, with the phase and its largest parts."""
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
            self.best.placement.generating_gpus,
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
        "rollout_gpus": candidate.placement.rollout_gpus,
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
        share = engines.memory_share * cluster.gpu_memory
        found.append(
            Candidate(placement=placement, memory=tuple(memory), time=time, usable=cluster.usable_memory, share=share)
        )
    return sorted(found, key=lambda one: (not one.fits, one.time.total if one.fits else one.worst.total))


def _placements(work: Work, engines: Engines, cluster: Cluster) -> Iterator[Placement]:
    step = engines.tensor_parallel
    shares = [
        gpus
        for gpus in range(step, cluster.gpus, step)
        if cluster.gpus <= 16 or gpus % (cluster.gpus // 16) == 0  # sixteenths do where there are hundreds
    ]
    for teacher in [0, *(shares if work.teacher is not None and engines.teacher == "vllm" else [])]:
        for rollout in shares if engines.rollout == "server" else [0]:
            if (student := cluster.gpus - teacher - rollout) > 0:
                yield Placement(student_gpus=student, teacher_gpus=teacher, rollout_gpus=rollout)


def _check(work: Work, engines: Engines, cluster: Cluster) -> None:
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
            f"rollout.engine=server: the replicas, of vllm.tensor_parallel={split} GPUs each, have GPUs of their own "
            f"beside the trainer's, and {cluster.gpus} are planned; plan --gpus {2 * split} or more"
        )
    if cluster.gpus > cluster.gpus_per_node and cluster.gpus % cluster.gpus_per_node:
        raise RecipeError(
            f"{cluster.gpus} GPUs are no whole number of nodes of {cluster.gpus_per_node}; "
            "change --gpus or --gpus-per-node"
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
            yield f"{gpus} GPUs (kdrl plan --gpus {gpus})"
            break


_Change = Callable[[Work, Engines], tuple[Work, Engines]]


def _changes(work: Work, engines: Engines, cluster: Cluster) -> Iterator[tuple[str, _Change]]:
    """What can be set in place of what was, from the cheapest to what changes the method."""
    if not engines.is_checkpointed:
        yield "--set trainer.activation_checkpointing=true", lambda w, e: (w, replace(e, is_checkpointed=True))
    most = Engines().memory_share
    if engines.memory_share < most and "vllm" in (engines.rollout, engines.teacher):
        yield f"--set vllm.gpu_memory_utilization={most:g}", lambda w, e: (w, replace(e, memory_share=most))
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
    if plan.engines.rollout == "transformers":
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
