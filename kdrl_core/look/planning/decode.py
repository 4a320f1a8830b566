"""Seconds to generate responses, decoding step by decoding step.

    decoding step of n sequences with c cached tokens =
        overhead + max(weights / bandwidth, n · FLOPs / (peak · MFU)) + c · KV bytes / bandwidth

An engine has at most so many sequences in flight. vLLM starts the next when one ends;
`transformers` starts the next batch when all have ended. So the batch shrinks at the end, and the cache grows with the
responses' age. Prefills are not counted: a prompt is prefilled once for its samples, or costs little beside them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from kdrl_core.look.planning.cluster import Cluster, Engines, Role
from kdrl_core.look.planning.lengths import response_lengths
from kdrl_core.look.planning.memory import engine_weights, kv_bytes
from kdrl_core.look.planning.shapes import ModelShape

_COPYING = 3
"""How often `transformers` touches its cache in a step: it copies it, to add a token, and reads it."""
_MOST = 2_048
"""Responses of an engine that are simulated one by one. Of more, these stand for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodingCost:
    """Parts of a decoding step, in seconds."""

    overhead: float
    weights: float
    """To read the weights."""
    cached: float
    """To read one cached token's keys and values."""
    arithmetic: float
    """Of one sequence."""

    def steps(self, count: float, *, sequences: int, cached: float) -> float:
        """Seconds of `count` steps of `sequences` that have `cached` tokens in all before the first of them."""
        between = cached + sequences * (count - 1) / 2  # the cache grows by one token of each
        return count * (self.overhead + max(self.weights, self.arithmetic * sequences) + self.cached * between)


def decoding_cost(
    shape: ModelShape,
    engines: Engines,
    cluster: Cluster,
    *,
    role: Role = "rollout",
    overhead_s: float | None = None,
    flops: float | None = None,
) -> DecodingCost:
    """The cost on one engine of a role.

    Args:
        overhead_s: of a step; None: the cluster's.
        flops: FLOPs per second and GPU; None: the cluster's.
    """
    tensor_parallel = engines.split(role)
    bandwidth = cluster.memory_bandwidth * cluster.bandwidth_share
    passes = _COPYING if engines.engine(role) == "transformers" else 1
    rate = (flops or cluster.peak_flops * cluster.mfu) * tensor_parallel
    return DecodingCost(
        overhead=cluster.step_overhead_s if overhead_s is None else overhead_s,
        weights=engine_weights(shape, width=engines.width, tensor_parallel=tensor_parallel) / bandwidth,
        cached=passes * kv_bytes(shape, width=engines.width, tensor_parallel=tensor_parallel) / bandwidth,
        arithmetic=2 * shape.matmul_parameters / rate,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Decoding steps of one engine, and their seconds."""

    seconds: float
    steps: float


def generation(
    cost: DecodingCost, lengths: Sequence[float], *, prompt: float, slots: int, is_continuous: bool
) -> Generation:
    """Generate responses of `lengths` tokens to prompts of `prompt` tokens, at most `slots` at a time.

    `is_continuous`: the next starts when one ends; else when all that run have ended."""
    seconds = now = cached = 0.0
    waiting = iter(lengths)
    running: list[tuple[float, float]] = []  # step at which one ends, its length
    cached += _start(running, waiting, slots, now, prompt)
    while running:
        ends, length = running[0]
        if ends > now:
            seconds += cost.steps(ends - now, sequences=len(running), cached=cached)
            cached += len(running) * (ends - now)
            now = ends
        heappop(running)
        cached -= prompt + length
        if is_continuous or not running:
            cached += _start(running, waiting, slots, now, prompt)
    return Generation(seconds=seconds, steps=now)


def generation_of(
    cost: DecodingCost,
    count: int,
    *,
    engines: int,
    mean: float,
    longest: float,
    prompt: float,
    slots: int,
    is_continuous: bool,
) -> Generation:
    """`generation` by the slowest of `engines` that share `count` responses with the distribution's lengths."""
    parts = max(1, count // engines // max(_MOST, 4 * slots))  # each as long as the first
    lengths = response_lengths(-(-count // parts), mean=mean, longest=longest, engines=engines)
    found = generation(cost, lengths, prompt=prompt, slots=slots, is_continuous=is_continuous)
    return Generation(seconds=found.seconds * parts, steps=found.steps * parts)


def _start(
    running: list[tuple[float, float]], waiting: Iterator[float], slots: int, now: float, prompt: float
) -> float:
    """Start responses while there is room. Returns the tokens of their prompts."""
    started = 0
    while len(running) < slots and (length := next(waiting, None)) is not None:
        heappush(running, (now + length, length))
        started += 1
    return started * prompt
