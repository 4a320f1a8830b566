"""Builds the models of a stage from the recipe: trainer, rollout engines, scorers."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrl_core.boxes.stage import latest_checkpoint
from kdrl_core.config import EngineName, LocalEngine, LoraConfig, ModelConfig, StageConfig
from kdrl_core.engines.from_recipe import local_scorer, rollout_engine
from kdrl_core.engines.http_scorer import HTTPScorer
from kdrl_core.engines.protocols import RolloutEngine, TeacherScorer
from kdrl_core.engines.server_client import served_model
from kdrl_core.engines.sync import PROBE_RESPONSES, SyncReport
from kdrl_core.errors import RunError
from kdrl_core.ledger import Run, is_published, verify_own, verify_published
from kdrl_core.ledger.graph import initial_checkpoint
from kdrl_core.models.loading import load_model
from kdrl_core.models.prepare import prepared_model
from kdrl_core.models.tokenizer import num_token_ids
from kdrl_core.training.deepspeed_trainer import DeepSpeedTrainer
from kdrl_core.training.protocols import OptimizerSettings, Trainer
from kdrl_core.training.torch_trainer import TorchTrainer

if TYPE_CHECKING:
    from kdrl_core.models.lora import AdapterSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncedEngine:
    """The student's rollout engine, with the weights of one policy."""

    engine: RolloutEngine
    version: int
    """Number of updates behind its weights; -1: no weights are loaded yet."""
    sync: SyncReport | None = None
    """Result of the weight sync; None for an engine that loads weights without one."""


def initial_policy(run: Run, stage: str) -> Path:
    """Model directory that `stage` starts from. Raises RunError if the stage before it is not finished."""
    node = initial_checkpoint(run.recipe, stage)
    if node is None:
        return prepared_model(run.recipe.student, run.paths.root)
    policy = run.paths.root / node.place
    if not is_published(policy):
        raise RunError(
            f"{stage} starts from the result of {node.stage}, which is not finished; run or resume {node.stage} first"
        )
    return policy


