"""The recipe: one bounded field per hyper-parameter, named after the paper's, with its source in the description.

Tables 3 and 5 of the paper fill `StageConfig`; appendix B.1.1 and B.3 fill `DataConfig`; B.1.2 `RewardConfig`;
Section 4.1 `EvaluationConfig`. Departures: `mini_batch_prompts` must equal `prompts_per_step`, since the paper's
64 / 64 makes every update on-policy (π_old = π_θ) and k2's gradient is unbiased only there.
"""

import re
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from kdrl_core.config.alarms import AlarmsConfig
from kdrl_core.config.engine_names import EngineName, LocalEngine
from kdrl_core.config.section import Positive, Section, Share

Objective = Literal["grpo", "kdrl", "kd_rkl", "reward_shaping", "sft"]
StageName = Literal["stage1", "stage2"]
TrackerName = Literal["tensorboard", "mlflow", "wandb"]
KDEstimator = Literal["k1", "k2", "k3", "k3_k2grad", "topk"]

PAPER_BENCHMARKS = ("aime24", "aime25", "math500", "amc23", "minerva_math", "olympiad_bench")
"""The six benchmarks of Table 1, shipped as `builtin:benchmarks/<name>.jsonl`."""


class ModelConfig(Section):
    """Where a model comes from."""

    path: str = Field(
        min_length=1, description="Hugging Face model directory, `builtin:…`, `package:…` or `run:NAME` (see docs)"
    )
    gguf_file: str | None = Field(None, description="GGUF file inside `path`; converted once to a plain model")
    chat_template: str | None = Field(None, description="Jinja template used in place of the tokenizer's own")
    trust_remote_code: bool = Field(False, description="run code shipped with the model; off unless you trust it")


class ServersConfig(Section):
    """Servers of one model that share its work: `kdrl serve`, or what speaks vLLM's API."""

    urls: list[str] = Field(min_length=1, description="of each server, up to and with /v1: http://127.0.0.1:8000/v1")
    model: str | None = Field(None, description="name under which they serve it; null: the only one that they serve")
    api_key: str | None = Field(None, description="where the key is, env:NAME or block:NAME (Prefect); never the key")
    timeout_s: float = Field(600.0, gt=0.0, description="of one request")
    retry_for_s: float = Field(
        600.0, ge=0.0, description="from a request's first fault on, what may pass is tried again for so long"
    )
    first_pause_s: float = Field(1.0, gt=0.0, description="before the second try; doubled with each, up to 30 s")
    concurrency: Positive = Field(32, description="requests in flight, over all servers")
    sleep: bool = Field(False, description="they share GPUs with other phases and sleep meanwhile (kdrl serve)")

    @field_validator("urls")
    @classmethod
    def _plain_urls(cls, urls: list[str]) -> list[str]:
        for number, url in enumerate(urls, start=1):
            try:
                parts = urlsplit(url)
                is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            except ValueError:  # its message shows what may be a key
                raise ValueError(f"URL {number} is none; give http://HOST:PORT/v1") from None
            if parts.username or parts.password or parts.query or parts.fragment:
                raise ValueError(
                    f"URL {number} carries a user, a password, a query or a fragment; a key does not belong in a "
                    "recipe: set api_key=env:NAME and export NAME"
                )
            if not is_url:
                raise ValueError(f"URL {number} is none; give http://HOST:PORT/v1")
        return urls

    @field_validator("api_key")
    @classmethod
    def _a_reference(cls, reference: str | None) -> str | None:
        if reference is not None and not re.fullmatch(r"env:[A-Za-z_][A-Za-z0-9_]*|block:[A-Za-z0-9_-]+", reference):
            raise ValueError(
                "a key does not belong in a recipe; say where it is, env:NAME (an environment variable) or "
                "block:NAME (a Prefect Secret block)"
            )
        return reference


class ReplicasConfig(ServersConfig):
    """Replicas of the student, which sample (kdrl serve)."""

    timeout_s: float = Field(7_200.0, gt=0.0, description="of one response, to its last token")
    concurrency: Positive = Field(1_024, description="responses in flight, over all replicas")


class ServerConfig(ServersConfig):
    """Servers that score with the teacher's weights in place of this process."""

    temperature: float = Field(
        1.0, gt=0.0, le=10.0, description="baked into the served weights (kdrl bake-teacher); has to be the stage's"
    )


class TeacherConfig(ModelConfig):
    """The teacher: a model directory, which is loaded here unless servers score in its place."""

    engine: LocalEngine = Field("transformers", description="what scores where it is loaded here")
    server: ServerConfig | None = Field(None, description="servers of its weights; path then gives its tokenizer")


