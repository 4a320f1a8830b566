"""The inputs of a plan: the machines, the engines, the work of a stage."""

from dataclasses import dataclass
from typing import Literal

from kdrl_core.config import EngineName, LocalEngine, LoraConfig, Recipe, ServersConfig, StageConfig
from kdrl_core.errors import RecipeError
from kdrl_core.ledger.graph import evaluated_labels
from kdrl_core.look.planning.lengths import mean_square
from kdrl_core.look.planning.memory import Precision, TrainerSettings
from kdrl_core.look.planning.shapes import ModelShape, shape_of
from kdrl_core.models.gpu_share import USABLE

Role = Literal["rollout", "teacher", "reference"]
_SCORERS: tuple[Role, ...] = ("teacher", "reference")

MEAN_RESPONSE_SHARE = 0.4
"""Assumed mean response length, as a share of the longest, if none is given."""
MEAN_PROMPT_TOKENS = 256
"""Assumed mean prompt length, if none is given."""
CPU_BANDWIDTH = 8e9
"""Bytes per second between one core of a server and its memory; for plans from a run on a CPU."""
PROBLEMS = 61_000
"""Problems of a pool, if nothing else is known: what the filter leaves for stage 2 (B.1.1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """GPUs and their connections. Rates are per second. Defaults: the data sheet of an A100 80 GB, cautious shares."""

    gpus: int
    gpus_per_node: int
    gpu_memory: float
    """Bytes."""
    utilization: float = USABLE
    """Share of the memory that a plan may use; the rest is for the runtime, collectives and fragmentation."""
    peak_flops: float = 312e12
    mfu: float = 0.35
    """Share of the peak that training and scoring reach."""
    memory_bandwidth: float = 2.0e12
    bandwidth_share: float = 0.5
    """Share of the memory bandwidth that decoding reaches."""
    step_overhead_s: float = 0.005
    """Overhead of a decoding step, for any batch size: launches, sampling, scheduling."""
    link_bandwidth: float = 2.0e11
    """Between GPUs of a node, per GPU."""
    network_bandwidth: float = 2.5e10
    """Between nodes, per GPU."""
    host_bandwidth: float = 2.0e10
    """Between a GPU and its host's memory."""
    storage_bandwidth: float = 5.0e9
    """Shared storage, for all nodes together."""
    hash_bandwidth: float = 1.5e9
    """Of sha256 on one core of the host."""
    digest_bandwidth: float = 3.2e9
    """Of the exported weights' digest, on eight cores of the host (0.4e9 each, measured)."""

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    @property
    def usable_memory(self) -> float:
        """Bytes per GPU that a plan may use."""
        return self.gpu_memory * self.utilization


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """The engines of a run. `vllm` sleeps while others use its GPU. `transformers` is one process on the first GPU, and
    keeps its models in memory. `server` means replicas that have GPUs of their own and never sleep. Replicas that sleep
    count as `vllm`, and `served` lists their roles."""

    rollout: EngineName = "vllm"
    teacher: LocalEngine = "vllm"
    trainer: Literal["deepspeed", "torch"] = "deepspeed"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    zero_stage: int = 2
    is_checkpointed: bool = True
    offloads_optimizer: bool = False
    lora: LoraConfig | None = None
    """The adapter of the student that alone is trained; None: all weights are."""
    of_trainer: tuple[Role, ...] = ()
    """Roles that the trainer of an adapter fills (kdrl_core.boxes.frozen_policy), without other weights."""
    tensor_parallel: int = 1
    """GPUs of one vLLM engine or replica."""
    replicas: int = 1
    """Engines of each `vllm` role that the run itself starts."""
    max_sequences: int = 256
    """Responses that an engine generates at a time, vLLM's max_num_seqs."""
    concurrency: int | None = None
    """Requests in flight over all replicas of `server`; None: as many as they take."""
    memory_share: float | None = None
    """Share of a GPU that a vLLM engine of the run takes: weights, workspace and cache; None: what others leave."""
    kv_cache_bytes: float | None = None
    """Bytes of KV cache of a vLLM engine in process; if given, `memory_share` does not apply."""
    served: tuple[Role, ...] = ()
    """Roles whose `vllm` engines are servers that the recipe lists. Other `vllm` roles have `replicas` engines."""
    score_tokens: int = 2_048
    """Tokens per forward pass that gives the teacher's logprobs."""

    def engine(self, role: Role) -> EngineName:
        """The engine of a role: it generates, or it scores with the teacher or the stage's initial policy."""
        if role in self.of_trainer:  # ranks share the work, as several vLLM engines do
            return "vllm" if self.trainer == "deepspeed" else "transformers"
        in_process = self.rollout == "vllm" and "rollout" not in self.served
        reference: EngineName = "vllm" if in_process else "transformers"  # as in `StageSession`
        return {"rollout": self.rollout, "teacher": self.teacher, "reference": reference}[role]

    def split(self, role: Role) -> int:
        """GPUs of one engine of the role."""
        return 1 if self.engine(role) == "transformers" else self.tensor_parallel

    @property
    def width(self) -> int:
        """Bytes of a number in engines that generate and score."""
        return 2 if self.dtype == "bfloat16" else 4

    def training(self, ranks: int) -> TrainerSettings:
        """The trainer's settings on `ranks` GPUs."""
        is_torch = self.trainer == "torch"
        stage = 0 if is_torch else self.zero_stage
        precision: Precision = "float32"
        if self.dtype == "bfloat16":
            is_half = stage > 0 or (is_torch and self.lora is not None)  # torch's frozen base has bfloat16 weights
            precision = "bfloat16" if is_half else "autocast"
        return TrainerSettings(
            precision=precision,
            zero_stage=stage,
            ranks=1 if is_torch else ranks,
            is_checkpointed=self.is_checkpointed,
            offloads_optimizer=self.offloads_optimizer,
            lora=self.lora,
        )


