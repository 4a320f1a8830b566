"""What a stage keeps in memory between steps: pool, trainer, engines, scorers, verifier. One per process and stage.

Tasks pass paths and numbers; the models they need are found here, so nothing is reloaded per step. What is in memory is
always a function of the files: `policy_for(step)` restores the latest checkpoint, and the updates since are replayed
from their published rollouts.
"""

import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import pyarrow as pa
import pyarrow.compute as pc

from kdrl_core.boxes.checkpoints import latest_checkpoint
from kdrl_core.config import ModelConfig, StageConfig
from kdrl_core.data import think_opened
from kdrl_core.engines.from_recipe import EngineName, local_scorer, rollout_engine
from kdrl_core.engines.http_scorer import HTTPScorer
from kdrl_core.engines.protocols import RolloutEngine, TeacherScorer
from kdrl_core.engines.server_pool import served_model
from kdrl_core.engines.sync import PROBE_RESPONSES, RebuildableEngine, SyncReport, sync_weights
from kdrl_core.errors import RunError
from kdrl_core.ledger import Run, is_published, open_run_dir, verify_own, verify_published
from kdrl_core.models.loading import load_model, load_tokenizer
from kdrl_core.models.prepare import prepared_model
from kdrl_core.tables.schemas import read_table
from kdrl_core.training.deepspeed_trainer import DeepSpeedTrainer
from kdrl_core.training.protocols import OptimizerSettings, Trainer
from kdrl_core.training.torch_trainer import TorchTrainer
from kdrl_core.types import Rollout, RolloutRequest, ScoreRequest
from kdrl_core.verify import VerdictOptions, Verifier