class DifficultyConfig(Section):
    """Which published labels to read. A label counts the failures of one model out of `num_samples` (B.1.1)."""

    student: str = Field("DeepSeek-R1-Distill-Qwen-1.5B", description="label of the model that stands for the student")
    others: list[str] = Field(
        ["DeepSeek-R1-Distill-Qwen-7B", "DeepSeek-R1-Distill-Qwen-32B"], description="labels of the stronger models"
    )
    num_samples: Positive = Field(16, description="samples behind each label (B.1.1: 16)")

    @property
    def names(self) -> list[str]:
        """Every label that is read."""
        return [self.student, *self.others]


class DecontaminationConfig(Section):
    """Training problems that overlap evaluation problems are dropped, by shared n-grams of words."""

    files: list[str] = Field(
        [f"builtin:benchmarks/{name}.jsonl" for name in PAPER_BENCHMARKS],
        min_length=1,
        description="evaluation problems (JSON Lines with `problem`); default: the paper's six benchmarks",
    )
    ngram: Positive = Field(13, description="words per n-gram; shorter problems overlap only if they are equal")
    min_overlap: float = Field(
        0.5, gt=0.0, le=1.0, description="share of the shorter problem's n-grams that makes an overlap"
    )


class DataConfig(Section):
    """Problems of a stage and the rules that filter them (B.1.1, B.3)."""

    files: list[str] = Field(min_length=1, description="Parquet, JSON or JSON Lines; path, glob or `builtin:…`")
    format: Literal["auto", "problems", "skywork", "deepscaler"] = Field("auto", description="schema of `files`")
    difficulty: DifficultyConfig = DifficultyConfig()
    drop_passes_at_least: Positive | None = Field(None, description="B.1.1 rule 1: 15 of 16")
    drop_all_failed: bool = Field(False, description="B.1.1 rule 2: no model ever solves it")
    max_unsolved_share: Share | None = Field(None, description="B.1.1 rule 3: 0.10 of the result")
    min_pass_rate: Share | None = Field(None, description="B.3: 0.25 for the teacher's pool, 0.50 for the student's")
    missing_labels: Literal["keep", "drop", "fail"] = Field("fail", description="rows without a difficulty label")
    on_error: Literal["fail", "drop"] = Field("fail", description="malformed rows: stop, or drop and count")
    unparsable_answers: Literal["drop", "keep", "fail"] = Field(
        "drop", description="ground truths that math-verify cannot parse: no response could ever be right"
    )
    decontamination: DecontaminationConfig | None = Field(
        DecontaminationConfig(), description="drop problems that overlap benchmarks; null: keep them"
    )
    max_problems: Positive | None = Field(None, description="keep a seeded sample of this size")


class BetaConfig(Section):
    """β = max(init − decay · step, minimum) (Sec. 3.3); constant when decay is 0."""

    init: float = Field(ge=0.0)
    decay: float = Field(0.0, ge=0.0)
    minimum: float = Field(0.0, ge=0.0)

    @model_validator(mode="after")
    def _minimum_below_init(self) -> Self:
        if self.minimum > self.init:
            raise ValueError(f"minimum {self.minimum} is above init {self.init}; β is annealed downwards (Sec. 3.3)")
        return self


class TopKConfig(Section):
    """The Top-K teacher of Sec. 2.3 and A.3, read where kl_estimator is topk."""

    k: Positive = Field(20, description="teacher logits kept per token")
    floor: float = Field(
        -20.0, le=0.0, description="log-probability of every other token, −∞ in the paper: what a unit of mass costs"
    )


class SFTConfig(Section):
    """SFT by rejection sampling (B.2), read where objective is sft: teacher samples → verify → SFT on the right ones.

    The stage's steps, learning_rate, temperature and token limits apply; prompts_per_step and group_size do not.
    """

    samples: Positive = Field(8, description="teacher samples per problem (B.2: 8)")
    batch_size: Positive = Field(128, description="responses per optimiser step (B.2: 128)")
    shard_prompts: Positive = Field(64, description="problems sampled and published together")


class CheckpointConfig(Section):
    """When a stage publishes its weights and optimiser. Steps in between are replayed from their rollouts."""

    every: Positive = Field(1, description="steps between checkpoints")
    keep_last: Positive = Field(2, description="checkpoints kept besides the stage's final one")
    keep_every: Positive | None = Field(None, description="keep every Nth step's checkpoint for good")