def engines_of(recipe: Recipe) -> Engines:
    """The engines that a recipe names. A run has `vllm.replicas` per role; a plan has as many as the GPUs hold."""
    trainer, vllm, server = recipe.trainer, recipe.vllm, recipe.rollout.server
    sleeping = sleeping_servers(recipe)
    return Engines(
        rollout="vllm" if "rollout" in sleeping else recipe.rollout.engine,
        teacher="vllm" if recipe.teacher is None or "teacher" in sleeping else recipe.teacher.engine,
        served=tuple(sleeping),
        trainer=trainer.engine,
        dtype=recipe.runtime.dtype,
        zero_stage=trainer.zero_stage,
        is_checkpointed=trainer.activation_checkpointing,
        offloads_optimizer=trainer.offload_optimizer,
        lora=recipe.student.lora,
        of_trainer=tuple(role for role in _SCORERS if recipe.trainer_scores(role)),
        tensor_parallel=vllm.tensor_parallel,
        replicas=vllm.replicas,
        max_sequences=vllm.max_num_seqs,
        concurrency=server.concurrency if server is not None else None,
        memory_share=vllm.gpu_memory_utilization,
        kv_cache_bytes=None if vllm.kv_cache_gb is None else vllm.kv_cache_gb * 2**30,
    )


def sleeping_servers(recipe: Recipe) -> dict[Role, ServersConfig]:
    """Replicas that share their GPUs with other phases, by role."""
    teacher = recipe.teacher.server if recipe.teacher is not None else None
    servers: dict[Role, ServersConfig | None] = {"rollout": recipe.rollout.server, "teacher": teacher}
    return {role: server for role, server in servers.items() if server is not None and server.sleep}


def gpus_of(recipe: Recipe) -> dict[Role | Literal["update"], int]:
    """GPUs that a run of the recipe uses in each phase; vLLM engines have `vllm.tensor_parallel` each."""
    engines, sleeping = engines_of(recipe), sleeping_servers(recipe)
    servers = recipe.rollout.server

    def own(role: Role) -> int:
        return engines.split(role) * (engines.replicas if engines.engine(role) == "vllm" else 1)

    return {
        "rollout": engines.split("rollout") * len(servers.urls) if servers is not None else own("rollout"),
        "teacher": engines.split("teacher") * len(sleeping["teacher"].urls)
        if "teacher" in sleeping
        else own("teacher"),
        "reference": own("reference"),
        "update": recipe.trainer.ranks,
    }


