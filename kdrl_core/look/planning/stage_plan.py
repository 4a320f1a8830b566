"""The plan of a stage on a cluster: the fastest placement that fits; or why none fits, and what would."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from kdrl_core.look.planning.candidates import Candidate, candidates_of, check_gpus
from kdrl_core.look.planning.cluster import Cluster, Engines, Work
from kdrl_core.look.planning.cost import Rates, gradient_traffic, rollout_s, sync_traffic
from kdrl_core.look.planning.placement import host_bytes
from kdrl_core.look.planning.remedies import remedies_of

# B.2: 280 KDRL steps ≈ 200 KD-RKL steps ≈ 460 GRPO steps ≈ 80 hours.
_REPORTED_STEPS = {"kdrl": 280, "kd_rkl": 200, "grpo": 460}
_REPORTED_S = 80 * 3600.0
_REPORTED_STUDENT, _REPORTED_RESPONSE = "DeepSeek-R1-Distill-Qwen-1.5B", 20_480


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
        """Seconds of a step."""
        return self.best.time.total if self.best else None

    @property
    def reported_step_s(self) -> float | None:
        """Seconds of a step in the paper, for the setting that it reports (B.2). It does not name its GPUs."""
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
        """Hours of all steps of the stage, with periodic evaluations."""
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
    check_gpus(work, engines, cluster)
    rates = rates or Rates()
    candidates = candidates_of(work, engines, cluster, rates)
    remedies = () if candidates[0].fits else tuple(remedies_of(work, engines, cluster, rates))
    return StagePlan(
        work=work, cluster=cluster, engines=engines, rates=rates, candidates=tuple(candidates), remedies=remedies
    )


def kv_note(plan: StagePlan, candidate: Candidate) -> str:
    """The capacity of the rollout's KV cache, in words."""
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
    """Hours of all stages; None if one does not fit."""
    hours = [plan.hours for plan in plans]
    return None if None in hours else sum(hour for hour in hours if hour is not None)
