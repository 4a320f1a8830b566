"""Where a run works: rollout engine, trainer, device, trackers. These fields do not change the method."""

from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from kdrl_core.config.models import ReplicasConfig
from kdrl_core.config.section import EngineName, Positive, Section

TrackerName = Literal["tensorboard", "mlflow", "wandb"]


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
    """Settings of each vLLM engine that the run starts, for rollouts and for the teacher."""

    max_num_seqs: Positive = Field(256, description="responses in flight")
    kv_cache_gb: float | None = Field(None, gt=0.0, description="GiB of key-value cache; null: vLLM decides")
    gpu_memory_utilization: float | None = Field(
        None, gt=0.0, le=1.0, description="share of the GPU, weights and cache; null: what the trainer leaves of 0.9"
    )
    tensor_parallel: Positive = Field(1, description="GPUs that share one engine")
    replicas: Positive = Field(1, description="engines of each role; above 1 the run starts them as servers of its own")
    batch_invariant: bool = Field(False, description="the same bits for any batch (CUDA; slower): VLLM_BATCH_INVARIANT")
    sleep: bool = Field(True, description="free memory between phases: weights (GPU) and key-value cache")


class RuntimeConfig(Section):
    """Where the models run. Numbers here do not change the method."""

    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    num_threads: Positive = Field(1, description="torch threads; CPU runs are bit-identical only at the same number")
    rollout_batch_size: Positive = Field(256, description="responses generated together")
    score_batch_tokens: Positive = Field(65_536, description="padded tokens per scoring forward pass")


class TrainerConfig(Section):
    """What updates the policy. Numbers here do not change the method, only where it runs and its last bits."""

    engine: Literal["torch", "deepspeed"] = Field("torch", description="torch: this process; deepspeed: several ranks")
    ranks: Positive = Field(1, description="processes that train together (deepspeed)")
    zero_stage: Literal[0, 2, 3] = Field(
        2, description="sharded over ranks: 0 nothing, 2 optimiser and gradients, 3 weights as well (deepspeed)"
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
    """Trackers that get the metrics of a run, as copies from the run's own files. Nothing depends on a tracker."""

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
