"""A plan for the GPUs of this machine, and whether a recipe's run fits them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kdrl_core.config import Recipe
from kdrl_core.errors import ModelError, RecipeError
from kdrl_core.look.planning.candidates import Candidate, remedies_of
from kdrl_core.look.planning.cluster import Cluster, Engines, Work, engines_of, work_of
from kdrl_core.look.planning.cost import Rates, step_time
from kdrl_core.look.planning.placement import Placement, phase_memories
from kdrl_core.models.devices import Gpu, gpus

_DATA_SHEETS = {
    "B200": (2250e12, 8.0e12),
    "H200": (989e12, 4.8e12),
    "H100": (989e12, 3.35e12),
    "L40S": (362e12, 0.864e12),
    "A100": (312e12, 2.0e12),
}
"""Part of a GPU's name → its peak in bfloat16 (dense), and its memory bandwidth. Others are taken for an A100."""
_CERTAIN = 1.0
"""Only what needs more than the whole memory is refused: a plan is cautious."""

_logger = logging.getLogger("kdrl")


def cluster_of(found: Sequence[Gpu]) -> Cluster:
    """One node of these GPUs, each as large as the smallest. At least one is needed."""
    peak, bandwidth = next(
        (rates for part, rates in _DATA_SHEETS.items() if part in found[0].name), _DATA_SHEETS["A100"]
    )
    return Cluster(
        gpus=len(found),
        gpus_per_node=len(found),
        gpu_memory=float(min(gpu.memory for gpu in found)),
        peak_flops=peak,
        memory_bandwidth=bandwidth,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    """A stage whose run does not fit the GPUs."""

    stage: str
    reason: str
    remedies: tuple[str, ...]
    """Changes that make it fit."""

    def __str__(self) -> str:
        helps = "; or ".join(self.remedies) or "no change that was tried makes it fit; take a smaller model"
        return f"{self.stage}: {self.reason}. It would fit with {helps}"


def misfits(recipe: Recipe, cluster: Cluster) -> list[Misfit]:
    """The stages of a run that do not fit the memory of the cluster's GPUs, with the ranks and engines of the recipe.
    Of servers elsewhere nothing is known. Raises RecipeError, ModelError as `work_of` does."""
    found = []
    for stage in recipe.stages:
        work, engines = work_of(recipe, stage), engines_of(recipe)
        used = replace(cluster, gpus=recipe.trainer.ranks, gpus_per_node=min(recipe.trainer.ranks, cluster.gpus))
        if (reason := _reason(work, engines, used)) is not None:
            remedies = remedies_of(work, engines, used, Rates(), fits=_fits)
            found.append(Misfit(stage=stage, reason=reason, remedies=tuple(remedies)))
    return found


def require_runnable(recipe: Recipe) -> None:
    """All that is known of a run before anything is loaded: `check_inputs`, then `require_fit`. Raises as they do."""
    from kdrl_core.boxes.preflight import check_inputs

    check_inputs(recipe)
    require_fit(recipe)


def require_fit(recipe: Recipe) -> None:
    """Raise RecipeError if the recipe's run cannot fit the GPUs that this process may use, with what would. Warn in the
    log if it needs more than a plan may use. Nothing is checked on a CPU, or if the GPUs are not known."""
    if recipe.runtime.device == "cpu" or not (found := gpus()) or not all(gpu.memory for gpu in found):
        return
    cluster = cluster_of(found)
    try:
        wrong = misfits(recipe, replace(cluster, utilization=_CERTAIN))
        tight = [] if wrong else misfits(recipe, cluster)
    except ModelError as error:  # of a kind whose memory is not known
        _logger.warning("whether the recipe fits the GPUs is not known: %s", error)
        return
    if wrong:
        name, size, told = found[0].name, cluster.gpu_memory / 1e9, "\n".join(map(str, wrong))
        raise RecipeError(f"recipe {recipe.name} does not fit {len(found)} × {name} with {size:.0f} GB.\n{told}")
    for each in tight:
        _logger.warning("memory will be tight: %s", each)


def _fits(work: Work, engines: Engines, cluster: Cluster) -> bool:
    return _reason(work, engines, cluster) is None


def _reason(work: Work, engines: Engines, cluster: Cluster) -> str | None:
    """Why a run does not fit, if its ranks and engines share the GPUs; None if it does."""
    is_apart = engines.rollout == "server" and not work.sampled
    placement = Placement(student_gpus=cluster.gpus, rollout_gpus=engines.tensor_parallel if is_apart else 0)
    memory = [phase for phase in phase_memories(work, engines, cluster, placement) if phase.gpus != "rollout GPUs"]
    candidate = Candidate(
        placement=placement,
        memory=tuple(memory),
        time=step_time(work, engines, cluster, placement, Rates()),
        usable=cluster.usable_memory,
        share=(engines.memory_share or cluster.utilization) * cluster.gpu_memory,
    )
    if not candidate.fits:
        return candidate.reason
    for phase in memory:
        if phase.beside is not None and engines.memory_share is not None:
            taken = engines.memory_share * cluster.gpu_memory
            if taken + phase.beside > cluster.gpu_memory:
                return (
                    f"an engine of {phase.phase} takes {taken / 1e9:.1f} GB (vllm.gpu_memory_utilization="
                    f"{engines.memory_share:g}) beside {phase.beside / 1e9:.1f} GB of others"
                )
    return None
