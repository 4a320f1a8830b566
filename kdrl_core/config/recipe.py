"""The recipe: one bounded field per hyper-parameter, named after the paper's, with its source in the description.

Tables 3 and 5 of the paper fill `StageConfig`; appendix B.1.1 and B.3 fill `DataConfig`; B.1.2 `RewardConfig`;
Section 4.1 `EvaluationConfig`.

The paper's `mini_batch_prompts` equals `prompts_per_step` (64 / 64), which makes every update on-policy. A smaller one,
`overlong_filtering` and `clip_low`, `clip_high` are DAPO's, not the paper's; they are off by default.
"""

import json
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from kdrl_core.config.alarms import AlarmRule, AlarmsConfig, function_of_metric
from kdrl_core.config.answers import EvaluationConfig, PromptConfig, RewardConfig, VerificationConfig
from kdrl_core.config.data import DataConfig
from kdrl_core.config.models import StudentConfig, TeacherConfig
from kdrl_core.config.paths import resolve_path
from kdrl_core.config.runtime import RolloutConfig, RuntimeConfig, TrackingConfig, TrainerConfig, VLLMConfig
from kdrl_core.config.section import Positive, Section, require_one_of
from kdrl_core.config.stage_parts import BetaConfig, CheckpointConfig, SFTConfig, TermConfig, TopKConfig
from kdrl_core.objectives.inputs import BetaSchedule, Objective
from kdrl_core.objectives.kinds import (
    AGGREGATIONS,
    ESTIMATORS,
    MASKINGS,
    OBJECTIVES,
    ObjectiveKind,
)
from kdrl_core.objectives.plugins import reference_in

StageName = Literal["stage1", "stage2"]


