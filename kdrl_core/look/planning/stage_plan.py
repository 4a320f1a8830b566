"""The plan of a stage on a cluster: the fastest placement that fits; or why none fits, and which changes help.

A plan uses all GPUs. A run uses only the ranks, servers and `vllm.replicas` of its recipe: `time_alone` is its time,
and kdrl_core.look.planning.conditions says what to set.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from kdrl_core.look.planning.candidates import Candidate, candidates_of, check_gpus, remedies_of
from kdrl_core.look.planning.cluster import Cluster, Engines, Role, Work
from kdrl_core.look.planning.cost import Rates, StepTime, gradient_traffic, rollout_s, score_s, sync_traffic
from kdrl_core.look.planning.placement import KV_CACHE, SAMPLING, host_bytes, sequence_bytes

# Sec. 4.3: 280 KDRL steps ≈ 200 KD-RKL steps ≈ 460 GRPO steps ≈ 80 hours.
_REPORTED_STEPS = {"kdrl": 280, "kd_rkl": 200, "grpo": 460}
_REPORTED_S = 80 * 3600.0
_REPORTED_STUDENT, _REPORTED_RESPONSE = "DeepSeek-R1-Distill-Qwen-1.5B", 20_480


NOTICED = 0.05
"""A time with the engines of the recipe is told if it is longer than the plan's by more than this share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """All placements of a stage, the fastest that fits first."""

    work: Work
    cluster: Cluster
    engines: Engines
    rates: Rates
    candidates: tuple[Candidate, ...]
    remedies: tuple[str, ...]
    """If nothing fits: changes that make it fit."""

    @property
    def best(self) -> Candidate | None:
        """The fastest placement that fits."""
        return self.candidates[0] if self.candidates[0].fits else None

    @property
    def step_s(self) -> float | None:
        return self.best.time.total if self.best else None

    @property
    def reported_step_s(self) -> float | None:
        """Seconds of a step in the paper, for the setting that it reports (4.3). The paper does not name its GPUs."""
        is_reported = self.work.student.name == _REPORTED_STUDENT and self.work.max_response == _REPORTED_RESPONSE
        steps = _REPORTED_STEPS.get(self.work.objective) if is_reported else None
        return _REPORTED_S / steps if steps else None

    @property
    def evaluation_s(self) -> float:
        """Seconds of all periodic evaluations of the stage."""
        return self._answering_s("rollout", self.work.evaluation_responses) * self.work.evaluations

    @property
    def final_evaluation_s(self) -> float:
        """Seconds of the run's final evaluation, after its last stage."""
        return sum(self._answering_s(role, responses) for role, responses in self.work.final_responses.items())

    def _answering_s(self, role: Role, responses: int) -> float:
        """Seconds in which a role's engine answers so many problems of benchmarks."""
        if self.best is None or not responses or (role == "teacher" and self.work.teacher is None):
            return 0.0
        longest = self.work.evaluation_context - self.work.max_prompt
        return rollout_s(
            replace(self.work, max_response=longest, longest_response=max(longest, self.work.mean_response)),
            self.engines,
            self.cluster,
            self.best.placement.generating_gpus,
            self.rates,
            responses=responses,
            role=role,
        )

    @property
    def sampling_s(self) -> float:
        """Seconds until the teacher has given its responses, before the first step of sft."""
        return 0.0 if self.best is None else self.sampling_of(self.work.sampled)

    def sampling_of(self, responses: int) -> float:
        """Seconds in which the teacher gives so many responses, one published part after the other."""
        work, chosen = self.work, self.candidates[0]
        if work.teacher is None or not responses:
            return 0.0
        held = next(phase.sequences for phase in chosen.memory if phase.phase == SAMPLING)
        one = rollout_s(
            work,
            self.engines,
            self.cluster,
            chosen.placement.student_gpus,
            self.rates,
            responses=work.sampled_together,
            kv_sequences=held,
            role="teacher",
        )
        return one * responses / work.sampled_together

    @property
    def hours(self) -> float | None:
        """Hours of the stage: the teacher's responses, all steps, and evaluations. The last stage has the final one."""
        if self.step_s is None:
            return None
        evaluations = self.evaluation_s + self.final_evaluation_s
        return (self.sampling_s + self.step_s * self.work.steps + evaluations) / 3600

    def to_json(self) -> dict[str, Any]:
        """Plain values: bytes, seconds, hours."""
        lora = self.engines.lora
        return {
            "stage": self.work.stage,
            "fits": self.best is not None,
            "placement": self.best.placement.name if self.best else None,
            "usable_bytes_per_gpu": self.cluster.usable_memory,
            "step_s": self.step_s,
            "paper_step_s": self.reported_step_s,
            "steps": self.work.steps,
            "evaluation_s": self.evaluation_s,
            "final_evaluation_s": self.final_evaluation_s,
            "sampled": self.work.sampled,
            "sampling_s": self.sampling_s,
            "hours": self.hours,
            "gpu_hours": self.hours * self.cluster.gpus if self.hours is not None else None,
            "parameters": {
                "student": self.work.student.parameters,
                "teacher": self.work.teacher.parameters if self.work.teacher else None,
            },
            "assumed": {
                "mean_prompt_tokens": self.work.mean_prompt,
                "mean_response_tokens": self.work.mean_response,
                "longest_response_tokens": self.work.longest_response,
                "engines": {**asdict(self.engines), "lora": lora.model_dump() if lora else None},
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
        "sync_bytes": sync_traffic(plan.work, plan.engines, plan.cluster),
    }


def plan_stage(work: Work, engines: Engines, cluster: Cluster, rates: Rates | None = None) -> StagePlan:
    """Judge every placement of a stage. Raises RecipeError if the engines cannot use these GPUs at all."""
    check_gpus(work, engines, cluster)
    rates = rates or Rates()
    candidates = candidates_of(work, engines, cluster, rates)
    remedies = () if candidates[0].fits else tuple(remedies_of(work, engines, cluster, rates))
    return StagePlan(
        work=work, cluster=cluster, engines=engines, rates=rates, candidates=tuple(candidates), remedies=remedies
    )


def kv_note(plan: StagePlan, candidate: Candidate) -> str:
    """The capacity of the generating engine's KV cache, in words."""
    phase = next((each for each in candidate.memory if each.phase in ("rollout", SAMPLING)), None)
    if phase is None:
        return "the teacher's responses come from teacher.server"
    held = phase.sequences or 0
    if plan.engines.engine("teacher" if plan.work.sampled else "rollout") == "transformers":
        return f"{held} responses are generated at a time"
    mean = int(held * plan.work.context / plan.work.mean_sequence)
    return (
        f"the KV cache holds {held} responses of {plan.work.context:,} tokens at a time, "
        f"or {mean} of the mean {plan.work.mean_sequence:,.0f}"
    )


def total_hours(plans: Sequence[StagePlan]) -> float | None:
    """Hours of all stages; None if one does not fit."""
    hours = [plan.hours for plan in plans]
    return None if None in hours else sum(hour for hour in hours if hour is not None)


def time_alone(plan: StagePlan, chosen: Candidate) -> StepTime:
    """Time of a step with the engines that a run of the recipe has: `vllm.replicas` of each role without servers."""
    engines, work, cluster, rates, time = plan.engines, plan.work, plan.cluster, plan.rates, chosen.time
    if work.sampled:
        return time
    rollout, teacher, reference = time.rollout, time.teacher_score, time.reference_score
    placement = chosen.placement
    if engines.rollout == "vllm" and "rollout" not in engines.served:
        gpus = gpus_alone(engines, placement.generating_gpus)
        rollout = rollout_s(work, engines, cluster, gpus, rates, kv_sequences=_capacity(plan, chosen))
    gpus = gpus_alone(engines, placement.student_gpus)
    in_process = engines.teacher == "vllm" and "teacher" not in engines.served and not placement.is_split
    if work.teacher is not None and in_process:
        teacher = score_s("teacher", work.teacher, work, engines, cluster, gpus, rates)
    if work.has_reference and engines.engine("reference") == "vllm":
        reference = score_s("reference", work.student, work, engines, cluster, gpus, rates)
    return replace(time, rollout=rollout, teacher_score=teacher, reference_score=reference)


def gpus_alone(engines: Engines, gpus: int) -> int:
    """Of `gpus`, how many the engines of a role use that the run itself starts."""
    return min(engines.replicas * engines.tensor_parallel, gpus)


def _capacity(plan: StagePlan, chosen: Candidate) -> int:
    """Number of longest sequences that fit into the KV cache of an engine in process."""
    phase, engines = next(phase for phase in chosen.memory if phase.phase == "rollout"), plan.engines
    others = phase.total - phase.components[KV_CACHE]
    own = others - (phase.beside or 0.0)
    room = engines.kv_cache_bytes or min(plan.cluster.usable_memory - others, chosen.share - own)
    return int(room / sequence_bytes("rollout", plan.work.student, engines, context=plan.work.context))


def many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
