"""Seconds of a step by phase, and bytes that it moves.

    rollout = the decoding steps of the busiest engine (kdrl_core.look.planning.decode)
    scoring = forward FLOPs / (peak · MFU · GPUs),  update = update FLOPs / (peak · MFU · GPUs)
    weight sync = write once; read on every node and load onto each GPU, while the files' digest is made
    offload = weights of engines that sleep go to the host and come back
    checkpoint = 12 bytes a parameter, written and hashed once; only what the next rollout does not hide counts, but all
                 of it for the trainer `torch`, which saves at once
    host = tables of Arrow and Parquet, and answers of servers, per token

A GPU with any work trains or scores at least one longest sequence, so the slowest of many has more than the mean.
Verification runs while responses are sampled; only the rest counts. A teacher on GPUs of its own scores while others
generate. `transformers` always generates and scores on one GPU.

Bytes that a GPU sends or receives (N parameters, b bytes, R ranks, m micro-batches of a rank):
ZeRO-0: 2·4·N·(R−1)/R once; ZeRO-2: m·b·N·(R−1)/R and b·N·(R−1)/R; ZeRO-3: 3·m·b·N·(R−1)/R.
The new policy has the engine's dtype (float32 for `transformers`). It is written once, and every node reads it once.
"""

from dataclasses import asdict, dataclass
from math import ceil

from kdrl_core.look.planning.cluster import Cluster, Engines, Role, Work
from kdrl_core.look.planning.decode import DecodingCost, Generation, decoding_cost, generation_of
from kdrl_core.look.planning.placement import Placement, in_flight, replicas, shape_for, sleeping_models
from kdrl_core.look.planning.shapes import ModelShape

