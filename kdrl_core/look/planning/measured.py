"""Rates measured in a run's own steps, in place of data sheets. They hold for the same kind of GPU and engines.

FLOPs per second of scorer and trainer, per GPU of the run's recipe, hold roughly for other models too. The FLOPs of an
update include recomputed activations. Of a decoding step, arithmetic and memory are computed, with the scorer's FLOPs
per second; what is left of the measured time is its overhead, which grows with the layers. So a rollout with more, or
longer, responses can be predicted from one that has other numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean, median
from typing import Any

from kdrl_core.config import Recipe
from kdrl_core.errors import RunError
from kdrl_core.ledger import open_run
from kdrl_core.look.planning.cluster import CPU_BANDWIDTH, Cluster, Engines, Role, Work, engines_of, gpus_of, work_of
from kdrl_core.look.planning.cost import Rates, busiest, busiest_generation
from kdrl_core.look.planning.decode import decoding_cost
from kdrl_core.look.planning.lengths import cut
from kdrl_core.tables.files import LOOKED_AT, load_metrics, read_table


def rates_of_run(run_name: str, *, gpus: int | None = None, cluster: Cluster | None = None) -> tuple[Rates, Work]:
    """Median rates over the steps of the last trained stage, without the first step (a warm-up); and the work of a mean
    step, with the measured prompt and response lengths.

    `gpus`: GPUs that each phase of the run used; None: the recipe's numbers for each engine and the trainer. `cluster`:
    the memory bandwidth of what it ran on; None: the default for GPUs or a CPU. Raises RunError if there is no such
    run, or it has trained no step; ModelError if the shape of a model is not known.
    """
    run = open_run(run_name)
    loops = [name for name in run.recipe.stages if run.recipe.stage(name).objective != "sft"]
    trained = [name for name in loops if load_metrics(run, name)]
    if not trained:
        raise RunError(
            f"run {run_name} has no trained steps with rollouts, so nothing is measured in it; "
            "give --rollout-tokens-per-s and --mfu, or another run"
        )
    stage = trained[-1]
    rows = load_metrics(run, stage)
    rows = rows[1:] or rows
    path = run.paths.rollouts(stage, rows[-1]["step"])
    prompts = read_table(path, ["prompt_token_ids"], most_bytes=LOOKED_AT)["prompt_token_ids"]
    work = work_of(
        run.recipe,
        stage,
        mean_response=mean(row["response/length_mean"] for row in rows),
        mean_prompt=mean(map(len, prompts.to_pylist())),
        longest_response=mean(row["response/length_max"] for row in rows),
    )
    return rates_of(run.recipe, work, rows, gpus=gpus, cluster=cluster), work


def rates_of(
    recipe: Recipe,
    work: Work,
    rows: Sequence[Mapping[str, Any]],
    *,
    gpus: int | None = None,
    cluster: Cluster | None = None,
) -> Rates:
    """Rates per GPU, from the timings `rows` of steps with the mean work `work`. `gpus`, `cluster` as in
    `rates_of_run`."""
    used = gpus_of(recipe) if gpus is None else dict.fromkeys(gpus_of(recipe), gpus)
    engines = engines_of(recipe)

    def seconds(phase: str, hidden: str | None = None) -> float:
        return median(row.get(phase, 0.0) - (row.get(hidden, 0.0) if hidden else 0.0) for row in rows)

    def rate(phase: str, flops: float) -> float | None:
        return flops / seconds(phase) if seconds(phase) > 0.0 else None

    role: Role = "teacher" if work.teacher is not None else "reference"
    scored = work.teacher or (work.student if work.has_reference else None)
    scoring = scored.forward_flops(work.tokens, context=work.attended) / used[role] if scored else 0.0
    update = work.update_flops(busiest(work, used["update"]), is_checkpointed=engines.is_checkpointed)
    sync_s = seconds("sync/seconds")
    found = Rates(
        rollout_tokens_per_s=median(row["throughput/rollout_tokens_per_s"] for row in rows) / used["rollout"],
        score_flops=rate(f"time/{role}_score_s", scoring) if scored else None,
        update_flops=rate("time/update_s", update),
        has_collectives=used["update"] > 1,
        sync_s_per_parameter=sync_s / work.student.parameters if sync_s else None,
        verify_s_per_response=seconds("time/verify_s") / work.responses,
        reserved_bytes=max((row.get("memory/reserved_gib") or 0.0 for row in rows), default=0.0) * 2**30 or None,
    )
    if cluster is None:
        cluster = Cluster(gpus=1, gpus_per_node=1, gpu_memory=80e9)
        if recipe.runtime.device == "cpu":
            cluster = replace(cluster, memory_bandwidth=CPU_BANDWIDTH)
    return _with_decoding(found, seconds("time/rollout_s", "sync/seconds"), work, engines, cluster, used["rollout"])


def _with_decoding(rates: Rates, measured_s: float, work: Work, engines: Engines, cluster: Cluster, gpus: int) -> Rates:
    """`rates` with the overhead of a decoding step, so that the rollout of `work` takes `measured_s`."""
    cost = decoding_cost(
        work.student,
        engines,
        cluster,
        overhead_s=0.0,
        flops=rates.score_flops or rates.update_flops,
    )
    bare = busiest_generation(work, engines, cost, gpus, responses=work.responses)
    if measured_s <= bare.seconds:
        return replace(rates, decoding_overhead_s=0.0, decoding_factor=measured_s / bare.seconds)
    return replace(rates, decoding_overhead_s=(measured_s - bare.seconds) / bare.steps)


def scaled(rates: Rates, measured: Work, planned: Work) -> Rates:
    """Rates for another student: the overhead of a decoding step grows with the layers; tokens per second, if they are
    all that is known, fall as parameters grow; FLOPs per second stay."""
    factor = measured.student.matmul_parameters / planned.student.matmul_parameters
    tokens, overhead = rates.rollout_tokens_per_s, rates.decoding_overhead_s
    return replace(
        rates,
        rollout_tokens_per_s=None if tokens is None else tokens * factor,
        decoding_overhead_s=None if overhead is None else overhead * planned.student.layers / measured.student.layers,
        reserved_bytes=rates.reserved_bytes if _updates_alike(measured, planned) else None,
    )


def _updates_alike(measured: Work, planned: Work) -> bool:
    """Whether micro-batches and weights are as large."""
    return (measured.student.parameters, measured.micro_batch_tokens, measured.context) == (
        planned.student.parameters,
        planned.micro_batch_tokens,
        planned.context,
    )


def lengths_for(measured: Work, *, limit: int) -> tuple[float, float]:
    """Mean and longest response under another limit than the run's. If its responses reached its limit, so they will
    reach a higher one: both grow with it. A lower one cuts them."""
    mean_response, longest = measured.mean_response, measured.longest_response
    if limit > measured.max_response and longest >= measured.max_response:
        growth = limit / measured.max_response
        return mean_response * growth, longest * growth
    return cut(mean_response, longest, limit)
