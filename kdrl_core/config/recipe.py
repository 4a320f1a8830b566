"""The recipe: one bounded field per hyper-parameter, named after the paper's, with its source in the description.

Tables 3 and 5 of the paper fill `StageConfig`; appendix B.1.1 and B.3 fill `DataConfig`; B.1.2 `RewardConfig`;
Section 4.1 `EvaluationConfig`.
"""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from kdrl_core.config.alarms import AlarmsConfig
from kdrl_core.config.models import ModelConfig, TeacherConfig
from kdrl_core.config.runtime import RolloutConfig, RuntimeConfig, TrackingConfig, TrainerConfig, VLLMConfig
from kdrl_core.config.section import Positive, Section, Share
from kdrl_core.config.stage import StageConfig
from kdrl_core.objectives.kinds import ESTIMATORS

StageName = Literal["stage1", "stage2"]


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
            self._check_estimators(name)
        return self

    def _check_estimators(self, name: str) -> None:
        """The ranks of the DeepSpeed trainer are processes of their own."""
        stage = self.stage(name)
        for field in ("kl_estimator", "ref_kl_estimator"):
            estimator = ESTIMATORS.get(getattr(stage, field))
            if self.trainer.engine == "deepspeed" and estimator is not None and estimator.is_local:
                raise ValueError(
                    f"{name}.{field}={getattr(stage, field)} is registered in this process alone, and the ranks of "
                    "trainer.engine=deepspeed do not know it; give it as file.py:name, or set trainer.engine=torch"
                )

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
