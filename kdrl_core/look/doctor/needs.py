"""What a run of the recipe needs of memory and disk, against what is there: arithmetic from the models' shapes."""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil

from kdrl_core.config import Recipe, StageConfig
from kdrl_core.errors import KdrlError
from kdrl_core.look.doctor.checks import CheckFailed, NotApplicable, Observed
from kdrl_core.look.doctor.machine import GIB, size_words
from kdrl_core.look.doctor.trial import models_to_try, stage_to_try
from kdrl_core.look.planning import memory
from kdrl_core.look.planning.cluster import default_gpus, engines_of, work_of
from kdrl_core.look.planning.machine import cluster_of, misfits
from kdrl_core.look.planning.placement import host_bytes
from kdrl_core.look.planning.shapes import ModelShape, shape_of
from kdrl_core.look.planning.stage_plan import StagePlan, plan_stage
from kdrl_core.models.devices import Gpu

_CHECKPOINT_BYTES = 12
"""Of a parameter: the float32 weight and AdamW's two moments."""
_EXPORT_BYTES = 4
_CGROUP = Path("/sys/fs/cgroup")


def plan_here(recipe: Recipe, found: Sequence[Gpu]) -> StagePlan:
    """The plan of the stage that is tried, on the GPUs that are here.

    Raises:
        NotApplicable: the recipe runs on a CPU, or the stage cannot be planned.
        RecipeError, ModelError: as `plan_stage`.
    """
    if recipe.runtime.device == "cpu":
        raise NotApplicable("runtime.device=cpu: the plan is for GPUs")
    if not found:
        raise NotApplicable("no GPU to plan for")
    stage = stage_to_try(recipe)
    if recipe.stage(stage).objective == "sft":
        raise NotApplicable(f"{stage}.objective=sft has no loop that is planned")
    used = found[: default_gpus(recipe, gpus_per_node=len(found))]
    return plan_stage(work_of(recipe, stage), engines_of(recipe), cluster_of(used))


def check_plan(recipe: Recipe, found: Sequence[Gpu]) -> Observed:
    """The memory of each phase against the GPUs that are here; if it does not fit, what would make it fit."""
    plan = plan_here(recipe, found)
    chosen = plan.candidates[0]
    phases = {phase.phase: round(phase.total / GIB, 2) for phase in chosen.memory}
    if wrong := misfits(recipe, cluster_of(found)):
        fits = "; ".join(f"{each.stage}: {' or '.join(each.remedies) or 'a smaller model'}" for each in wrong)
        says = "; ".join(f"{each.stage}: {each.reason}" for each in wrong)
        raise CheckFailed(says, f"would fit with {fits}", gib=phases)
    worst = chosen.worst
    limit = plan.cluster.usable_memory / GIB
    says = f"fits: at most {worst.total / GIB:.1f} of {limit:.1f} GiB a GPU, in {worst.phase}"
    return Observed(says=says, figures={"gib": phases})


def planned_update_gib(recipe: Recipe, found: Sequence[Gpu]) -> float | None:
    """GiB of one GPU in an update as planned; None without a plan."""
    with suppress(KdrlError, NotApplicable):
        phases = plan_here(recipe, found).candidates[0].memory
        return max(phase.total for phase in phases if phase.phase in ("update", "optimizer step")) / GIB
    return None


def check_host_memory(recipe: Recipe, found: Sequence[Gpu]) -> Observed:
    """Free memory of the host: for models that sleep there, or on a CPU for everything."""
    if recipe.runtime.device == "cpu":
        needed, what = _cpu_bytes(recipe), "for weights, optimiser and the longest update"
    else:
        plan = plan_here(recipe, found)
        placement = plan.candidates[0].placement
        needed = host_bytes(plan.work, plan.engines, plan.cluster, placement)
        what = "for models that sleep there"
    free = available_memory()
    says = f"{size_words(free)} free, about {size_words(needed)} needed {what}"
    figures = {"free": free, "needed": needed}
    if free < needed:
        raise CheckFailed(says, "give the job more memory, or take smaller models or fewer ranks", **figures)
    return Observed(says=says, figures=figures)


