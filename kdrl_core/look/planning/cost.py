"""Seconds of a step by phase, and bytes that it moves.

    decoding step of n sequences = overhead + (weights + n · context · KV bytes) / (memory bandwidth · share)
    rollout = max(response tokens / tokens per second of all engines, longest response · decoding step of one sequence)
    scoring = forward FLOPs / (peak · MFU · GPUs),  update = update FLOPs / (peak · MFU · GPUs)

A GPU with any work trains or scores at least one longest sequence, so the slowest of many has more than the mean.
Verification and hidden (overlapped) work count as 0. A teacher on GPUs of its own scores while others generate.
`transformers` always generates and scores on one GPU.

Bytes that a GPU sends or receives (N parameters, b bytes, R ranks, m micro-batches of a rank):
ZeRO-0: 2·4·N·(R−1)/R once; ZeRO-2: m·b·N·(R−1)/R and b·N·(R−1)/R; ZeRO-3: 3·m·b·N·(R−1)/R.
Weight sync writes the new policy once in float32, and every node reads it once.

`rates_of_run` measures rates in a run's own steps, in place of data sheets: tokens per second of its engine, FLOPs per
second of scorer and trainer, each per GPU of the run's recipe. They hold for the same kind of GPU and engines; FLOPs
per second hold roughly for other models too. The FLOPs of an update include recomputed activations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from statistics import median
from typing import Any

from kdrl_core.config import Recipe
from kdrl_core.errors import RunError
from kdrl_core.ledger import open_run
from kdrl_core.look.planning.cluster import Cluster, Engines, Role, Work, engines_of, gpus_of, work_of
from kdrl_core.look.planning.memory import engine_weights, kv_bytes
from kdrl_core.look.planning.placement import Placement, in_flight, replicas, sleeping_models
from kdrl_core.look.planning.shapes import ModelShape
from kdrl_core.tables.files import LOOKED_AT, load_metrics, read_table

_EXPORT_BYTES = 4
"""Bytes of a weight in a checkpoint: float32."""
_MOMENT_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Rates that are given or measured; None: computed."""

    rollout_tokens_per_s: float | None = None
    """Response tokens, per GPU."""
    score_flops: float | None = None
    """FLOPs per second and GPU."""
    update_flops: float | None = None
    has_collectives: bool = False
    """The update was measured on several ranks, so its rate includes their collectives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of one step. Overlapping phases count once."""

    rollout: float
    teacher_score: float
    """Without the part that overlaps with generation."""
    reference_score: float
    update: float
    communication: float
    """Collectives of the update."""
    weight_sync: float
    offload: float
    """Models that go to sleep and wake up."""
    checkpoint: float
    """A step's share of a checkpoint."""

    @property
    def total(self) -> float:
        """Seconds."""
        return float(sum(asdict(self).values()))


def step_time(
    work: Work,
    engines: Engines,
    cluster: Cluster,
    placement: Placement,
    rates: Rates,
    *,
    kv_sequences: int | None = None,
) -> StepTime:
    """Predicted seconds of one step. `kv_sequences`: longest sequences that fit into the rollout engine's KV cache;
    None: no limit."""
    gpus = placement.student_gpus
    rollout = rollout_s(work, engines, cluster, placement.generating_gpus, rates, kv_sequences=kv_sequences)
    teacher = reference = 0.0
    if work.teacher is not None:
        teacher = score_s("teacher", work.teacher, work, engines, cluster, placement.teacher_gpus or gpus, rates)
    if placement.is_split:
        teacher = max(0.0, teacher - rollout)
    if work.has_reference:
        reference = score_s("reference", work.student, work, engines, cluster, gpus, rates)
    trainers = 1 if engines.trainer == "torch" else gpus
    tokens = busiest(work, trainers)
    flops = work.student.update_flops(tokens, context=work.mean_sequence, is_checkpointed=engines.is_checkpointed)
    bandwidth = cluster.link_bandwidth if gpus <= cluster.gpus_per_node else cluster.network_bandwidth
    exported = _EXPORT_BYTES * work.student.parameters
    saved = exported + _MOMENT_BYTES * work.student.parameters
    # `transformers` takes the new policy from memory; others from storage.
    synced = 0.0 if engines.rollout == "transformers" else exported + sync_traffic(work, cluster)
    moved = sum(sleeping_models(work, engines, placement).values())  # each wakes once in a step
    return StepTime(
        rollout=rollout,
        teacher_score=teacher,
        reference_score=reference,
        update=flops / (rates.update_flops or cluster.peak_flops * cluster.mfu),
        communication=0.0 if rates.has_collectives else gradient_traffic(work, engines, gpus) / bandwidth,
        weight_sync=synced / cluster.storage_bandwidth,
        offload=moved / cluster.host_bandwidth,
        checkpoint=saved / cluster.storage_bandwidth / work.checkpoint_every,
    )