class StageSession:
    """The models of one stage of one run, made when first needed."""

    def __init__(self, run: Run, stage: str) -> None:
        import torch

        self.run = run
        self.stage = stage
        self.config: StageConfig = run.recipe.stage(stage)
        self._lock = threading.RLock()
        self._trainer: Trainer | None = None
        self._engine: RolloutEngine | None = None
        self._engine_version = -1
        self.last_sync: SyncReport | None = None
        self._teacher_engine: RolloutEngine | None = None
        self._dataset: pa.Table | None = None
        self._scorers: dict[str, TeacherScorer] = {}
        self._verifier: Verifier | None = None
        self._pool: dict[str, dict[str, Any]] | None = None
        torch.set_num_threads(run.recipe.runtime.num_threads)
        self._check_initial_policy()
        self.tokenizer = load_tokenizer(
            self.initial_policy,
            chat_template=run.recipe.student.chat_template,
            trust_remote_code=run.recipe.student.trust_remote_code,
        )

    @property
    def initial_policy(self) -> Path:
        """Model directory that the stage starts from: the recipe's student, or what stage 1 made of it."""
        return initial_policy(self.run, self.stage)

    def _check_initial_policy(self) -> None:
        """Raise DamagedArtifactError if a published model that the stage starts from was altered, or is another than
        the one that its first step was sampled from."""
        path, run = self.initial_policy, self.run
        if path.is_relative_to(run.paths.root):
            verify_own(run, path)
        elif is_published(path):
            verify_published(path)

    @property
    def pool(self) -> dict[str, dict[str, Any]]:
        """The stage's problems by id. Raises DamagedArtifactError if the published pool was altered."""
        with self._lock:
            if self._pool is None:
                verify_published(self.run.paths.pool)
                table = read_table(self.run.paths.pool)
                rows = table.filter(pc.equal(table["stage"], self.stage)).to_pylist()
                self._pool = {row["problem_id"]: row for row in rows}
            return self._pool

    def trainer_at(self, step: int) -> Trainer:
        """The trainer, holding the policy after `step` updates.

        Raises:
            RunError: memory and files are at different steps, so going on would train on foreign rollouts.
        """
        with self._lock:
            if self._trainer is None:
                self._trainer = self._restore_trainer()
            if self._trainer.step != step:
                raise RunError(
                    f"{self.stage} is at step {self._trainer.step}, but step {step} was asked for; "
                    f"resume the run with: kdrl resume {self.run.name}"
                )
            return self._trainer

    def engine_at(self, step: int, requests: Sequence[RolloutRequest]) -> RolloutEngine:
        """The rollout engine with the weights of the policy after `step` updates.

        An engine that has weights of its own is synced and proved on the first of the step's `requests`; what that
        showed is `last_sync`.

        Raises:
            EngineError: it cannot be started, or does not sample with the trainer's probabilities.
        """
        with self._lock:
            if self._engine is None:
                self._check_servers()
            self.rest(but=self._engine)
            if self._engine is None:
                self._engine = self._rollout_engine(self.initial_policy, self.run.recipe.student)
                self._engine_version = 0 if self.run.recipe.rollout.engine == "transformers" else -1
            if self._engine_version != step:
                weights = self._weights_at(step)
                if self.run.recipe.rollout.engine == "transformers":
                    self._engine.load_weights(weights)
                else:
                    self.last_sync = sync_weights(
                        cast(RebuildableEngine, self._engine),
                        weights,
                        requests[: self._num_probes],
                        self.trainer_at(step).score,
                        tolerance=self.run.recipe.rollout.sync_tolerance,
                    )
                self._engine_version = step
            return self._engine

    @property
    def _num_probes(self) -> int:
        """Responses that prove a weight sync: one of each replica at least."""
        server = self.run.recipe.rollout.server
        return max(PROBE_RESPONSES, len(server.urls) if server is not None else 0)

    def scorer(self, role: str) -> TeacherScorer:
        """The frozen model of a role, `teacher` or `reference`, at the student's temperature.

        Raises:
            EngineError: the teacher is served, and its servers do not answer, or serve something else.
        """
        with self._lock:
            self.rest(but=self._scorers.get(role))
            if role not in self._scorers:
                teacher = self.run.recipe.teacher
                if role == "teacher" and teacher is not None and teacher.server is not None:
                    self._scorers[role] = HTTPScorer(
                        served_model(teacher.server),
                        num_tokens=len(self.tokenizer),
                        max_tokens=self._max_tokens,
                    )
                else:
                    self._scorers[role] = self._local_scorer(role)
            return self._scorers[role]

    def rest(self, *, but: RolloutEngine | TeacherScorer | None = None) -> None:
        """Have all engines but one give back what memory they can: what works next may need it."""
        with self._lock:
            for engine in (self._engine, self._teacher_engine, *self._scorers.values()):
                if engine is not None and engine is not but:
                    engine.sleep()

    def _check_servers(self) -> None:
        """Raise EngineError if a served teacher cannot score: before responses are sampled for it."""
        teacher = self.run.recipe.teacher
        if self.config.scores_teacher and teacher is not None and teacher.server is not None:
            self.scorer("teacher")

    @property
    def _max_tokens(self) -> int:
        """Of the longest prompt and response together."""
        return self.config.max_prompt_tokens + self.config.max_response_tokens

    def _local_scorer(self, role: str) -> TeacherScorer:
        recipe = self.run.recipe
        limits = {"max_tokens": self._max_tokens, "num_tokens": len(self.tokenizer)}
        if role == "reference":
            engine: Literal["transformers", "vllm"] = "vllm" if recipe.rollout.engine == "vllm" else "transformers"
            return local_scorer(
                recipe,
                self.initial_policy,
                recipe.student,
                engine=engine,
                temperature=self.config.temperature,
                **limits,
            )
        assert recipe.teacher is not None  # the recipe was validated
        return local_scorer(
            recipe,
            prepared_model(recipe.teacher, self.run.paths.root),
            recipe.teacher,
            engine=recipe.teacher.engine,
            temperature=self.config.temperature,
            max_topk=self.config.topk.k if self.config.needs_topk else 0,
            **limits,
        )

    @property
    def teacher_engine(self) -> RolloutEngine:
        """The teacher as a sampler, for SFT, at the stage's temperature and response limit."""
        with self._lock:
            if self._teacher_engine is None:
                teacher = self.run.recipe.teacher
                assert teacher is not None  # the recipe was validated
                model = prepared_model(teacher, self.run.paths.root)
                self._teacher_engine = self._rollout_engine(model, teacher, engine=teacher.engine)
            return self._teacher_engine

    @property
    def sft_dataset(self) -> pa.Table:
        """The stage's kept teacher responses; the teacher is let go of, since it has done its work.

        Raises DamagedArtifactError if the published dataset was altered.
        """
        with self._lock:
            if self._dataset is None:
                if self._teacher_engine is not None:
                    self._teacher_engine.close()
                self._teacher_engine = None
                path = self.run.paths.sft_dataset(self.stage)
                verify_published(path)
                self._dataset = read_table(path)
            return self._dataset

    @property
    def verifier(self) -> Verifier:
        """The verifier's pool of processes, started once per stage."""
        with self._lock:
            if self._verifier is None:
                self._verifier = Verifier(**self.run.recipe.verification.pool_options)
            return self._verifier

    def work_ahead(self, rollouts: Sequence[Rollout]) -> None:
        """Let the verifier, and servers of the teacher, begin with responses to problems of the pool."""
        if not rollouts:
            return
        scorer = self._scorers.get("teacher")
        if isinstance(scorer, HTTPScorer) and not scorer.sleeps and self.config.scores_teacher:
            asked = [ScoreRequest(prompt_token_ids=r.prompt_token_ids, token_ids=r.token_ids) for r in rollouts]
            scorer.score_ahead(asked, self.config.topk.k if self.config.needs_topk else 0)
        problems = [self.pool[rollout.prompt_id] for rollout in rollouts]
        self.verifier.verify_ahead(
            [(rollout.text, problem["answer"]) for rollout, problem in zip(rollouts, problems, strict=True)],
            **self.verdict_options(problems[0]["prompt"]),
        )

    def verdict_options(self, prompt: str) -> VerdictOptions:
        """Keyword arguments of `Verifier.verify_batch` for responses to prompts that end like this one."""
        recipe = self.run.recipe
        return {"require_format": recipe.reward.require_format, "think_opened": think_opened(prompt, recipe)}

    def close(self) -> None:
        """Let go of models and processes."""
        with self._lock:
            if self._verifier is not None:
                self._verifier.close()
            for engine in (self._trainer, self._engine, self._teacher_engine, *self._scorers.values()):
                if engine is not None:
                    engine.close()
            self._verifier = self._trainer = self._engine = self._teacher_engine = self._dataset = None
            self._scorers.clear()
        shutil.rmtree(self.run.paths.scratch, ignore_errors=True)

    def _rollout_engine(self, model: Path, config: ModelConfig, *, engine: EngineName | None = None) -> RolloutEngine:
        return rollout_engine(
            self.run.recipe,
            model,
            config,
            self.tokenizer,
            temperature=self.config.temperature,
            max_prompt_tokens=self.config.max_prompt_tokens,
            max_response_tokens=self.config.max_response_tokens,
            engine=engine,
        )

    def _restore_trainer(self) -> Trainer:
        trainer = self._make_trainer()
        if (step := latest_checkpoint(self.run, self.stage)) > 0:
            checkpoint = self.run.paths.checkpoint(self.stage, step)
            try:
                verify_own(self.run, checkpoint)
                trainer.load(checkpoint)
            except BaseException:
                trainer.close()
                raise
        return trainer

    def _make_trainer(self) -> Trainer:
        recipe, config = self.run.recipe, self.config
        runtime, student = recipe.runtime, recipe.student
        settings = OptimizerSettings.of(config, seed=recipe.seed)
        if recipe.trainer.engine == "deepspeed":
            return DeepSpeedTrainer(
                self.initial_policy,
                self.tokenizer,
                settings,
                config=recipe.trainer,
                folder=self.run.paths.scratch / f"ranks-{self.stage}",
                runtime=runtime,
                trust_remote_code=student.trust_remote_code,
            )
        import torch

        model = load_model(self.initial_policy, device=runtime.device, trust_remote_code=student.trust_remote_code)
        return TorchTrainer(
            model,
            self.tokenizer,
            settings,
            autocast_dtype=torch.bfloat16 if runtime.dtype == "bfloat16" else None,
            activation_checkpointing=recipe.trainer.activation_checkpointing,
        )

    def _weights_at(self, step: int) -> Path:
        if step == 0:
            return self.initial_policy
        trainer = self.trainer_at(step)  # restoring it verifies the checkpoint: nothing is sampled from a damaged one
        if is_published(checkpoint := self.run.paths.checkpoint(self.stage, step)):
            return checkpoint
        scratch = self.run.paths.scratch / f"policy-{self.stage}"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        trainer.export_hf(scratch)
        return scratch


