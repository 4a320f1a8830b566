"""What a stage keeps in memory between steps: pool, trainer, engines, scorers, verifier. One per process and stage.

Tasks pass paths and numbers; the models they need are found here, so nothing is reloaded per step. The state in memory
always follows from the files: `trainer_at` restores the latest checkpoint, and the updates since are replayed from
their published rollouts.
"""

import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from kdrl_core.boxes.builders import Builders, SyncedEngine, intact_initial_policy
from kdrl_core.config import StageConfig
from kdrl_core.config.outside import code_sources
from kdrl_core.data import think_opened
from kdrl_core.engines.http_scorer import HTTPScorer
from kdrl_core.engines.protocols import RolloutEngine, TeacherScorer
from kdrl_core.engines.sync import RebuildableEngine, sync_weights
from kdrl_core.errors import RunError
from kdrl_core.ledger import Run, holds_lock, is_published, note, open_run_dir, settle_outside, verify_published
from kdrl_core.models.loading import load_tokenizer
from kdrl_core.objectives.plugins import expect_code
from kdrl_core.tables.files import read_table
from kdrl_core.training.protocols import Trainer
from kdrl_core.types import Rollout, RolloutRequest, ScoreRequest
from kdrl_core.verify import VerdictOptions, Verifier

_logger = logging.getLogger("kdrl")