def intact_initial_policy(run: Run, stage: str) -> Path:
    """`initial_policy`, verified where kdrl has published it. Raises DamagedArtifactError if it was altered, or is not
    the one that the stage's first step was sampled from."""
    policy = initial_policy(run, stage)
    if policy.is_relative_to(run.paths.root):
        verify_own(run, policy)
    elif is_published(policy):
        verify_published(policy)
    return policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Builders:
    """Make a new model at each call. Nothing is kept here."""

    run: Run
    stage: str
    policy: Path
    """Model directory that the stage starts from."""
    tokenizer: Any

    @property
    def _config(self) -> StageConfig:
        return self.run.recipe.stage(self.stage)

    def trainer(self) -> Trainer:
        """The trainer with the stage's latest checkpoint, or with its initial policy. Raises DamagedArtifactError if
        that checkpoint was altered."""
        trainer = self._new_trainer()
        if (step := latest_checkpoint(self.run, self.stage)) > 0:
            checkpoint = self.run.paths.checkpoint(self.stage, step)
            try:
                verify_own(self.run, checkpoint)
                trainer.load(checkpoint)
            except BaseException:
                trainer.close()
                raise
        return trainer

    @property
    def num_probes(self) -> int:
        """Number of responses that test a weight sync: at least one per replica."""
        recipe = self.run.recipe
        server = recipe.rollout.server
        return max(PROBE_RESPONSES, recipe.vllm.replicas if server is None else len(server.urls))

    def sampler(self) -> SyncedEngine:
        """The student's rollout engine, with the stage's initial policy, or before its first weight sync."""
        engine = self._rollout_engine(self.policy, self.run.recipe.student, role="student")
        return SyncedEngine(engine=engine, version=0 if self.run.recipe.rollout.engine == "transformers" else -1)

    def teacher_engine(self) -> RolloutEngine:
        """The teacher as a sampler, at the stage's temperature and response limit."""
        teacher = self.run.recipe.teacher
        assert teacher is not None  # the recipe was validated
        model = prepared_model(teacher, self.run.paths.root)
        return self._rollout_engine(model, teacher, role="teacher-sampler", engine=teacher.engine)

    def scorer(self, role: str) -> TeacherScorer:
        """The frozen model of a role, `teacher` or `reference`, at the student's temperature.

        Raises:
            EngineError: the teacher is served, and its servers do not answer, or serve something else.
        """
        recipe, config = self.run.recipe, self._config
        limits = {
            "num_tokens": num_token_ids(self.tokenizer),
            "max_tokens": config.max_prompt_tokens + config.max_response_tokens,  # of the longest prompt and response
        }
        if role == "reference":
            engine: LocalEngine = "vllm" if recipe.rollout.engine == "vllm" else "transformers"
            return local_scorer(
                recipe,
                self.policy,
                recipe.student,
                engine=engine,
                temperature=config.temperature,
                logs=self._logs(role),
                **limits,
            )
        teacher = recipe.teacher
        assert teacher is not None  # the recipe was validated
        if teacher.server is not None:
            return HTTPScorer(served_model(teacher.server), **limits)
        return local_scorer(
            recipe,
            prepared_model(teacher, self.run.paths.root),
            teacher,
            engine=teacher.engine,
            temperature=config.temperature,
            max_topk=config.topk.k if config.needs_topk else 0,
            logs=self._logs(role),
            **limits,
        )

    def _logs(self, role: str) -> Path:
        """Folder of the logs of servers that the run starts."""
        return self.run.paths.scratch / f"servers-{self.stage}-{role}"

    def _rollout_engine(
        self, model: Path, config: ModelConfig, *, role: str, engine: EngineName | None = None
    ) -> RolloutEngine:
        return rollout_engine(
            self.run.recipe,
            model,
            config,
            self.tokenizer,
            temperature=self._config.temperature,
            max_prompt_tokens=self._config.max_prompt_tokens,
            max_response_tokens=self._config.max_response_tokens,
            engine=engine,
            logs=self._logs(role),
        )

    def _new_trainer(self) -> Trainer:
        recipe, config = self.run.recipe, self._config
        runtime, student = recipe.runtime, recipe.student
        settings = OptimizerSettings.of(config, seed=recipe.seed)
        spec = None if student.lora is None else _adapter_spec(self.run, self.stage, self.policy, student.lora)
        policy = self.policy if spec is None else spec.base
        if recipe.trainer.engine == "deepspeed":
            return DeepSpeedTrainer(
                policy,
                self.tokenizer,
                settings,
                config=recipe.trainer,
                folder=self.run.paths.scratch / f"ranks-{self.stage}",
                runtime=runtime,
                trust_remote_code=student.trust_remote_code,
                adapter=spec,
            )
        import torch

        # What is frozen has the dtype that engines compute in; what is trained has float32.
        dtype = "float32" if spec is None else runtime.dtype
        model = load_model(policy, dtype=dtype, device=runtime.device, trust_remote_code=student.trust_remote_code)
        return TorchTrainer(
            model,
            self.tokenizer,
            settings,
            adapter=None if spec is None else spec.wrap(model, seed=recipe.seed),
            autocast_dtype=torch.bfloat16 if runtime.dtype == "bfloat16" else None,
            activation_checkpointing=recipe.trainer.activation_checkpointing,
        )


def _adapter_spec(run: Run, stage: str, policy: Path, lora: LoraConfig) -> "AdapterSpec":
    """The adapter that a stage begins with: the one of the stage before, or a new one. `policy` is where it starts."""
    from kdrl_core.models.lora import AdapterSpec

    is_first = initial_checkpoint(run.recipe, stage) is None
    base = prepared_model(run.recipe.student, run.paths.root)
    return AdapterSpec(config=lora, base=base, initial=None if is_first else policy)