def default_gpus(recipe: Recipe, *, gpus_per_node: int) -> int:
    """All GPUs that a run of the recipe uses, rounded up to whole nodes if it needs more than one node."""
    used = gpus_of(recipe)
    apart = used.pop("rollout") if engines_of(recipe).rollout == "server" else 0
    total = max(used.values()) + apart
    return total if total <= gpus_per_node else -(-total // gpus_per_node) * gpus_per_node


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The work of one step of a stage, and of an evaluation."""

    stage: str
    objective: str
    steps: int
    student: ModelShape
    teacher: ModelShape | None
    """The teacher that scores, or gives responses, on these GPUs; None without one, or if it is served elsewhere."""
    has_reference: bool
    """The stage's initial policy scores as well (stage 1's penalty)."""
    responses: int
    mean_prompt: float
    mean_response: float
    max_prompt: int
    max_response: int
    micro_batch_tokens: int
    evaluation_context: int
    evaluation_responses: int
    """Of one periodic evaluation."""
    evaluations: int
    """Periodic evaluations in the stage."""
    final_responses: dict[Role, int]
    """Of the final evaluation of the run, by the role whose engine gives them; empty before the last stage."""
    checkpoint_every: int
    longest_response: float
    """Tokens of the longest response that is expected; at most `max_response`."""
    updates: int = 1
    """Optimiser steps on the responses of a step."""
    sampled: int = 0
    """Responses that the teacher gives before the first step (objective sft)."""
    sampled_together: int = 0
    """Of these, so many are published before the next are sampled."""
    verifiers: int = 1
    """Processes that verify."""
    num_in_process: int = 256
    """Responses that the `transformers` engine generates at a time."""
    score_tokens_in_process: int = 65_536

    @property
    def context(self) -> int:
        """Tokens of the longest sequence."""
        return self.max_prompt + self.max_response

    @property
    def mean_sequence(self) -> float:
        """Tokens of a mean sequence."""
        return self.mean_prompt + self.mean_response

    @property
    def tokens(self) -> float:
        """Prompt and response tokens of a step."""
        return self.responses * self.mean_sequence

    @property
    def attended(self) -> float:
        """Context that a mean token stands in: longer sequences have more tokens, so it is more than the mean."""
        prompt, response = self.mean_prompt, self.mean_response
        square = prompt**2 + 2 * prompt * response + mean_square(response, self.longest_response)
        return square / self.mean_sequence

    def update_flops(self, tokens: float, *, is_checkpointed: bool) -> float:
        """FLOPs to train on `tokens` of a step, with the forward pass for old logprobs of all mini-batches but one."""
        trained = self.student.update_flops(tokens, context=self.attended, is_checkpointed=is_checkpointed)
        return trained + self.student.forward_flops(tokens * (1 - 1 / self.updates), context=self.attended)


def work_of(
    recipe: Recipe,
    stage: str,
    *,
    mean_response: float | None = None,
    mean_prompt: float | None = None,
    longest_response: float | None = None,
    problems: int | None = None,
) -> Work:
    """The work of a recipe's stage.

    Args:
        mean_response, mean_prompt: tokens; None: 0.4 of the longest response, and 256 for prompts (or the longest
            prompt, if shorter).
        longest_response: tokens; None: the recipe's limit.
        problems: of the stage's pool, which sft samples; None: `data.max_problems`, or 61,000 as in the paper.

    Raises RecipeError if a mean is above its limit; ModelError if a model's shape is not known."""
    from kdrl_core.data.benchmarks import load_benchmark  # imports pyarrow, so only when planning

    config = recipe.stage(stage)
    most = config.max_response_tokens
    response = _mean(mean_response, MEAN_RESPONSE_SHARE * most, most)
    prompt = _mean(mean_prompt, min(MEAN_PROMPT_TOKENS, config.max_prompt_tokens), config.max_prompt_tokens)
    is_last = stage == recipe.stages[-1]
    answered = {
        benchmark.name: len(load_benchmark(benchmark)) * benchmark.samples
        for benchmark in recipe.evaluation.benchmarks
        if is_last or benchmark.name in recipe.evaluation.periodic
    }
    is_sft = config.objective == "sft"
    pool = problems or config.data.max_problems or PROBLEMS
    return Work(
        stage=stage,
        objective=config.objective,
        steps=config.steps,
        student=shape_of(recipe.student, role="student"),
        teacher=_teacher(recipe, config),
        has_reference=config.ref_beta > 0.0 and not is_sft,
        responses=config.sft.batch_size if is_sft else config.responses_per_step,
        mean_prompt=prompt,
        mean_response=response,
        longest_response=max(response, min(longest_response or most, most)),
        max_prompt=config.max_prompt_tokens,
        max_response=most,
        micro_batch_tokens=config.micro_batch_tokens,
        evaluation_context=recipe.evaluation.max_context_tokens,
        evaluation_responses=sum(answered[name] for name in set(recipe.evaluation.periodic)),
        evaluations=config.steps // config.evaluate_every if config.evaluate_every else 0,
        final_responses=_final_responses(recipe, sum(answered.values())) if is_last else {},
        checkpoint_every=config.checkpoint.every,
        updates=config.updates_per_step,
        sampled=pool * config.sft.samples if is_sft else 0,
        sampled_together=config.sft.shard_prompts * config.sft.samples if is_sft else 0,
        verifiers=recipe.verification.workers,
        num_in_process=recipe.runtime.rollout_batch_size,
        score_tokens_in_process=recipe.runtime.score_batch_tokens,
    )


def _final_responses(recipe: Recipe, once: int) -> dict[Role, int]:
    """Responses of the final evaluation, `once` of each model: of the student's engine, and of the teacher's. The
    models that `evaluation.also` names count as students."""
    others = [label for label in evaluated_labels(recipe) if label != "teacher"]
    found: dict[Role, int] = {"rollout": once * len(others)}
    if recipe.teacher is not None:
        found["teacher"] = once
    return found


def _mean(given: float | None, assumed: float, most: int) -> float:
    if given is not None and given > most:
        raise RecipeError(f"a mean of {given:g} tokens is above the recipe's limit of {most}; give at most that")
    return assumed if given is None else given


def _teacher(recipe: Recipe, config: StageConfig) -> ModelShape | None:
    if recipe.teacher is None or not config.uses_teacher:
        return None
    if recipe.teacher.server is not None and not recipe.teacher.server.sleep:
        return None
    return shape_of(recipe.teacher, role="teacher")