class StageSession:
    """The models of one stage of one run, made when first needed by `builders`.

    Raises:
        RunError: models, data or code outside of the run are not those that it began with.
    """

    def __init__(self, run: Run, stage: str, builders: Callable[..., Builders] = Builders) -> None:
        import torch

        self.run = run
        self.stage = stage
        self.config: StageConfig = run.recipe.stage(stage)
        self._lock = threading.RLock()
        self._trainer: Trainer | None = None
        self._save: Callable[[], object] | None = None
        self._sampler: SyncedEngine | None = None
        self._teacher_engine: RolloutEngine | None = None
        self._dataset: pa.Table | None = None
        self._scorers: dict[str, TeacherScorer] = {}
        self._verifier: Verifier | None = None
        self.judge: Any = None
        """The `Judge` of a recipe with `reward.functions`, once `boxes.judging` has made it."""
        self._pool: dict[str, dict[str, Any]] | None = None
        self._verdict_options: VerdictOptions | None = None
        self.alarm_rules = run.recipe.alarm_rules
        self.code = code_sources(settle_outside(run), run.recipe)
        expect_code(self.code)
        torch.set_num_threads(run.recipe.runtime.num_threads)
        policy = intact_initial_policy(run, stage)
        self.tokenizer = load_tokenizer(
            policy,
            chat_template=run.recipe.student.chat_template,
            trust_remote_code=run.recipe.student.trust_remote_code,
        )
        self._builders = builders(run=run, stage=stage, policy=policy, tokenizer=self.tokenizer)

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
        """The trainer, holding the policy after `step` updates; that policy is saved first if it is to be.

        Raises:
            RunError: memory and files are at different steps, so training would use another policy's rollouts.
        """
        self.finish_saving()
        return self.idle_trainer_at(step)

    def idle_trainer_at(self, step: int) -> Trainer:
        """`trainer_at` for commands that do not change the policy, which may still have to be saved."""
        with self._lock:
            if self._trainer is None:
                self._trainer = self._builders.trainer()
            found, part = divmod(self._trainer.step, self.config.updates_per_step)
            if (found, part) != (step, 0):
                within = f" after {part} of its {self.config.updates_per_step} optimiser steps" if part else ""
                raise RunError(
                    f"{self.stage} is at step {found}{within}, but step {step} was asked for; "
                    f"resume the run with: kdrl resume {self.run.name}"
                )
            return self._trainer

    @property
    def trainer_saves_aside(self) -> bool:
        """Whether the trainer can save beside other work of this process."""
        return self._trainer is not None and self._trainer.saves_aside

    def save_later(self, save: Callable[[], object]) -> None:
        """Note what saves the policy. It is done inside of `saving`, or by `finish_saving`."""
        self._save = save

    def finish_saving(self) -> None:
        """Save the policy now if it is still to be saved."""
        save, self._save = self._save, None
        if save is not None:
            save()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Save the policy, if it is to be saved, in a thread beside the work inside; it is saved when the context ends,
        also by an error. An interrupt does not wait for it: the trainer is closed, and nothing is published.

        Raises:
            the errors of the save, unless the work inside has failed.
        """
        if self._save is None:
            yield
            return
        with ThreadPoolExecutor(1, "kdrl-save") as thread:
            saved = thread.submit(self.finish_saving)
            try:
                yield
            except Exception:
                if (error := saved.exception()) is not None:
                    _logger.warning("the checkpoint could not be saved: %s", error)
                raise
            except BaseException:
                if self._trainer is not None:
                    self._trainer.close()
                raise
            saved.result()

    def sampler_at(self, step: int, requests: Sequence[RolloutRequest]) -> SyncedEngine:
        """The rollout engine with the weights of the policy after `step` updates.

        An engine with its own copy of the weights is synced, then tested on the first of the step's `requests`.

        Raises:
            EngineError: it cannot be started, or does not sample with the trainer's probabilities.
        """
        with self._lock:
            if self._sampler is None:
                self._check_servers()
                self.rest()
                self._sampler = self._builders.sampler()
            engine, sync = self._sampler.engine, None
            self.rest(but=engine)
            if self._sampler.version != step:
                if self._trainer is None:
                    engine.sleep()  # an engine that is awake may leave too little of a GPU for a trainer's start
                weights = self._weights_at(step)
                if self.run.recipe.rollout.engine == "transformers":
                    engine.load_weights(weights)
                else:
                    sync = sync_weights(
                        cast(RebuildableEngine, engine),
                        weights,
                        requests[: self._builders.num_probes],
                        self.idle_trainer_at(step).score,
                        tolerance=self.run.recipe.rollout.sync_tolerance,
                        dtype=self.run.recipe.runtime.dtype,
                    )
                self._sampler = SyncedEngine(engine=engine, version=step, sync=sync)
            return self._sampler

    def scorer(self, role: str) -> TeacherScorer:
        """The frozen model of a role, `teacher` or `reference`. Raises EngineError as `Builders.scorer` does."""
        with self._lock:
            self.rest(but=self._scorers.get(role))
            if role not in self._scorers:
                scorer = self._scorers[role] = self._frozen_policy(role) or self._builders.scorer(role)
                if isinstance(scorer, HTTPScorer) and scorer.says:
                    self._note_served(scorer.says)
            return self._scorers[role]

    def _frozen_policy(self, role: str) -> TeacherScorer | None:
        """The trainer as scorer of a role whose model is its own without the adapter of now; else None."""
        recipe = self.run.recipe
        if not recipe.trainer_scores(role):
            return None
        from kdrl_core.boxes.frozen_policy import FrozenPolicy

        self._trainer = self._trainer or self._builders.trainer()
        tokens = recipe.runtime.score_batch_tokens if recipe.trainer.engine == "torch" else None
        return FrozenPolicy(self._trainer, "none" if role == "teacher" else "initial", batch_tokens=tokens)

    def _note_served(self, says: dict[str, Any]) -> None:
        """Record what the teacher's servers say of their model, whose weights kdrl does not see."""
        before = note(self.run, "served_teacher", says)
        if before not in (None, says):
            _logger.warning("the teacher's servers now say of their model: %s; earlier in this run: %s", says, before)

    def rest(self, *, but: RolloutEngine | TeacherScorer | None = None) -> None:
        """Have all engines but one free the memory that they can, since the next phase may need it."""
        with self._lock:
            for engine in self._engines():
                if engine is not but:
                    engine.sleep()

    def _engines(self) -> list[RolloutEngine | TeacherScorer]:
        student = self._sampler.engine if self._sampler else None
        return [one for one in (student, self._teacher_engine, *self._scorers.values()) if one is not None]

    def _check_servers(self) -> None:
        """Raise EngineError if a served teacher cannot score, before responses are sampled for it."""
        teacher = self.run.recipe.teacher
        if self.config.scores_teacher and teacher is not None and teacher.server is not None:
            self.scorer("teacher")

    @property
    def teacher_engine(self) -> RolloutEngine:
        """The teacher as a sampler, for SFT."""
        with self._lock:
            if self._teacher_engine is None:
                self._teacher_engine = self._builders.teacher_engine()
            return self._teacher_engine

    @property
    def sft_dataset(self) -> pa.Table:
        """The stage's kept teacher responses. Closes the teacher, which is no longer needed.

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
        """Let the verifier and the teacher's servers start on responses to problems of the pool."""
        if not rollouts:
            return
        scorer = self._scorers.get("teacher")
        if isinstance(scorer, HTTPScorer) and not scorer.sleeps and self.config.scores_teacher:
            asked = [ScoreRequest(prompt_token_ids=r.prompt_token_ids, token_ids=r.token_ids) for r in rollouts]
            scorer.score_ahead(asked, self.config.topk.k if self.config.needs_topk else 0)
        if not self.run.recipe.reward.uses_math:
            return
        problems = [self.pool[rollout.prompt_id] for rollout in rollouts]
        self.verifier.verify_ahead(
            [(rollout.text, problem["answer"]) for rollout, problem in zip(rollouts, problems, strict=True)],
            **self.verdict_options(problems[0]["prompt"]),
        )

    def verdict_options(self, prompt: str) -> VerdictOptions:
        """Keyword arguments of `Verifier.verify_batch` for responses to prompts that end like this one."""
        if self._verdict_options is None:  # the chat template ends every prompt in the same way
            recipe = self.run.recipe
            options = {**recipe.reward.of_verdicts, "think_opened": think_opened(prompt, recipe)}
            self._verdict_options = cast(VerdictOptions, options)
        return self._verdict_options

    def close(self) -> None:
        """Close models and processes. A policy that is still to be saved is saved first, if this process still holds
        the run's lock; otherwise a resume makes its update again."""
        with self._lock:
            if holds_lock(self.run.paths.root):
                try:
                    self.finish_saving()
                except Exception as error:
                    _logger.warning("the checkpoint could not be saved: %s", error)
            self._save = None
            for judging in (self.judge, self._verifier):
                if judging is not None:
                    judging.close()
            if self._trainer is not None:
                self._trainer.close()
            for engine in self._engines():
                engine.close()
            self.judge = self._verifier = self._trainer = self._sampler = self._teacher_engine = self._dataset = None
            self._scorers.clear()
        shutil.rmtree(self.run.paths.scratch, ignore_errors=True)

    def _weights_at(self, step: int) -> Path:
        """Model directory for the rollout engine: the stage's initial policy, a checkpoint, or an export in the dtype
        that engines compute in: in bfloat16 half of a checkpoint's weights to write, and to load for each engine."""
        if step == 0:
            return self._builders.policy
        trainer = self.idle_trainer_at(step)  # restoring it verifies the checkpoint: none is sampled from if damaged
        dtype, engine = self.run.recipe.runtime.dtype, self.run.recipe.rollout.engine
        checkpoint = self.run.paths.checkpoint(self.stage, step)
        is_model = (checkpoint / "config.json").is_file()  # or else an adapter alone
        if (dtype == "float32" or engine == "transformers") and is_model and is_published(checkpoint):
            return checkpoint
        for old in self.run.paths.scratch.glob("policy-*"):
            shutil.rmtree(old, ignore_errors=True)
        # A folder per policy: replicas name the weights that they have by their folder.
        scratch = self.run.paths.scratch / f"policy-{self.stage}-{step:06d}"
        scratch.mkdir(parents=True)
        trainer.export_hf(scratch, dtype)
        return scratch


_sessions: dict[tuple[Path, str], StageSession] = {}
_sessions_lock = threading.RLock()


def stage_session(run_dir: str | Path, stage: str) -> StageSession:
    """The process's session of a stage; sessions of other stages and runs are closed, so models do not pile up."""
    key = (Path(run_dir), stage)
    with _sessions_lock:
        if key not in _sessions:
            close_sessions()
            _sessions[key] = StageSession(open_run_dir(run_dir), stage)
        return _sessions[key]


def rest_sessions() -> None:
    """Have the engines of every session of the process free the memory that they can."""
    with _sessions_lock:
        for session in _sessions.values():
            session.rest()


def close_sessions() -> None:
    """Close every session of the process: before a run is opened again, and at its end."""
    with _sessions_lock:
        for session in _sessions.values():
            session.close()
        _sessions.clear()
