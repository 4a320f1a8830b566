"""What to change where no placement of a stage fits its GPUs."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from kdrl_core.look.planning.candidates import GB, candidates_of
from kdrl_core.look.planning.cluster import Cluster, Engines, Work
from kdrl_core.look.planning.cost import Rates

_LARGER_GPUS = (24 * GB, 40 * GB, 48 * GB, 80 * GB, 96 * GB, 141 * GB, 192 * GB, 288 * GB)


def remedies_of(work: Work, engines: Engines, cluster: Cluster, rates: Rates) -> Iterator[str]:
    """Single changes that make the stage fit. If no change does, the first few of them that do so together."""

    def fits(work: Work, engines: Engines, cluster: Cluster = cluster) -> bool:
        return candidates_of(work, engines, cluster, rates)[0].fits

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
    """Changes of settings, from the cheapest to those that change the method."""
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
