"""Computes the tables of docs/scaling.md; `python -m kdrl_core.look.planning.scaling` prints them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from kdrl_core.config import load_recipe
from kdrl_core.look.planning.candidates import Candidate
from kdrl_core.look.planning.cluster import Cluster, Engines, Work, engines_of, work_of
from kdrl_core.look.planning.cost import StepTime, gradient_traffic, sync_traffic
from kdrl_core.look.planning.stage_plan import StagePlan, plan_stage, time_alone

NODES = (1, 2, 4, 8, 16, 32, 64)
RECIPE, STAGE = "paper-1.5b", "stage2"
_GPUS_PER_NODE = 8
_GPU_MEMORY = 80e9
_COLUMNS = {
    "rollout": "rollout",
    "score": "teacher_score",
    "update": "update",
    "comm.": "communication",
    "sync": "weight_sync",
    "sleep": "offload",
    "host": "host",
}
"""Columns and their fields of StepTime; verification and checkpoints are hidden."""


def tables() -> dict[str, str]:
    recipe = load_recipe(RECIPE)
    work, engines = work_of(recipe, STAGE), engines_of(recipe)
    plans = [plan_stage(work, engines, _cluster(nodes)) for nodes in NODES]
    return {
        "models": _table(("model", "parameters", "KV cache per token", "forward, FLOPs per token"), _models(work)),
        "time": _table(
            ("nodes", "GPUs", "placement", *_COLUMNS, "step", "hours", "GPU-hours"),
            _times(plans),
        ),
        "engines": _table(
            ("8 GPUs, stage 2", "placement", "rollout", "score", "update", "rest", "step"), _engines(work, engines)
        ),
        "traffic": _table(
            ("nodes", "ZeRO-0", "ZeRO-2", "ZeRO-3", "weight sync, all nodes", "sync at 5 GB/s"),
            [_traffic(work, engines, nodes) for nodes in NODES],
        ),
        "memory": _table(
            ("nodes", "weights", "optimizer", "gradients", "update in all", "update in all, ZeRO-3"),
            [_memory(work, engines, nodes) for nodes in NODES],
        ),
    }


def _cluster(nodes: int) -> Cluster:
    return Cluster(gpus=nodes * _GPUS_PER_NODE, gpus_per_node=_GPUS_PER_NODE, gpu_memory=_GPU_MEMORY)


def _models(work: Work) -> Iterator[tuple[str, ...]]:
    for shape in (work.student, work.teacher):
        assert shape is not None  # KDRL has a teacher
        yield (
            shape.name,
            f"{shape.parameters:,}",
            f"{shape.kv_bytes_per_token(2):,} bytes",
            f"{shape.forward_flops(1, context=work.mean_sequence) / 1e9:.2f} G",
        )


def _times(plans: Sequence[StagePlan]) -> Iterator[tuple[str, ...]]:
    for plan in plans:
        best = plan.best
        assert best is not None  # and plan.hours with it
        assert plan.hours is not None
        seconds = (*(getattr(best.time, field) for field in _COLUMNS.values()), best.time.total)
        yield (
            str(plan.cluster.nodes),
            str(plan.cluster.gpus),
            best.placement.name,
            *(f"{value:,.1f}" for value in seconds),
            f"{plan.hours:,.1f}",
            f"{plan.hours * plan.cluster.gpus:,.0f}",
        )


def _engines(work: Work, engines: Engines) -> Iterator[tuple[str, ...]]:
    """An engine of each role on every GPU, one engine of each role, and servers that stay awake."""
    cluster = _cluster(1)

    def row(name: str, chosen: Candidate, time: StepTime) -> tuple[str, ...]:
        shown = (time.rollout, time.teacher_score, time.update)
        return (
            name,
            chosen.placement.name,
            *(f"{value:,.1f}" for value in (*shown, time.total - sum(shown), time.total)),
        )

    for count in (8, 1):
        plan = plan_stage(work, replace(engines, replicas=count), cluster)
        chosen = plan.candidates[0]
        yield row(f"`vllm.replicas={count}`", chosen, time_alone(plan, chosen))
    for concurrency in (32, 1024):
        served = plan_stage(work, replace(engines, rollout="server", concurrency=concurrency), cluster)
        best = next(one for one in served.candidates if one.placement.is_split)
        yield row(f"servers of both models, awake, {concurrency:,} rollouts in flight", best, best.time)


def _traffic(work: Work, engines: Engines, nodes: int) -> tuple[str, ...]:
    cluster = _cluster(nodes)
    zero = [gradient_traffic(work, replace(engines, zero_stage=stage), cluster.gpus) for stage in (0, 2, 3)]
    sync = sync_traffic(work, engines, cluster)
    return (
        str(nodes),
        *(f"{value / 1e9:,.1f} GB" for value in zero),
        f"{sync / 1e9:,.1f} GB",
        f"{sync / cluster.storage_bandwidth:,.1f} s",
    )


def _memory(work: Work, engines: Engines, nodes: int) -> tuple[str, ...]:
    found = []
    for stage in (2, 3):
        plan = plan_stage(work, replace(engines, zero_stage=stage), _cluster(nodes))
        colocated = next(one for one in plan.candidates if not one.placement.is_split)
        found.append(next(phase for phase in colocated.memory if phase.phase == "update"))
    parts = [found[0].components[name] for name in ("trainer weights", "optimizer", "gradients")]
    return (str(nodes), *(f"{value / 1e9:.2f} GB" for value in [*parts, *(phase.total for phase in found)]))


def _table(header: Sequence[str], rows: Iterator[tuple[str, ...]] | Sequence[tuple[str, ...]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    for name, text in tables().items():
        print(f"## {name}\n\n{text}\n")
