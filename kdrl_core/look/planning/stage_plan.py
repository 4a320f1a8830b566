"""The plan of a stage on a cluster: the fastest placement that fits; or why none fits, and which changes help.

`conditions` says what to set or start so that a run of the recipe follows the plan. A plan uses all GPUs. A run uses
only the ranks and servers in its recipe, and itself starts one vLLM engine per role, in its own process.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import floor
from typing import Any

from kdrl_core.config import Recipe
from kdrl_core.look.planning.candidates import Candidate, candidates_of, check_gpus, remedies_of
from kdrl_core.look.planning.cluster import Cluster, Engines, Role, Work
from kdrl_core.look.planning.cost import Rates, StepTime, gradient_traffic, rollout_s, score_s, sync_traffic
from kdrl_core.look.planning.placement import KV_CACHE, host_bytes, in_flight, replicas, sequence_bytes

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
        return self.best.time.total if self.best else None

    @property
    def reported_step_s(self) -> float | None:
        """Seconds of a step in the paper, for the setting that it reports (B.2). The paper does not name its GPUs."""
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
    """Judge every placement of a stage. Raises RecipeError if the engines cannot use these GPUs at all."""
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


_URLS = "urls=['http://127.0.0.1:8000/v1',…]"
NOTICED = 0.05
"""`conditions` mentions that a run has fewer engines if its step takes longer by more than this share."""


def conditions(plan: StagePlan, recipe: Recipe) -> list[str]:
    """Sentences with the settings to add to `kdrl run`; none if the recipe runs as planned, or does not fit."""
    if (chosen := plan.best) is None:
        return []
    return [
        *_training(plan, recipe, chosen),
        *_rollouts(plan, recipe, chosen),
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
        yield "ranks on several nodes: --set trainer.hostfile=FILE (docs/scaling.md)"


def time_alone(plan: StagePlan, chosen: Candidate) -> StepTime:
    """Time of a step if each role without replicas has only one vLLM engine, in the run's process."""
    engines, work, cluster, rates, time = plan.engines, plan.work, plan.cluster, plan.rates, chosen.time
    split = engines.tensor_parallel
    rollout, teacher, reference = time.rollout, time.teacher_score, time.reference_score
    if engines.rollout == "vllm" and "rollout" not in engines.served:
        rollout = rollout_s(work, engines, cluster, split, rates, kv_sequences=_capacity(plan, chosen))
    in_process = engines.teacher == "vllm" and "teacher" not in engines.served and not chosen.placement.is_split
    if work.teacher is not None and in_process:
        teacher = score_s("teacher", work.teacher, work, engines, cluster, split, rates)
    if work.has_reference and engines.engine("reference") == "vllm":
        reference = score_s("reference", work.student, work, engines, cluster, split, rates)
    return replace(time, rollout=rollout, teacher_score=teacher, reference_score=reference)


def _capacity(plan: StagePlan, chosen: Candidate) -> int:
    """Number of longest sequences that fit into the KV cache of an engine in process."""
    phase, engines = next(phase for phase in chosen.memory if phase.phase == "rollout"), plan.engines
    others = phase.total - phase.components[KV_CACHE]
    room = engines.kv_cache_bytes or min(
        plan.cluster.usable_memory - others, chosen.share - (others - (phase.beside or 0.0))
    )
    return int(room / sequence_bytes("rollout", plan.work.student, engines, context=plan.work.context))


def _rollouts(plan: StagePlan, recipe: Recipe, chosen: Candidate) -> Iterator[str]:
    engines, alone = plan.engines, time_alone(plan, chosen)
    count = replicas(engines, "rollout", chosen.placement.generating_gpus)
    if engines.rollout == "server" or "rollout" in engines.served:
        yield from _replicas(plan, recipe, chosen, count)
    if engines.rollout == "transformers" and plan.cluster.gpus > 1:
        yield "rollout.engine=transformers generates on one GPU alone; on more: --set rollout.engine=vllm"
    least = NOTICED * chosen.time.total
    if alone.rollout - chosen.time.rollout > least:
        yield (
            f"the rollout time assumes {count} engines; rollout.engine=vllm starts one, of "
            f"{many(engines.tensor_parallel, 'GPU')} (vllm.tensor_parallel), which takes {alone.rollout:,.0f} s in "
            f"place of {chosen.time.rollout:,.0f}. For more: kdrl serve --replicas {count} (docs/engines.md), and "
            f'--set rollout.engine=server --set "rollout.server.{_URLS}" --set rollout.server.sleep=true'
        )
    if alone.reference_score - chosen.time.reference_score > least:
        yield (
            f"the reference policy's score time assumes {count} engines; a run has one, which takes "
            f"{alone.reference_score:,.0f} s in place of {chosen.time.reference_score:,.0f}"
        )


def _scores(plan: StagePlan, recipe: Recipe, chosen: Candidate) -> Iterator[str]:
    placement, engines, alone = chosen.placement, plan.engines, time_alone(plan, chosen)
    if plan.work.teacher is None:
        if recipe.stage(plan.work.stage).scores_teacher:
            yield "the teacher's scores come from teacher.server: neither its GPUs nor its time are in this plan"
        return
    if placement.is_split:
        count = placement.teacher_gpus // engines.tensor_parallel
        yield (
            f"the teacher has GPUs of its own: serve it there, {many(count, 'replica')}, and list all in "
            "teacher.server.urls (docs/teacher-servers.md)"
        )
    elif engines.teacher == "transformers" and plan.cluster.gpus > 1:
        yield "teacher.engine=transformers scores on one GPU alone; on more: --set teacher.engine=vllm"
    elif alone.teacher_score - chosen.time.teacher_score > NOTICED * chosen.time.total:
        yield (
            f"the teacher's score time assumes {replicas(engines, 'teacher', placement.student_gpus)} engines; "
            f"teacher.engine=vllm starts one, which takes {alone.teacher_score:,.0f} s in place of "
            f"{chosen.time.teacher_score:,.0f}. For more, serve the teacher (docs/teacher-servers.md): "
            f'--set "teacher.server.{_URLS}" --set teacher.server.sleep=true'
        )
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


def many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _share(plan: StagePlan, chosen: Candidate) -> Iterator[str]:
    """vLLM takes its whole share even if the plan needs less. It does not start if others use a part of that share."""
    beside = [phase.beside for phase in chosen.memory if phase.beside is not None]
    if not beside:
        return
    cluster = plan.cluster
    most = floor(100 * (cluster.usable_memory - max(beside)) / cluster.gpu_memory + 1e-9) / 100
    if plan.engines.memory_share > most:
        yield (
            f"a vLLM engine takes {plan.engines.memory_share:g} of its GPU, beside {max(beside) / 1e9:.1f} GB of "
            f"others: --set vllm.gpu_memory_utilization={most:g}"
        )
    if plan.engines.served:
        share = min(plan.engines.memory_share, most)
        yield (
            "replicas that sleep are started asleep, one model after the other: kdrl serve --asleep "
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