def initial_policy(run: Run, stage: str) -> Path:
    """Model directory that `stage` starts from. Raises RunError if the stage before it is not finished."""
    stages = run.recipe.stages
    position = list(stages).index(stage)  # type: ignore[arg-type]
    if position == 0:
        return prepared_model(run.recipe.student, run.paths.root)
    before = stages[position - 1]
    final = run.paths.checkpoint(before, run.recipe.stage(before).steps)
    if not is_published(final):
        raise RunError(
            f"{stage} starts from the result of {before}, which is not finished; run or resume {before} first"
        )
    return final


_sessions: dict[tuple[Path, str], StageSession] = {}
_sessions_lock = threading.Lock()


def stage_session(run_dir: str | Path, stage: str) -> StageSession:
    """The process's session of a stage; sessions of other stages and runs are closed, so models do not pile up."""
    key = (Path(run_dir), stage)
    with _sessions_lock:
        if key not in _sessions:
            _close_all()
            _sessions[key] = StageSession(open_run_dir(run_dir), stage)
        return _sessions[key]


def rest_sessions() -> None:
    """Have the engines of every session of the process give back what memory they can."""
    with _sessions_lock:
        for session in _sessions.values():
            session.rest()


def close_sessions() -> None:
    """Close every session of the process: before a run is opened again, and at its end."""
    with _sessions_lock:
        _close_all()


def _close_all() -> None:
    for session in _sessions.values():
        session.close()
    _sessions.clear()