def rollout_s(
    work: Work,
    engines: Engines,
    cluster: Cluster,
    gpus: int,
    rates: Rates,
    *,
    responses: int | None = None,
    kv_sequences: int | None = None,
) -> float:
    """Seconds to generate `responses`; None: those of a step."""
    count = work.responses if responses is None else responses
    tokens = -(-count // replicas(engines, "rollout", gpus)) * work.mean_response  # of the busiest engine
    if rates.rollout_tokens_per_s is not None:
        return tokens / (rates.rollout_tokens_per_s * engines.split("rollout"))
    context = work.mean_prompt + work.mean_response / 2  # on average, a response is half done
    sequences = in_flight(work, engines, gpus, count)
    if kv_sequences is not None:
        sequences = max(1, min(sequences, int(kv_sequences * work.context / work.mean_sequence)))
    bulk = tokens / sequences * decode_step_s(work.student, engines, cluster, sequences=sequences, context=context)
    alone = decode_step_s(work.student, engines, cluster, sequences=1, context=work.context / 2)
    return max(bulk, work.max_response * alone)


def decode_step_s(shape: ModelShape, engines: Engines, cluster: Cluster, *, sequences: int, context: float) -> float:
    """Seconds for one token of each sequence. It reads every weight, and every cached key and value."""
    split = engines.split("rollout")
    read = engine_weights(shape, width=engines.width, tensor_parallel=split)
    read += sequences * context * kv_bytes(shape, width=engines.width, tensor_parallel=split)
    return cluster.step_overhead_s + read / (cluster.memory_bandwidth * cluster.bandwidth_share)


def score_s(
    role: Role, shape: ModelShape, work: Work, engines: Engines, cluster: Cluster, gpus: int, rates: Rates
) -> float:
    """Seconds to score a step's responses with the frozen model of a role."""
    flops = shape.forward_flops(busiest(work, replicas(engines, role, gpus)), context=work.mean_sequence)
    return flops / ((rates.score_flops or cluster.peak_flops * cluster.mfu) * engines.split(role))


def gradient_traffic(work: Work, engines: Engines, gpus: int) -> float:
    """Bytes that the update's collectives move through one GPU in a step."""
    training = engines.training(gpus)
    ranks, stage = training.ranks, training.zero_stage
    share = (ranks - 1) / ranks
    whole = training.weight_bytes * work.student.parameters * share
    micro_batches = max(1, ceil(busiest(work, ranks) / max(work.micro_batch_tokens, work.context)))
    if stage == 3:
        return 3 * micro_batches * whole
    if stage == 2:
        return (micro_batches + 1) * whole
    return 2 * 4 * work.student.parameters * share


def sync_traffic(work: Work, cluster: Cluster) -> float:
    """Bytes that all nodes read from shared storage to take the new policy."""
    return float(cluster.nodes * _EXPORT_BYTES * work.student.parameters)


def busiest(work: Work, gpus: int) -> float:
    """Tokens of the busiest GPU: the mean, or one longest sequence if that is more."""
    return max(work.tokens / gpus, float(min(work.context, work.tokens)))


def rates_of_run(run_name: str, *, gpus: int | None = None) -> tuple[Rates, Work]:
    """Median rates over the steps of the last trained stage, without the first step (a warm-up); and the work of a mean
    step, with the measured prompt and response lengths.

    `gpus`: GPUs that each phase of the run used; None: the recipe's numbers for each engine and the trainer. Raises
    RunError if there is no such run, or it has trained no step; ModelError if the shape of a model is not known.
    """
    run = open_run(run_name)
    trained = [name for name in run.recipe.stages if load_metrics(run, name)]
    if not trained:
        raise RunError(
            f"run {run_name} has no trained steps, so nothing is measured in it; "
            "give --rollout-tokens-per-s and --mfu, or another run"
        )
    stage = trained[-1]
    rows = load_metrics(run, stage)
    rows = rows[1:] or rows
    path = run.paths.rollouts(stage, rows[-1]["step"])
    prompts = read_table(path, ["prompt_token_ids"], most_bytes=LOOKED_AT)["prompt_token_ids"]
    mean_prompt = sum(len(ids) for ids in prompts.to_pylist()) / len(prompts)
    response = sum(row["response/length_mean"] for row in rows) / len(rows)
    work = work_of(run.recipe, stage, mean_response=response, mean_prompt=mean_prompt)
    return rates_of(run.recipe, work, rows, gpus=gpus), work


def rates_of(recipe: Recipe, work: Work, rows: Sequence[Mapping[str, Any]], *, gpus: int | None = None) -> Rates:
    """Rates per GPU, from the timings `rows` of steps with the mean work `work`. `gpus` as in `rates_of_run`."""
    used = gpus_of(recipe) if gpus is None else dict.fromkeys(gpus_of(recipe), gpus)

    def rate(phase: str, flops: float) -> float | None:
        seconds = median(row[phase] for row in rows)
        return flops / seconds if seconds > 0.0 else None

    role: Role = "teacher" if work.teacher is not None else "reference"
    scored = work.teacher or (work.student if work.has_reference else None)
    scoring = scored.forward_flops(work.tokens, context=work.mean_sequence) / used[role] if scored else 0.0
    is_checkpointed = engines_of(recipe).is_checkpointed
    update = work.student.update_flops(
        busiest(work, used["update"]), context=work.mean_sequence, is_checkpointed=is_checkpointed
    )
    return Rates(
        rollout_tokens_per_s=median(row["throughput/rollout_tokens_per_s"] for row in rows) / used["rollout"],
        score_flops=rate(f"time/{role}_score_s", scoring) if scored else None,
        update_flops=rate("time/update_s", update),
        has_collectives=used["update"] > 1,
    )


def scaled(rates: Rates, measured: Work, planned: Work) -> Rates:
    """Rates for another student: tokens per second fall as parameters grow; FLOPs per second stay."""
    if rates.rollout_tokens_per_s is None:
        return rates
    factor = measured.student.matmul_parameters / planned.student.matmul_parameters
    return replace(rates, rollout_tokens_per_s=rates.rollout_tokens_per_s * factor)
