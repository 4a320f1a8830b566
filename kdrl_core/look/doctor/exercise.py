"""What a step of a run does, done for real by the code of a run (`StageSession`), each part as a check with its time.

The order is a step's: the engine starts, the trainer starts beside it, weights are synced, responses sampled; the
engine sleeps, the teacher scores, sleeps; answers are verified; two updates; the engine wakes with the new weights.
Then a checkpoint is saved and loaded, and the student exported.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from kdrl_core.boxes.builders import Builders, SyncedEngine
from kdrl_core.boxes.session import StageSession
from kdrl_core.data import render_prompts, think_opened
from kdrl_core.engines.protocols import TeacherScorer
from kdrl_core.ledger import publish_directory
from kdrl_core.look.doctor.checks import CheckFailed, NotApplicable, Observed, Recorder
from kdrl_core.look.doctor.machine import MIB, gpu_memory_used, size_words
from kdrl_core.models.tokenizer import num_token_ids
from kdrl_core.sampling.responses import requests_for
from kdrl_core.training.deepspeed_trainer import DeepSpeedTrainer
from kdrl_core.training.protocols import Float32s, StepStats, Trainer, UpdateBatch
from kdrl_core.types import Rollout, RolloutRequest, ScoreRequest

ENGINE, TRAINER, COLLECTIVE = "student's engine starts", "trainer starts", "collective of the ranks"
SYNC, SAMPLING, SLEEP = "weight sync", "sampling", "engine sleeps"
VERIFICATION = "verification"
LONGEST_UPDATE, MIXED_UPDATE = "update, longest rows", "update, mixed rows"
RESYNC, SAVE, LOAD, EXPORT = "sync after the updates", "checkpoint saved", "checkpoint loaded", "student exported"

_SAMPLED_TOKENS = 32
_REQUESTS = 8
_MIXED_ROWS = 6
"""Of each rank in the update with mixed rows."""
_COLLECTIVE_BYTES = {"cpu": 4 * MIB, "cuda": 256 * MIB}
_MEMORY = ("peak_gib", "reserved_gib")
_SAME = 1e-3
"""Nats by which the policy of a loaded checkpoint may differ from the saved one."""
_OLD_WEIGHTS = 0.5
"""Share of an update's move by which engine and trainer are apart if the engine kept its old weights."""

_Built = TypeVar("_Built")


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchedBuilders(Builders):
    """Builders whose every start of a model is a check."""

    recorder: Recorder
    limit_s: float

    def trainer(self) -> Trainer:
        trainer = self._watched(TRAINER, super(WatchedBuilders, self).trainer, self.run.recipe.trainer.engine)
        if isinstance(trainer, DeepSpeedTrainer) and self.run.recipe.trainer.ranks > 1:
            self.recorder.run(COLLECTIVE, partial(self._collective, trainer), limit_s=self.limit_s)
        return trainer

    def sampler(self) -> SyncedEngine:
        return self._watched(ENGINE, super(WatchedBuilders, self).sampler, self.run.recipe.rollout.engine)

    def scorer(self, role: str) -> TeacherScorer:
        engine = self.run.recipe.teacher.engine if role == "teacher" and self.run.recipe.teacher else "as the student's"
        return self._watched(f"{role} starts", partial(super(WatchedBuilders, self).scorer, role), engine)

    def _watched(self, check: str, build: Callable[[], _Built], says: str) -> _Built:
        built: list[_Built] = []

        def work() -> Observed:
            built.append(build())
            return Observed(says=says)

        self.recorder.run(check, work, limit_s=self.limit_s)
        return built[0]

    def _collective(self, trainer: DeepSpeedTrainer) -> Observed:
        num_bytes = _COLLECTIVE_BYTES[self.run.recipe.runtime.device]
        seconds = trainer.collective_s(num_bytes, timeout_s=self.limit_s)
        speed = num_bytes / seconds
        figures = {"bytes": num_bytes, "seconds": seconds}
        return Observed(
            says=f"{num_bytes / MIB:.0f} MiB over {self.run.recipe.trainer.ranks} ranks, {speed / 1e9:.2f} GB/s",
            figures=figures,
        )