def check_space(recipe: Recipe, folder: Path) -> Observed:
    """Free space for the run's checkpoints and exports, and for the doctor's own files."""
    student = _shapes(recipe)["student"]
    saved = student.trained_parameters(recipe.student.lora) * _CHECKPOINT_BYTES
    run = saved * sum(_num_kept(recipe.stage(name)) for name in recipe.stages)
    if recipe.student.lora is not None:  # the last checkpoint of a stage has the merged model as well
        run += len(recipe.stages) * student.parameters * _EXPORT_BYTES
    run += student.parameters * _EXPORT_BYTES * 2  # the policy that engines load, and the finished student
    own = doctor_bytes(recipe)
    free = shutil.disk_usage(folder).free
    kept = sum(_num_kept(recipe.stage(name)) for name in recipe.stages)
    says = f"{size_words(free)} free, {size_words(run)} needed for {kept} checkpoints and two exports of a run"
    figures = {"free": free, "run": run, "doctor": own}
    if free < run:
        raise CheckFailed(says, "lower checkpoint.keep_last, raise keep_every, or give another disk", **figures)
    return Observed(says=says, figures=figures)


def check_room(recipe: Recipe, folder: Path) -> None:
    """Raise CheckFailed if the doctor's own files do not fit on the disk."""
    own, free = doctor_bytes(recipe), shutil.disk_usage(folder).free
    if free < own:
        raise CheckFailed(
            f"{size_words(free)} are free, the doctor's models and checkpoint take {size_words(own)}",
            "free some space, or give another disk: --folder DIR",
        )


def doctor_bytes(recipe: Recipe) -> float:
    """Bytes that the doctor itself writes at most: random models, one checkpoint, two exports."""
    shapes, width = _shapes(recipe), engines_of(recipe).width
    own = (_CHECKPOINT_BYTES + 2 * _EXPORT_BYTES) * shapes["student"].parameters
    return own + sum(width * shape.parameters for shape in shapes.values())


def available_memory() -> int:
    """Bytes that a process can still take: of the machine, or of its control group if that has less. The kernel gives
    the memory of cached files back when it is needed."""
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # no limit, or cgroups of another version
        limit = int((_CGROUP / "memory.max").read_text())
        taken = int((_CGROUP / "memory.current").read_text())
        counts = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        cached = int(counts["active_file"]) + int(counts["inactive_file"])
        free = min(free, limit - taken + cached)
    return free


def _shapes(recipe: Recipe) -> dict[str, ModelShape]:
    return {role: shape_of(model, role=role) for role, model in models_to_try(recipe).items()}


def _num_kept(config: StageConfig) -> int:
    """Most checkpoints of a stage that are on the disk at a time: the last ones, every Nth, and the newest."""
    checkpoint = config.checkpoint
    made = max(1, config.steps // checkpoint.every)
    for_good = config.steps // checkpoint.keep_every if checkpoint.keep_every else 0
    return min(made, checkpoint.keep_last + for_good) + 1


def _cpu_bytes(recipe: Recipe) -> float:
    """All models in one memory: each rank's trainer, the engines' copies, the activations of the longest sequence."""
    stage = stage_to_try(recipe)
    shapes, config, engines = _shapes(recipe), recipe.stage(stage), engines_of(recipe)
    student, ranks = shapes["student"], recipe.trainer.ranks
    settings = replace(engines.training(ranks), precision="float32", is_masked=True)
    longest = config.max_prompt_tokens + config.max_response_tokens
    one = memory.update_components(
        student, settings, micro_batch_tokens=max(config.micro_batch_tokens, longest), longest=longest
    )
    copies = [shape for role, shape in shapes.items() if role not in engines.of_trainer]
    copies += [student] if config.ref_beta > 0 and "reference" not in engines.of_trainer else []
    cache = (engines.kv_cache_bytes or 0.0) * (engines.rollout == "vllm")
    return ranks * sum(one.values()) + sum(engines.width * shape.parameters for shape in copies) + cache