class StageConfig(Section):
    """One training stage: a column of Table 3 or Table 5."""

    objective: Objective = Field(description="grpo (2), kd_rkl (5), kdrl (8), reward_shaping (Sec. 3.1), sft (14)")
    data: DataConfig
    steps: Positive = Field(description="optimiser steps (Tables 3, 5)")
    prompts_per_step: Positive = Field(description="prompts of a rollout batch (Tables 3, 5: 64)")
    mini_batch_prompts: Positive = Field(description="prompts per optimiser step (Tables 3, 5: 64)")
    group_size: int = Field(ge=2, description="rollouts per prompt G (Tables 3, 5: 16)")
    batch_size: Positive | None = Field(None, description="responses per step, if you want it checked: prompts × G")
    learning_rate: float = Field(gt=0.0, le=1.0, description="Tables 3, 5: 1e-6")
    temperature: float = Field(gt=0.0, le=10.0, description="of sampling and of every logprob (Table 3: 0.6)")
    max_prompt_tokens: Positive = Field(description="longer prompts are filtered out (Tables 3, 5: 1,024)")
    max_response_tokens: Positive = Field(description="longer responses are cut (Tables 3, 5)")
    entropy_coef: float = Field(ge=0.0, description="entropy bonus (Tables 3, 5: 1e-3)")
    beta: BetaConfig | None = Field(None, description="KD coefficient β of (8); not read by grpo and sft")
    kl_estimator: KDEstimator = Field("k2", description="Table 3: mse, that is k2 (6)")
    kd_masking: Literal["none", "response", "group"] = Field("none", description="reward-guided masking (Sec. 3.4)")
    topk: TopKConfig = TopKConfig()
    sft: SFTConfig = SFTConfig()
    ref_beta: float = Field(0.0, ge=0.0, description="penalty to the stage's frozen initial policy (Table 3: 1e-3)")
    ref_kl_estimator: Literal["k2", "k3"] = Field("k3", description="Table 3: low_var_kl, that is k3 (7)")
    normalize_std: bool = Field(True, description="divide advantages by the group's standard deviation (2)")
    aggregation: Literal["token_mean", "group_mean"] = Field(
        "token_mean", description="over all response tokens of the step, or (2) to the letter, group by group"
    )
    tis_cap: float | None = Field(
        None, gt=0.0, description="cap of the truncated importance weights π_θ / π_engine; null: no weights"
    )
    weight_decay: float = Field(0.0, ge=0.0)
    max_grad_norm: float = Field(1.0, gt=0.0)
    warmup_steps: int = Field(0, ge=0, description="linear warm-up; the first update already moves")
    micro_batch_tokens: Positive = Field(65_536, description="prompt + response tokens, padded, per forward pass")
    evaluate_every: Positive | None = Field(None, description="steps between periodic evaluations")
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    def uses_teacher(self) -> bool:
        """Whether the objective needs a teacher: to score responses or, for sft, to give them."""
        return self.objective != "grpo"

    @property
    def scores_teacher(self) -> bool:
        """Whether the teacher's logprobs enter the objective."""
        return self.objective not in ("grpo", "sft")

    @property
    def needs_topk(self) -> bool:
        """Whether the teacher's best tokens are scored as well (A.3)."""
        return self.kl_estimator == "topk" and self.objective in ("kdrl", "kd_rkl")

    @property
    def responses_per_step(self) -> int:
        """B = prompts × G."""
        return self.prompts_per_step * self.group_size

    def is_evaluation_due(self, step: int) -> bool:
        """Whether the policy after `step` updates is evaluated while training goes on."""
        return self.evaluate_every is not None and step % self.evaluate_every == 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch_size is not None and self.batch_size % self.group_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by group_size {self.group_size}; "
                f"set batch_size={self.responses_per_step} (prompts_per_step × group_size) or leave it out"
            )
        if self.batch_size is not None and self.batch_size != self.responses_per_step:
            raise ValueError(
                f"batch_size {self.batch_size} is not prompts_per_step × group_size = {self.responses_per_step}; "
                f"set prompts_per_step={self.batch_size // self.group_size} or leave batch_size out"
            )
        if self.mini_batch_prompts != self.prompts_per_step:
            raise ValueError(
                f"mini_batch_prompts {self.mini_batch_prompts} differs from prompts_per_step {self.prompts_per_step}; "
                "updates are strictly on-policy (Tables 3, 5: 64 / 64), so set both to the same number"
            )
        if self.scores_teacher and self.beta is None:
            raise ValueError(f"objective {self.objective} needs beta; set beta.init (Table 3: 2e-3) or objective=grpo")
        if self.objective != "kdrl" and self.kd_masking != "none":
            raise ValueError(f"kd_masking {self.kd_masking} masks the joint loss only; set objective=kdrl")
        return self