class Exercise:
    """The checks of one stage. `planned_gib` is the plan's peak of an update on one GPU, if there is a plan."""

    def __init__(self, session: StageSession, recorder: Recorder, *, planned_gib: float | None) -> None:
        self._session, self._recorder, self._planned_gib = session, recorder, planned_gib
        self._recipe, self._config = session.run.recipe, session.config
        self._rng = np.random.default_rng(self._recipe.seed)
        questions = [f"{number}+{number}" for number in range(1, 1 + _REQUESTS // 2)]
        prompts = render_prompts(questions, session.tokenizer, self._recipe)
        self._prompt = prompts[0][0]
        limit = self._config.max_prompt_tokens
        self._requests: list[RolloutRequest] = requests_for(
            {str(number): ids[-limit:] for number, (_, ids) in enumerate(prompts)}, 2, self._recipe.seed, "doctor"
        )
        ranks = self._recipe.trainer.ranks
        self._longest = self._rows([self._config.max_response_tokens] * (ranks + ranks % 2 if ranks > 1 else 2))
        shares = np.linspace(0.05, 0.5, _MIXED_ROWS * max(2, ranks))
        self._mixed = self._rows([max(1, int(share * self._config.max_response_tokens)) for share in shares])
        self._rollouts: list[Rollout] = []
        self._before: list[Float32s] = []
        self._signals: dict[str, list[Any]] = {}
        self._steps = 0
        """Updates done so far."""
        self._failed_update: str | None = None

    def run(self, *, limit_s: float) -> None:
        """All checks, in the order of a step."""
        check = partial(self._recorder.run, limit_s=limit_s)
        check(SYNC, partial(self._sync, 0))
        check(SAMPLING, self._sample, needs=[SYNC])
        check(SLEEP, self._rest, needs=[SYNC])
        roles = [
            *(["teacher"] if self._config.scores_teacher else []),
            *(["reference"] if self._config.ref_beta > 0 else []),
        ]
        for role in roles:
            check(f"{role} scores", partial(self._score, role))
            check(f"{role} sleeps", self._rest, needs=[f"{role} scores"])
        check(VERIFICATION, self._verify)
        scored = [SYNC, *(f"{role} scores" for role in roles)]
        check(LONGEST_UPDATE, partial(self._update, self._longest), needs=scored)
        check(MIXED_UPDATE, partial(self._update, self._mixed), needs=[LONGEST_UPDATE])
        check(RESYNC, self._resync, needs=[SAMPLING, MIXED_UPDATE])
        folder = self._session.run.paths.scratch / "doctor"
        check(SAVE, partial(self._save, folder / "checkpoint"), needs=[SYNC])
        check(LOAD, partial(self._load, folder / "checkpoint"), needs=[SAVE, SAMPLING])
        check(EXPORT, partial(self._export, folder / "student"), needs=[SYNC])

    def _rows(self, lengths: Sequence[int]) -> list[ScoreRequest]:
        """Responses of random tokens, each to a prompt of random tokens as long as a prompt may be."""
        size = num_token_ids(self._session.tokenizer)
        prompt = self._config.max_prompt_tokens

        def random(count: int) -> list[int]:
            return self._rng.integers(0, size, count).tolist()

        return [ScoreRequest(prompt_token_ids=random(prompt), token_ids=random(length)) for length in lengths]

    @property
    def _trainer(self) -> Trainer:
        """The trainer at its step. Raises NotApplicable once an update has failed: its ranks have ended."""
        if self._failed_update is not None:
            raise NotApplicable(f"needs: {self._failed_update}")
        return self._session.trainer_at(self._steps)

    # --- engine -------------------------------------------------------------------------------------------------------

    def _sync(self, step: int) -> Observed:
        sampler = self._session.sampler_at(step, self._requests)
        if sampler.sync is None:
            return Observed(says=f"{self._recipe.rollout.engine} loads weights without a probe")
        figures = asdict(sampler.sync)
        if sampler.sync.rebuilt:
            raise CheckFailed(
                "a stale engine: it did not hold the weights that it was given until it was started anew",
                "every step would cost a restart: compare the engine's version with its pin; report this with --json",
                **figures,
            )
        digests = ", the digests of their weights are equal" if figures.get("digest") else ""
        says = f"engine and trainer {sampler.sync.gap_mean:.2g} nats apart in the mean{digests}"
        return Observed(says=says, figures=figures)

    def _sample(self) -> Observed:
        engine = self._session.sampler_at(0, self._requests).engine
        self._rollouts = engine.generate(self._requests, max_response_tokens=_SAMPLED_TOKENS)
        tokens = sum(len(rollout.token_ids) for rollout in self._rollouts)
        self._before = self._trainer.score(self._sampled())
        gap = self._gap(self._before)
        self._refuse_gap(gap, moved=None)
        figures = {"responses": len(self._rollouts), "tokens": tokens, "gap_mean": gap}
        says = f"{len(self._rollouts)} responses, {tokens} tokens; engine and trainer {gap:.2g} nats apart"
        return Observed(says=says, figures=figures)

    def _resync(self) -> Observed:
        """The engine gets the weights of the updates, and must have moved with the trainer."""
        told = self._sync(self._steps)
        engine = self._session.sampler_at(self._steps, self._requests).engine
        after = self._trainer.score(self._sampled())
        moved = float(np.mean(np.abs(np.concatenate(after) - np.concatenate(self._before))))
        self._rollouts = engine.generate(self._requests, max_response_tokens=_SAMPLED_TOKENS)
        self._before = self._trainer.score(self._sampled())
        gap = self._gap(self._before)
        self._refuse_gap(gap, moved=moved)
        says = f"the updates moved logprobs by {moved:.2g} nats; engine and trainer are {gap:.2g} apart"
        return Observed(says=says, figures={**told.figures, "moved": moved, "gap_mean": gap})

    def _sampled(self) -> list[ScoreRequest]:
        return [ScoreRequest(prompt_token_ids=r.prompt_token_ids, token_ids=r.token_ids) for r in self._rollouts]

    def _gap(self, ours: Sequence[Float32s]) -> float:
        """Mean absolute difference of the engine's logprobs and the trainer's."""
        theirs = np.concatenate([np.asarray(rollout.logprobs, np.float32) for rollout in self._rollouts])
        return float(np.mean(np.abs(theirs - np.concatenate(ours))))

    def _refuse_gap(self, gap: float, *, moved: float | None) -> None:
        if gap <= self._recipe.rollout.sync_tolerance and (moved is None or gap < max(_OLD_WEIGHTS * moved, _SAME)):
            return
        figures = {"gap_mean": gap, "moved": moved}
        if moved is not None and gap >= _OLD_WEIGHTS * moved:
            raise CheckFailed(
                f"a stale engine: it samples {gap:.2g} nats from the trainer, and the updates moved the trainer by "
                f"{moved:.2g}, so the engine kept its old weights",
                "rollouts would be off-policy: compare the engine's version with its pin, and report this with --json",
                **figures,
            )
        raise CheckFailed(
            f"engine and trainer are {gap:.2g} nats apart, rollout.sync_tolerance is "
            f"{self._recipe.rollout.sync_tolerance:g}",
            "they have to agree in model, dtype and temperature; report this with --json",
            **figures,
        )

    def _rest(self) -> Observed:
        """All engines sleep; on GPUs, how much memory that gives back."""
        is_cuda = self._recipe.runtime.device == "cuda"
        before = gpu_memory_used() if is_cuda else []
        self._session.rest()
        after = gpu_memory_used() if is_cuda else []
        if not self._recipe.vllm.sleep:
            return Observed(says="vllm.sleep=false: memory stays taken")
        if not before or len(before) != len(after):
            return Observed(says="memory is given back, where the engine can")
        freed = max(was - now for was, now in zip(before, after, strict=True))
        says = f"{freed:.1f} GiB given back on one GPU, at most {max(after):.1f} still in use"
        return Observed(says=says, figures={"used_gib_before": before, "used_gib_after": after})

    # --- scores and verdicts ------------------------------------------------------------------------------------------

    def _score(self, role: str) -> Observed:
        """Scores of all rows of both updates."""
        rows = [*self._longest, *self._mixed]
        scorer = self._session.scorer(role)
        topk = self._config.topk.k if role == "teacher" and self._config.needs_topk else 0
        if topk:
            found = scorer.score_topk(rows, topk)
            self._signals |= {name: [getattr(one, name) for one in found] for name in ("topk_ids", "topk_logprobs")}
            logprobs = [one.logprobs for one in found]
        else:
            logprobs = scorer.score(rows)
        self._signals["teacher_logprobs" if role == "teacher" else "ref_logprobs"] = logprobs
        if not np.isfinite(flat := np.concatenate(logprobs)).all() or flat.max() > _SAME:
            raise CheckFailed("the scores are no logprobs: some are not finite, or above 0", "report this with --json")
        tokens = sum(len(row.prompt_token_ids) + len(row.token_ids) for row in rows)
        says = f"{len(rows)} rows, {tokens:,} tokens, the longest {self._context:,}"
        return Observed(says=says, figures={"rows": len(rows), "tokens": tokens, "longest": self._context})

    @property
    def _context(self) -> int:
        return self._config.max_prompt_tokens + self._config.max_response_tokens

    def _verify(self) -> Observed:
        """A right answer that only math-verify finds right, and a wrong one."""
        opened = think_opened(self._prompt, self._recipe)
        thought = {True: "so</think>", False: "<think>so</think>", "closed": ""}[opened]
        items = [(f"{thought}\\boxed{{{answer}}}", r"\frac{4}{2}") for answer in ("2", "3")]
        options = self._session.verdict_options(self._prompt)
        verdicts = self._session.verifier.verify_batch(items, **options)
        if [verdict.accuracy_reward for verdict in verdicts] != [1.0, 0.0]:
            reasons = "; ".join(verdict.reason for verdict in verdicts)
            raise CheckFailed(
                f"a right answer and a wrong one were judged: {reasons}",
                "raise verification.timeout_s or verification.memory_limit_mb; compare math-verify with its pin",
            )
        return Observed(says=f"{self._recipe.verification.workers} workers judge right and wrong")

    # --- trainer ------------------------------------------------------------------------------------------------------

    def _update(self, rows: Sequence[ScoreRequest]) -> Observed:
        self._session.rest()
        first = 0 if rows is self._longest else len(self._longest)
        signals = {name: values[first : first + len(rows)] for name, values in self._signals.items()}
        objective = self._config.objective_at(self._steps)
        if objective.tis_cap is not None:
            signals["rollout_logprobs"] = [np.full(len(row.token_ids), -1.0, np.float32) for row in rows]
        batch = UpdateBatch(
            sequences=rows,
            objective=objective,
            advantages=[1.0 if row % 2 else -1.0 for row in range(len(rows))],
            kd_weights=[1.0] * len(rows),
            **signals,
        )
        trainer = self._trainer
        try:
            stats = trainer.update(batch)
        except Exception:
            self._failed_update = LONGEST_UPDATE if rows is self._longest else MIXED_UPDATE
            raise
        self._steps += 1
        tokens = sum(len(row.prompt_token_ids) + len(row.token_ids) for row in rows)
        longest = max(len(row.prompt_token_ids) + len(row.token_ids) for row in rows)
        memory = self._memory(stats)
        figures = {"rows": len(rows), "tokens": tokens, "longest": longest, **memory}
        shown = f", {_memory_words(memory)}" if memory else ""
        return Observed(says=f"{len(rows)} rows, {tokens:,} tokens, the longest {longest:,}{shown}", figures=figures)

    def _memory(self, stats: StepStats) -> dict[str, float]:
        """GiB of the largest rank, where the trainer measures them (CUDA), and as planned."""
        found = {name: stats.metrics[f"memory/{name}"] for name in _MEMORY if f"memory/{name}" in stats.metrics}
        return {**found, "plan_gib": self._planned_gib} if found and self._planned_gib else found

    def _save(self, folder: Path) -> Observed:
        manifest = publish_directory(folder, self._trainer.save)
        return _written(manifest.size, "written, hashed and synced to the disk")

    def _load(self, folder: Path) -> Observed:
        """The policy of the saved checkpoint, loaded again, gives the same logprobs."""
        before = np.concatenate(self._trainer.score(self._sampled()))
        self._trainer.load(folder)
        gap = float(np.mean(np.abs(np.concatenate(self._trainer.score(self._sampled())) - before)))
        if not gap <= _SAME:
            raise CheckFailed(
                f"the loaded checkpoint gives logprobs {gap:.2g} nats from those before it was saved",
                "a resumed run would go on with another policy: report this with --json",
                gap_mean=gap,
            )
        return Observed(says=f"the same policy, {gap:.2g} nats apart", figures={"gap_mean": gap})

    def _export(self, folder: Path) -> Observed:
        return _written(publish_directory(folder, self._trainer.export_hf).size, "for engines")


def _memory_words(memory: dict[str, float]) -> str:
    words = ", ".join(f"{name.removesuffix('_gib')} {value:.1f}" for name, value in memory.items())
    return f"GiB a GPU: {words}"


def _written(size: int, what: str) -> Observed:
    return Observed(says=f"{size_words(size)} {what}", figures={"bytes": size})