class StageConfig(Section):
    """One training stage: a column of Table 3 or Table 5."""

    objective: Annotated[str, BeforeValidator(lambda name: require_one_of(name, OBJECTIVES))] = Field(
        description="grpo (2), kd_rkl (5), kdrl (8), reward_shaping (Sec. 3.1), sft (14)"
    )
    data: DataConfig
    steps: Positive = Field(description="rollout batches, each with one optimiser step in the paper (Tables 3, 5)")
    prompts_per_step: Positive = Field(description="prompts of a rollout batch (Tables 3, 5: 64)")
    mini_batch_prompts: Positive = Field(
        description="prompts per optimiser step (Tables 3, 5: 64); fewer than prompts_per_step: several optimiser steps"
    )
    group_size: int = Field(ge=2, description="rollouts per prompt G (Tables 3, 5: 16)")
    batch_size: Positive | None = Field(None, description="responses per step, prompts × G; checked if given")
    learning_rate: float = Field(gt=0.0, le=1.0, description="Tables 3, 5: 1e-6")
    temperature: float = Field(
        gt=0.0, le=10.0, description="of sampling and, except in sft, of every logprob (Table 3: 0.6)"
    )
    max_prompt_tokens: Positive = Field(description="longer prompts are filtered out (Tables 3, 5: 1,024)")
    max_response_tokens: Positive = Field(description="longer responses are cut (Tables 3, 5)")
    entropy_coef: float = Field(ge=0.0, description="entropy bonus (Tables 3, 5: 1e-3)")
    beta: BetaConfig | None = Field(None, description="KD coefficient β of (8); not read by grpo and sft")
    kl_estimator: str = Field("k2", description="Table 3: mse, that is k2 (6); file.py:name for one of your own")
    kd_masking: Annotated[str, BeforeValidator(lambda name: require_one_of(name, MASKINGS))] = Field(
        "none", description="reward-guided masking (Sec. 3.4)"
    )
    terms: list[TermConfig] = Field([], description="terms of your own, added to the joint loss; not the paper's")
    topk: TopKConfig = TopKConfig()
    sft: SFTConfig = SFTConfig()
    ref_beta: float = Field(0.0, ge=0.0, description="penalty to the stage's frozen initial policy (Table 3: 1e-3)")
    ref_kl_estimator: str = Field("k3", description="Table 3: low_var_kl, that is k3 (7)")
    normalize_std: bool = Field(True, description="divide advantages by the group's standard deviation (2)")
    aggregation: Annotated[str, BeforeValidator(lambda name: require_one_of(name, AGGREGATIONS))] = Field(
        "token_mean", description="mean over all response tokens of the step, or group by group exactly as in (2)"
    )
    dynamic_sampling_rounds: int = Field(
        0, ge=0, description="rounds of sampling that replace groups which teach nothing (DAPO; not the paper's)"
    )
    overlong_filtering: bool = Field(False, description="leave cut responses out of the loss (DAPO; not the paper's)")
    clip_low: float | None = Field(
        None, ge=0.0, le=1.0, description="clip π_θ / π_old at 1 − clip_low; no effect on-policy, where the ratio is 1"
    )
    clip_high: float | None = Field(None, ge=0.0, le=10.0, description="the same at 1 + clip_high; null: not clipped")
    tis_cap: float | None = Field(
        None, gt=0.0, description="cap of the truncated importance weights π_θ / π_engine; null: no weights"
    )
    weight_decay: float = Field(0.0, ge=0.0)
    max_grad_norm: float = Field(1.0, gt=0.0)
    warmup_steps: int = Field(0, ge=0, description="linear warm-up, in optimiser steps; the first already moves")
    micro_batch_tokens: Positive = Field(65_536, description="prompt + response tokens, padded, per forward pass")
    evaluate_every: Positive | None = Field(None, description="steps between periodic evaluations")
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    def variant(self) -> ObjectiveKind:
        """The parts of the objective: teacher, advantages, loss."""
        return OBJECTIVES[self.objective]

    @property
    def uses_teacher(self) -> bool:
        """Whether the objective needs a teacher: to score responses or, for sft, to give them."""
        return self.variant.teacher != "none"

    @property
    def scores_teacher(self) -> bool:
        """Whether the teacher's logprobs enter the objective."""
        return self.variant.teacher == "scores"

    @property
    def needs_topk(self) -> bool:
        """Whether the teacher's best tokens are scored as well (A.3)."""
        return self.objective_at(0).needs_topk

    @property
    def responses_per_step(self) -> int:
        """B = prompts × G."""
        return self.prompts_per_step * self.group_size

    @property
    def updates_per_step(self) -> int:
        """Optimiser steps on the responses of one step; 1 is on-policy."""
        return self.prompts_per_step // self.mini_batch_prompts

    @property
    def update_temperature(self) -> float:
        """T of the logprobs that are trained on: that of sampling; for SFT, on samples of the teacher, its own."""
        return self.sft.temperature if self.objective == "sft" else self.temperature

    def objective_at(self, step: int) -> Objective:
        """The objective of a step, counted from 0. The loss takes this record unchanged."""
        beta = self.beta
        return Objective(
            kind=self.objective,
            beta=0.0 if beta is None else BetaSchedule(beta.init, beta.decay, beta.minimum)(step),
            kl_estimator=self.kl_estimator,
            kd_masking=self.kd_masking,
            topk_floor=self.topk.floor,
            group_size=self.group_size,
            normalize_std=self.normalize_std,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            tis_cap=self.tis_cap,
            ref_beta=self.ref_beta,
            ref_kl_estimator=self.ref_kl_estimator,
            entropy_coef=self.entropy_coef,
            aggregation=self.sft.aggregation if self.objective == "sft" else self.aggregation,
            terms=tuple((term.function, term.coefficient) for term in self.terms),
        )

    def is_evaluation_due(self, step: int) -> bool:
        """Whether the policy after `step` updates is evaluated while training goes on."""
        return self.evaluate_every is not None and step % self.evaluate_every == 0

    @field_validator("kl_estimator", "ref_kl_estimator", mode="before")
    @classmethod
    def _known_estimator(cls, name: object, info: ValidationInfo) -> object:
        """A name of the table, or a reference to a function, which is also what an entry point of that name gives."""
        is_penalty = info.field_name == "ref_kl_estimator"
        known = [known for known, row in ESTIMATORS.items() if row.is_for_reference or not is_penalty]
        found = None if name in known else reference_in(name, group="kdrl.estimators")
        try:
            return require_one_of(name, known) if found is None else str(found)
        except ValueError as error:
            raise ValueError(f"{error}, or file.py:name for one of your own") from None

    @field_validator("terms")
    @classmethod
    def _named_apart(cls, terms: list[TermConfig]) -> list[TermConfig]:
        names = [term.function.rpartition(":")[2] for term in terms]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two functions are named {twice[0]}, as their metrics would be; rename one of them")
        return terms

    def _refuse_off_policy_fields(self) -> None:
        """SFT has no rollouts: refuse what is set of their use."""
        fields = {
            "mini_batch_prompts": self.prompts_per_step,
            "dynamic_sampling_rounds": 0,
            "overlong_filtering": False,
            "terms": [],
            "clip_low": None,
            "clip_high": None,
            "tis_cap": None,
            "ref_beta": 0.0,
        }
        for name, neutral in fields.items():
            if getattr(self, name) != neutral:
                raise ValueError(
                    f"{name} is about rollouts, and objective {self.objective} trains on teacher "
                    f"responses (sft.batch_size per step); set {name}={json.dumps(neutral)}, or another objective"
                )

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
        if self.prompts_per_step % self.mini_batch_prompts:
            raise ValueError(
                f"mini_batch_prompts {self.mini_batch_prompts} does not divide prompts_per_step "
                f"{self.prompts_per_step}; set mini_batch_prompts={self.prompts_per_step} for one optimiser step per "
                "rollout batch (on-policy, as Tables 3, 5: 64 / 64), or a divisor of it for several"
            )
        if self.variant.loss == "likelihood":
            self._refuse_off_policy_fields()
        if self.dynamic_sampling_rounds and (
            self.variant.advantages != "rewards" or (self.variant.distils and self.kd_masking == "none")
        ):
            masking = f" with kd_masking={self.kd_masking}" if self.variant.is_masked else ""
            raise ValueError(
                f"dynamic_sampling_rounds={self.dynamic_sampling_rounds} replaces groups that teach nothing, but "
                f"objective {self.objective}{masking} learns from the teacher in every group; set "
                "dynamic_sampling_rounds=0, or objective=kdrl with kd_masking=group, or objective=grpo"
            )
        if self.scores_teacher and self.beta is None:
            raise ValueError(f"objective {self.objective} needs beta; set beta.init (Table 3: 2e-3) or objective=grpo")
        if not self.variant.is_masked and self.kd_masking != "none":
            raise ValueError(f"kd_masking {self.kd_masking} masks the joint loss only; set objective=kdrl")
        return self