class RewardConfig(Section):
    """r = r_format · r_acc (B.1.2); R1-Zero uses r_acc alone."""

    require_format: bool = Field(True, description="multiply by the format reward")


class PromptConfig(Section):
    """How a problem becomes a prompt: the template's text as a user turn of the student's chat template."""

    template: str = Field("{question} Let's think step by step and output the final answer within \\boxed{}.")
    think_opened: bool | None = Field(None, description="the chat template ends with <think>; null: look at the prompt")

    @model_validator(mode="after")
    def _has_question(self) -> Self:
        if self.template.count("{question}") != 1:
            raise ValueError("template must contain {question} exactly once")
        return self


class VerificationConfig(Section):
    """Limits of the verifier's worker processes."""

    workers: Positive = 2
    timeout_s: float = Field(10.0, gt=0.0, description="hard limit per answer")
    memory_limit_mb: Positive = 2_048
    max_failed_share: Share = Field(0.1, description="timeouts and errors per step beyond which the stage stops")

    @property
    def pool_options(self) -> dict[str, Any]:
        """Keyword arguments of `Verifier`."""
        return self.model_dump(exclude={"max_failed_share"})


class BenchmarkConfig(Section):
    """One benchmark: Avg@k over `samples` responses a problem; Pass@1 is samples = 1."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    file: str = Field(min_length=1)
    samples: Positive = 1
    max_problems: Positive | None = Field(None, description="the first N problems only")


class EvaluationConfig(Section):
    """Sec. 4.1: temperature 0.6, top-p 1.0, context 32K (8K for Zero), accuracy reward as the criterion."""

    benchmarks: list[BenchmarkConfig] = Field(min_length=1)
    periodic: list[str] = Field([], description="benchmarks evaluated during training; never the test set")
    temperature: float = Field(0.6, ge=0.0, description="0 is greedy")
    top_p: float = Field(1.0, ge=1.0, le=1.0, description="only 1.0: the paper's setting")
    max_context_tokens: Positive = 32_768

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [b.name for b in self.benchmarks]
        if len(set(names)) != len(names):
            raise ValueError(f"two benchmarks have the same name: {names}")
        if "avg" in names:
            raise ValueError("a benchmark cannot be named avg, which tables call the benchmarks' mean; rename it")
        if unknown := sorted(set(self.periodic) - set(names)):
            raise ValueError(f"periodic names {unknown}, which are not among the benchmarks {names}")
        return self


class RolloutConfig(Section):
    """What samples responses."""

    engine: EngineName = Field(
        "transformers", description="in this process: transformers, vllm; replicas of vLLM that `server` lists: server"
    )
    server: ReplicasConfig | None = Field(None, description="replicas that see the run's folder (kdrl serve)")
    sync_tolerance: float = Field(
        0.05, gt=0.0, description="mean gap of engine and trainer on a probe after a weight sync, in nats"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.engine == "server") != (self.server is not None):
            raise ValueError(
                "engine=server and server.urls belong together; set both, or neither: "
                "rollout.engine=server rollout.server.urls=['http://127.0.0.1:8000/v1']"
            )
        return self


class VLLMConfig(Section):
    """Of each vLLM engine in this process, of rollouts and of the teacher."""

    max_num_seqs: Positive = Field(256, description="responses in flight")
    kv_cache_gb: float | None = Field(None, gt=0.0, description="GiB of key-value cache; null: vLLM decides")
    gpu_memory_utilization: float = Field(0.9, gt=0.0, le=1.0, description="share of the GPU, weights and cache")
    tensor_parallel: Positive = Field(1, description="GPUs that share one engine")
    sleep: bool = Field(True, description="memory is given back between phases: weights (GPU) and key-value cache")


class RuntimeConfig(Section):
    """Where the models run. Numbers here do not change the method."""

    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    num_threads: Positive = Field(1, description="torch threads; part of what makes a CPU run bit-identical")
    rollout_batch_size: Positive = Field(256, description="responses generated together")
    score_batch_tokens: Positive = Field(65_536, description="padded tokens per scoring forward pass")


class TrainerConfig(Section):
    """What updates the policy. Numbers here do not change the method, only where it runs and its last bits."""

    engine: Literal["torch", "deepspeed"] = Field("torch", description="in this process, or ranks of their own")
    ranks: Positive = Field(1, description="processes that train together (deepspeed)")
    zero_stage: Literal[0, 2, 3] = Field(
        2, description="cut over ranks: 0 nothing, 2 optimiser and gradients, 3 weights as well (deepspeed)"
    )
    activation_checkpointing: bool = Field(False, description="recompute activations: less memory, more time")
    offload_optimizer: bool = Field(False, description="optimiser in the host's memory (deepspeed, zero_stage 2, 3)")
    hostfile: str | None = Field(None, description="DeepSpeed hostfile, `HOST slots=N` lines; null: ranks on this host")
    master_port: int | None = Field(None, ge=1, le=65_535, description="of the ranks' rendezvous; null: a free one")
    start_timeout_s: float = Field(600.0, gt=0.0, description="until all ranks are up and have their model")
    step_timeout_s: float = Field(7_200.0, gt=0.0, description="of one update, save or load")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.engine == "torch" and (self.ranks > 1 or self.offload_optimizer or self.hostfile is not None):
            raise ValueError(
                "ranks above 1, offload_optimizer and hostfile need several processes; set trainer.engine=deepspeed"
            )
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs a partitioned optimiser; set zero_stage to 2 or 3")
        return self


class TrackingConfig(Section):
    """Where the metrics of a run go beside its own files; read from these, so that nothing depends on it."""

    trackers: list[TrackerName] = Field([], description="tensorboard, mlflow, wandb (offline); none by default")
    project: str = Field("kdrl", min_length=1, max_length=128, description="MLflow's experiment, W&B's project")
    mlflow_uri: str | None = Field(
        None, description="MLflow's tracking URI, without credentials; null: artifacts/tracking/mlflow.db"
    )

    @field_validator("trackers")
    @classmethod
    def _once_each(cls, trackers: list[TrackerName]) -> list[TrackerName]:
        if len(set(trackers)) < len(trackers):
            raise ValueError("a tracker stands twice; name it once")
        return trackers

    @field_validator("mlflow_uri")
    @classmethod
    def _without_key(cls, uri: str | None) -> str | None:
        if uri is not None and (urlsplit(uri).username or urlsplit(uri).password):
            raise ValueError(
                "the URI carries a user or a password, which do not belong in a recipe; set MLFLOW_TRACKING_USERNAME "
                "and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the environment"
            )
        return uri


class Recipe(Section):
    """A whole run. At least one stage; a teacher exactly where a stage's objective distils from one."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    seed: int = Field(0, ge=0, lt=2**32)
    student: ModelConfig
    teacher: TeacherConfig | None = None
    prompt: PromptConfig = PromptConfig()
    reward: RewardConfig = RewardConfig()
    stage1: StageConfig | None = None
    stage2: StageConfig | None = None
    verification: VerificationConfig = VerificationConfig()
    evaluation: EvaluationConfig
    runtime: RuntimeConfig = RuntimeConfig()
    rollout: RolloutConfig = RolloutConfig()
    vllm: VLLMConfig = VLLMConfig()
    trainer: TrainerConfig = TrainerConfig()
    tracking: TrackingConfig = TrackingConfig()
    alarms: AlarmsConfig = AlarmsConfig()

    def stage(self, name: str) -> StageConfig:
        """The named stage. Raises KeyError if the recipe does not have it."""
        config = {"stage1": self.stage1, "stage2": self.stage2}[name]
        if config is None:
            raise KeyError(name)
        return config

    @property
    def stages(self) -> tuple[StageName, ...]:
        """Names of the stages that run, in order."""
        configured: list[tuple[StageName, StageConfig | None]] = [("stage1", self.stage1), ("stage2", self.stage2)]
        return tuple(name for name, config in configured if config is not None)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.stages:
            raise ValueError("no stage to run; give stage1, stage2 or both")
        for name in self.stages:
            if self.stage(name).uses_teacher and self.teacher is None:
                raise ValueError(
                    f"{name}.objective={self.stage(name).objective} distils from a teacher, but the recipe has none; "
                    f"set teacher.path or {name}.objective=grpo"
                )
            self._check_server(name)
        return self

    def _check_server(self, name: str) -> None:
        """Served logprobs know no temperature but that which is baked into the served weights."""
        server = self.teacher.server if self.teacher is not None else None
        stage = self.stage(name)
        if server is not None and stage.scores_teacher and server.temperature != stage.temperature:
            raise ValueError(
                f"{name}.temperature is {stage.temperature}, but teacher.server.temperature is {server.temperature}: "
                "served logprobs are of the temperature that is baked into the weights. Make these with `kdrl "
                f"bake-teacher --temperature {stage.temperature}`, serve them, and set teacher.server.temperature="
                f"{stage.temperature}"
            )