_CHECKPOINT_BYTES = 12
"""Of a parameter: float32 weight and two moments."""
HOST_S_PER_TOKEN = 0.6e-6
"""Assumed seconds of one core to make a step's tables, per response token."""
ANSWER_S_PER_TOKEN = 0.1e-6
"""Assumed seconds of one core to read a server's answer, per scored token."""
VERIFY_S = 0.01
"""Assumed seconds of one core to verify a response."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Rates that are given or measured; None: computed."""

    rollout_tokens_per_s: float | None = None
    """Response tokens, per GPU. Not used if `decoding_overhead_s` is given, which holds for other lengths too."""
    decoding_overhead_s: float | None = None
    """Of a decoding step, beyond arithmetic and memory."""
    decoding_factor: float = 1.0
    """By which arithmetic and memory of a decoding step take less than computed."""
    score_flops: float | None = None
    """FLOPs per second and GPU."""
    update_flops: float | None = None
    has_collectives: bool = False
    """The update was measured on several ranks, so its rate includes their collectives."""
    sync_s_per_parameter: float | None = None
    verify_s_per_response: float | None = None
    """Without the part that overlaps with generation."""
    reserved_bytes: float | None = None
    """GPU memory that a rank took at most in its updates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of one step. Overlapping phases count once."""

    rollout: float
    teacher_score: float
    """Without the part that overlaps with generation."""
    reference_score: float
    verify: float
    """The part that does not overlap with generation."""
    update: float
    communication: float
    """Collectives of the update."""
    weight_sync: float
    offload: float
    """Engines that go to sleep and wake up."""
    host: float
    """Tables and answers of servers."""
    checkpoint: float
    """A step's share of a checkpoint, without the part that overlaps with generation."""

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
    rollout = teacher = reference = verify = synced = moved = host = 0.0
    if not work.sampled:  # an update of sft has no rollout
        rollout = rollout_s(work, engines, cluster, placement.generating_gpus, rates, kv_sequences=kv_sequences)
        verify = _verify_s(work, rates, rollout)
        synced = weight_sync_s(work, engines, cluster, rates)
        moved = 2 * sum(sleeping_models(work, engines, placement).values()) / cluster.host_bandwidth
        host = work.responses * work.mean_response * HOST_S_PER_TOKEN
        if work.teacher is not None:
            teacher = score_s("teacher", work.teacher, work, engines, cluster, placement.teacher_gpus or gpus, rates)
            is_served = placement.is_split or "teacher" in engines.served or engines.replicas > 1
            host += work.tokens * ANSWER_S_PER_TOKEN * is_served
        if placement.is_split:
            teacher = max(0.0, teacher - rollout)
        if work.has_reference:
            reference = score_s("reference", work.student, work, engines, cluster, gpus, rates)
    tokens = busiest(work, 1 if engines.trainer == "torch" else gpus)
    flops = work.update_flops(tokens, is_checkpointed=engines.is_checkpointed)
    hidden = 0.0 if engines.trainer == "torch" else rollout  # torch saves in the process that samples
    bandwidth = cluster.link_bandwidth if gpus <= cluster.gpus_per_node else cluster.network_bandwidth
    return StepTime(
        rollout=rollout,
        teacher_score=teacher,
        reference_score=reference,
        verify=verify,
        update=flops / (rates.update_flops or cluster.peak_flops * cluster.mfu),
        communication=0.0 if rates.has_collectives else gradient_traffic(work, engines, gpus) / bandwidth,
        weight_sync=synced,
        offload=moved,
        host=host,
        checkpoint=max(0.0, checkpoint_s(work, engines, cluster) - hidden) / work.checkpoint_every,
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
    role: Role = "rollout",
) -> float:
    """Seconds to generate `responses` with the model of a role; None: those of a step."""
    count = work.responses if responses is None else responses
    if rates.rollout_tokens_per_s is not None and rates.decoding_overhead_s is None:
        tokens = -(-count // replicas(engines, role, gpus)) * work.mean_response  # of the busiest engine
        return tokens / (rates.rollout_tokens_per_s * engines.split(role))
    cost = decoding_cost(
        shape_for(role, work),
        engines,
        cluster,
        role=role,
        overhead_s=rates.decoding_overhead_s,
        flops=rates.score_flops or rates.update_flops,
    )
    found = busiest_generation(work, engines, cost, gpus, responses=count, kv_sequences=kv_sequences, role=role)
    return found.seconds * rates.decoding_factor


def busiest_generation(
    work: Work,
    engines: Engines,
    cost: DecodingCost,
    gpus: int,
    *,
    responses: int,
    kv_sequences: int | None = None,
    role: Role = "rollout",
) -> Generation:
    """The decoding of the engine with the most of `responses`."""
    sequences = in_flight(work, engines, gpus, responses, role=role)
    if kv_sequences is not None:
        sequences = max(1, min(sequences, int(kv_sequences * work.context / work.mean_sequence)))
    return generation_of(
        cost,
        responses,
        engines=replicas(engines, role, gpus),
        mean=work.mean_response,
        longest=work.longest_response,
        prompt=work.mean_prompt,
        slots=sequences,
        is_continuous=engines.engine(role) != "transformers",
    )


def score_s(
    role: Role, shape: ModelShape, work: Work, engines: Engines, cluster: Cluster, gpus: int, rates: Rates
) -> float:
    """Seconds to score a step's responses with the frozen model of a role."""
    flops = shape.forward_flops(busiest(work, replicas(engines, role, gpus)), context=work.attended)
    return flops / ((rates.score_flops or cluster.peak_flops * cluster.mfu) * engines.split(role))


def _verify_s(work: Work, rates: Rates, rollout: float) -> float:
    if rates.verify_s_per_response is not None:
        return work.responses * rates.verify_s_per_response
    return max(0.0, work.responses * VERIFY_S / work.verifiers - rollout)


def weight_sync_s(work: Work, engines: Engines, cluster: Cluster, rates: Rates) -> float:
    """Seconds from the trainer's weights to those of every engine."""
    if rates.sync_s_per_parameter is not None:
        return rates.sync_s_per_parameter * work.student.parameters
    exported = exported_bytes(work, engines)
    written, read = (
        exported / cluster.storage_bandwidth,
        sync_traffic(work, engines, cluster) / cluster.storage_bandwidth,
    )
    if engines.rollout == "transformers":
        return written + read
    loaded = read + exported / engines.split("rollout") / cluster.host_bandwidth
    return written + max(loaded, exported / cluster.digest_bandwidth)  # the digest is made beside the load


def checkpoint_s(work: Work, engines: Engines, cluster: Cluster) -> float:
    """Seconds to write and hash a checkpoint."""
    size = _CHECKPOINT_BYTES * work.student.trained_parameters(engines.lora)
    return size / min(cluster.storage_bandwidth, cluster.hash_bandwidth)


def gradient_traffic(work: Work, engines: Engines, gpus: int) -> float:
    """Bytes that the update's collectives move through one GPU in a step."""
    training = engines.training(gpus)
    ranks, stage = training.ranks, training.zero_stage
    share = (ranks - 1) / ranks
    whole = training.weight_bytes * work.student.parameters * share
    trained = work.student.trained_parameters(engines.lora)
    moved = training.weight_bytes * trained * share
    micro_batches = max(1, ceil(busiest(work, ranks) / max(work.micro_batch_tokens, work.context)))
    if stage == 3:
        return micro_batches * (2 * whole + moved)  # weights for both passes, and gradients
    if stage == 2:
        return (micro_batches + 1) * moved
    return 2 * 4 * trained * share


def exported_bytes(work: Work, engines: Engines) -> float:
    """Bytes of the new policy as the engines take it."""
    return float((4 if engines.rollout == "transformers" else engines.width) * work.student.parameters)


def sync_traffic(work: Work, engines: Engines, cluster: Cluster) -> float:
    """Bytes that all nodes read from shared storage to take the new policy."""
    return cluster.nodes * exported_bytes(work, engines)


def busiest(work: Work, gpus: int) -> float:
    """Tokens of the busiest GPU: the mean, or one longest sequence if that is more."""
    return max(work.tokens / gpus, float(min(work.context, work.tokens)))