class Recipe(Section):
    """A whole run. At least one stage; a teacher exactly where a stage's objective distils from one."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    seed: int = Field(0, ge=0, lt=2**32)
    student: StudentConfig
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
    def alarm_rules(self) -> dict[str, AlarmRule]:
        """The rules of its alarms that are on, by name."""
        return self.alarms.rules_of_functions if self.reward.functions else self.alarms.rules

    @property
    def is_exact(self) -> bool:
        """Whether what its models compute has the same bits when it is computed again (docs/resuming.md)."""
        teacher = self.teacher
        here = teacher is None or (teacher.engine == "transformers" and teacher.server is None)
        return here and self.rollout.engine == "transformers" and self.runtime.device == "cpu"

    def trainer_scores(self, role: str) -> bool:
        """Whether the trainer of an adapter scores for `teacher` or `reference`, so that no other copy is loaded: the
        stage's initial policy always, the teacher if it is the base, here by transformers, and gives no best tokens."""
        student, teacher = self.student, self.teacher
        if student.lora is None or role == "reference":
            return student.lora is not None
        if teacher is None or teacher.engine != "transformers" or teacher.server is not None:
            return False
        if any(self.stage(name).needs_topk for name in self.stages):
            return False
        of_student, of_teacher = ((resolve_path(model.path), model.gguf_file) for model in (student, teacher))
        return of_student == of_teacher

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
        self._check_rules()
        return self

    def _check_rules(self) -> None:
        """Refuse an alarm on a function that the reward does not have: it would be silent."""
        known = [function.label for function in self.reward.functions]
        for name, rule in self.alarms.rules.items():
            for metric in (rule.metric, getattr(rule, "less", None) or ""):
                if (of := function_of_metric(metric)) is not None and of not in known:
                    raise ValueError(
                        f"alarms.{name}: {metric} is of {of}, which is none of reward.functions "
                        f"({', '.join(known) or 'there are none'}); correct the name"
                    )

    def _check_estimators(self, name: str) -> None:
        """Refuse estimators that only this process knows, since DeepSpeed's ranks are other processes."""
        stage = self.stage(name)
        for field in ("kl_estimator", "ref_kl_estimator"):
            estimator = ESTIMATORS.get(getattr(stage, field))
            if self.trainer.engine == "deepspeed" and estimator is not None and estimator.is_local:
                raise ValueError(
                    f"{name}.{field}={getattr(stage, field)} is registered in this process alone, and the ranks of "
                    "trainer.engine=deepspeed do not know it; give it as file.py:name, or set trainer.engine=torch"
                )

    def _check_server(self, name: str) -> None:
        """Refuse a served teacher at another temperature: the served weights have a fixed one baked in."""
        server = self.teacher.server if self.teacher is not None else None
        stage = self.stage(name)
        if server is not None and stage.scores_teacher and server.temperature != stage.temperature:
            raise ValueError(
                f"{name}.temperature is {stage.temperature}, but teacher.server.temperature is {server.temperature}: "
                "served logprobs are of the temperature that is baked into the weights. Make these with `kdrl "
                f"bake-teacher --temperature {stage.temperature}`, serve them, and set teacher.server.temperature="
                f"{stage.temperature}"
            )
