"""A model ─▶ evaluate ─▶ evaluations/<model>/<benchmark>/: sample, verify, sum up, in shards that survive a kill.

    artifacts/evaluations/<name>-<id>/<benchmark>-<settings>/       responses.parquet, results.json, lm_eval.json
    artifacts/evaluations/<name>-<id>/<benchmark>-<settings>.work/  its shards, until it is whole

<id> is a hash of the model and <settings> one of all that its responses and verdicts depend on, so that what was
evaluated once is found again, and a stopped evaluation goes on behind its last response.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from kdrl_core.config import BenchmarkConfig
from kdrl_core.engines.from_recipe import rollout_engine
from kdrl_core.errors import DamagedArtifactError, ModelError, RunLockedError
from kdrl_core.evaluation.asked import AskedBenchmark, ask_benchmark, response_limit, response_seed
from kdrl_core.evaluation.endpoint import ChatEndpoint, with_thought_tags
from kdrl_core.evaluation.journal import Journal, seconds_of
from kdrl_core.evaluation.lm_eval import LM_EVAL_RESULTS, lm_eval_results
from kdrl_core.evaluation.outcome import Response, benchmark_result, responses_table
from kdrl_core.evaluation.plan import EvaluationPlan, identity_of, plain_name, refuse_short_context, settings_of
from kdrl_core.evaluation.results import RESULTS, read_results
from kdrl_core.ledger import (
    RunPaths,
    find_intact,
    is_published,
    lock_holder,
    publish_directory,
    publish_file,
    run_lock,
    sweep_temporaries,
    verify_published,
)
from kdrl_core.models.device import check_device
from kdrl_core.models.loading import load_tokenizer, read_config
from kdrl_core.models.prepare import prepared_model
from kdrl_core.tables.schemas import read_table, write_table
from kdrl_core.types import FinishReason, Rollout, RolloutRequest, Verdict
from kdrl_core.verify import Verifier
from kdrl_core.verify.failures import refuse_failures

RESPONSES = "responses.parquet"
_MESSAGE_OVERHEAD_TOKENS = 64
"""What a chat template adds to a message, at most."""

Progress = Callable[[str, int, int], None]
"""Hears the benchmark, the responses done and those in all."""
Sampled = tuple[list[Response], list[Verdict]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedBenchmark:
    """A benchmark's figures and where they lie."""

    name: str
    folder: Path
    result: dict[str, Any]
    """Of `benchmark_result`."""
    seconds: float
    """What sampling and judging took, over all calls."""
    is_new: bool
    """Whether this call made it."""


class _Model(Protocol):
    """What answers the problems of a benchmark."""

    def sample(
        self,
        benchmark: BenchmarkConfig,
        problem_ids: Sequence[str],
        verifier: Verifier,
        on_finished: Callable[[int], None],
        kept: Path,
    ) -> Sampled:
        """Responses, the samples of a problem together, and their verdicts.

        Args:
            on_finished: hears how many there are by now.
            kept: file of the responses that an earlier call had, and that this one has as they come.
        """
        ...

    def close(self) -> None: ...


def evaluate_plan(plan: EvaluationPlan, root: Path, *, on_progress: Progress | None = None) -> list[EvaluatedBenchmark]:
    """Evaluate, or read what was evaluated before, or go on with what was stopped.

    Args:
        root: the artifacts folder.
        on_progress: responses of earlier calls included.

    Raises:
        EngineError: an engine cannot be started, or the endpoint cannot be reached.
        RecipeError: the recipe's device is not there.
        ModelError: model or tokenizer cannot be loaded, or a prompt leaves no room for a response.
        RunLockedError: another process evaluates the same.
        DamagedArtifactError: a shard was altered.
        VerificationError: too many verdicts of a shard are timeouts or errors.
    """
    with ExitStack() as stack:
        path = served = None
        lazily = _Lazily(plan, stack)
        if plan.endpoint is None:
            path = prepared_model(plan.model, RunPaths.of("evaluate").root)
            refuse_short_context(plan.recipe, read_config(path), plan.model.path)
            lazily.path = path
        else:  # one whose name is given need not be there for what was evaluated before
            served = plan.endpoint.model or lazily.endpoint().model
        identity = identity_of(plan, path, served)
        name = plan.name if served is None else plain_name(served.rpartition("/")[2])
        folder = root / "evaluations" / f"{name}-{_short(identity)}"
        return [_one(plan, benchmark, identity, folder, lazily, on_progress) for benchmark in plan.benchmarks]


def combined_lm_eval(found: Sequence[EvaluatedBenchmark]) -> bytes:
    """`lm_eval.json` of several benchmarks of one model as one file."""
    contents = [read_results(each.folder) for each in found]
    settings = contents[0]["settings"]
    dates = [content["date"] for content in contents if "date" in content]
    merged = {
        "model": contents[0]["model"],
        **({"date": min(dates)} if dates else {}),
        "seconds": sum(content["seconds"] for content in contents),
        "benchmarks": {name: result for content in contents for name, result in content["benchmarks"].items()},
    }
    shaped = lm_eval_results(merged, temperature=settings["temperature"], seed=settings["seed"])
    return (json.dumps(shaped, indent=1) + "\n").encode()


def _one(
    plan: EvaluationPlan,
    benchmark: BenchmarkConfig,
    identity: dict[str, str],
    folder: Path,
    lazily: "_Lazily",
    on_progress: Progress | None,
) -> EvaluatedBenchmark:
    settings = {"model": identity, **settings_of(plan, benchmark)}
    target = folder / f"{benchmark.name}-{_short(settings)}"
    inputs = {"settings": _sha256(settings)}
    if _is_intact(target, inputs):
        return _read(benchmark.name, target, is_new=False)
    work = target.with_name(f"{target.name}.work")
    with _hold(work):
        if not find_intact(target, inputs, is_exact=False):  # else made while we waited
            shards = _shards(plan, benchmark, work, inputs, lazily, on_progress)
            _publish(plan, benchmark, target, shards, settings, inputs)
        shutil.rmtree(work, ignore_errors=True)  # whoever waited for it does the same
    return _read(benchmark.name, target, is_new=True)


def _is_intact(target: Path, inputs: dict[str, str]) -> bool:
    """Looked at without the lock; what is damaged is set aside under it."""
    try:
        return is_published(target) and verify_published(target).inputs == inputs
    except DamagedArtifactError:
        return False


def _shards(
    plan: EvaluationPlan,
    benchmark: BenchmarkConfig,
    work: Path,
    inputs: dict[str, str],
    lazily: "_Lazily",
    on_progress: Progress | None,
) -> list[Path]:
    """Sample what is missing. The shards, in order; each tells in its manifest how long it took."""
    problems = plan.problems[benchmark.name]
    size = plan.shard_problems(benchmark)
    total = len(problems) * benchmark.samples
    paths: list[Path] = []
    done = 0

    def tell(more: int) -> None:
        if on_progress is not None:
            on_progress(benchmark.name, done + more, total)

    for index, start in enumerate(range(0, len(problems), size)):
        part = problems[start : start + size]
        target = work / f"shard-{index:05d}.parquet"
        if is_published(target):
            verify_published(target)
        else:
            started = time.perf_counter()
            model, verifier = lazily.loaded()
            kept = work / f"shard-{index:05d}.jsonl"
            before = seconds_of(kept)
            responses, verdicts = model.sample(benchmark, [p.problem_id for p in part], verifier, tell, kept)
            where = f"{benchmark.name}, problems {part[0].problem_id} to {part[-1].problem_id}"
            refuse_failures(verdicts, where, plan.recipe.verification.max_failed_share)
            table = responses_table(benchmark.name, responses, verdicts, part)
            seconds = time.perf_counter() - started + before
            publish_file(target, partial(write_table, table), inputs=inputs, metadata={"seconds": seconds})
            kept.unlink(missing_ok=True)
        paths.append(target)
        done += len(part) * benchmark.samples
        tell(0)
    return paths


def _publish(
    plan: EvaluationPlan,
    benchmark: BenchmarkConfig,
    target: Path,
    shards: Sequence[Path],
    settings: dict[str, Any],
    inputs: dict[str, str],
) -> None:
    table = pa.concat_tables(read_table(shard) for shard in shards)
    recipe = plan.recipe
    sampled = [verify_published(shard) for shard in shards]
    took = [float(manifest.metadata["seconds"]) for manifest in sampled]
    content = {
        "label": target.parent.name.rpartition("-")[0],
        "model": target.parent.name,
        "date": datetime.fromisoformat(sampled[0].created_at).timestamp() - took[0],
        "seconds": sum(took),
        "settings": settings,
        "benchmarks": {benchmark.name: benchmark_result(table, benchmark.samples, seed=recipe.seed)},
    }
    shaped = lm_eval_results(content, temperature=recipe.evaluation.temperature, seed=recipe.seed)

    def write(folder: Path) -> None:
        write_table(table, folder / RESPONSES)
        (folder / RESULTS).write_text(json.dumps(content, indent=1) + "\n")
        (folder / LM_EVAL_RESULTS).write_text(json.dumps(shaped, indent=1) + "\n")

    publish_directory(target, write, inputs=inputs)


def _read(name: str, target: Path, *, is_new: bool) -> EvaluatedBenchmark:
    found = read_results(target)
    return EvaluatedBenchmark(
        name=name, folder=target, result=found["benchmarks"][name], seconds=found["seconds"], is_new=is_new
    )


class _Lazily:
    """The model and the verifier, loaded when the first shard needs them: a second evaluation loads nothing."""

    def __init__(self, plan: EvaluationPlan, stack: ExitStack) -> None:
        self._plan, self._stack = plan, stack
        self._endpoint: ChatEndpoint | None = None
        self._loaded: tuple[_Model, Verifier] | None = None
        self.path: Path | None = None
        """Of the model in a directory."""

    def endpoint(self) -> ChatEndpoint:
        if self._endpoint is None:
            assert self._plan.endpoint is not None
            evaluation = self._plan.recipe.evaluation
            self._endpoint = ChatEndpoint(
                self._plan.endpoint,
                temperature=evaluation.temperature,
                max_context_tokens=evaluation.max_context_tokens,
            )
            self._stack.callback(self._endpoint.close)
        return self._endpoint

    def loaded(self) -> tuple[_Model, Verifier]:
        if self._loaded is None:
            model: _Model
            if self.path is None:
                model = _Served(self._plan, self.endpoint())
            else:
                check_device(self._plan.recipe)
                model = self._stack.enter_context(closing(_Local(self._plan, self.path)))
            verifier = self._stack.enter_context(Verifier(**self._plan.recipe.verification.pool_options))
            self._loaded = model, verifier
        return self._loaded


class _Local:
    """A directory, by the recipe's rollout engine."""

    def __init__(self, plan: EvaluationPlan, path: Path) -> None:
        if is_published(path):
            verify_published(path)
        recipe, model = plan.recipe, plan.model
        tokenizer = load_tokenizer(path, chat_template=model.chat_template, trust_remote_code=model.trust_remote_code)
        context = recipe.evaluation.max_context_tokens
        self._asked: dict[str, AskedBenchmark] = {}
        self._limits: dict[str, int] = {}
        for benchmark in plan.benchmarks:
            asked = ask_benchmark(benchmark, recipe, tokenizer)
            self._asked[benchmark.name] = asked
            self._limits[benchmark.name] = response_limit(context, asked.requests, f"{plan.name}, {benchmark.name}")
        longest = max(self._limits.values())
        import torch

        torch.set_num_threads(recipe.runtime.num_threads)
        self._engine = rollout_engine(
            recipe,
            path,
            model,
            tokenizer,
            temperature=recipe.evaluation.temperature,
            max_prompt_tokens=context - longest,
            max_response_tokens=longest,
        )

    def sample(
        self,
        benchmark: BenchmarkConfig,
        problem_ids: Sequence[str],
        verifier: Verifier,
        on_finished: Callable[[int], None],
        kept: Path,
    ) -> Sampled:
        asked, wanted = self._asked[benchmark.name], set(problem_ids)
        requests = [request for request in asked.requests if request.prompt_id in wanted]
        seeds = {(request.prompt_id, request.sample): request.seed for request in requests}
        truths = {problem.problem_id: problem.answer for problem in asked.problems}
        shard = _Shard(Journal(kept, requests), verifier, truths, asked.think_opened, on_finished)

        def finished(rollouts: Sequence[Rollout]) -> None:
            shard.add([Response.of(rollout, seeds[rollout.prompt_id, rollout.sample]) for rollout in rollouts])

        if missing := shard.journal.missing:
            limit = self._limits[benchmark.name]
            self._engine.generate(missing, on_finished=finished, max_response_tokens=limit)
        return shard.judged()

    def close(self) -> None:
        self._engine.close()


class _Served:
    """An endpoint."""

    def __init__(self, plan: EvaluationPlan, endpoint: ChatEndpoint) -> None:
        self._plan, self._endpoint = plan, endpoint
        context = plan.recipe.evaluation.max_context_tokens
        self._limits = {name: self._limit(name, context) for name in plan.problems}

    def sample(
        self,
        benchmark: BenchmarkConfig,
        problem_ids: Sequence[str],
        verifier: Verifier,
        on_finished: Callable[[int], None],
        kept: Path,
    ) -> Sampled:
        recipe = self._plan.recipe
        problems = {problem.problem_id: problem for problem in self._plan.problems[benchmark.name]}
        requests = [
            RolloutRequest(
                prompt_id=problem_id,
                sample=sample,
                prompt_token_ids=(),
                seed=response_seed(recipe, benchmark.name, problem_id, sample),
            )
            for problem_id in problem_ids
            for sample in range(benchmark.samples)
        ]
        truths = {problem_id: problem.answer for problem_id, problem in problems.items()}
        shard = _Shard(Journal(kept, requests), verifier, truths, False, on_finished, self._with_tags)
        if missing := shard.journal.missing:
            self._endpoint.respond(
                missing,
                {problem_id: self._message(problems[problem_id].question) for problem_id in problem_ids},
                max_response_tokens=self._limits[benchmark.name],
                on_finished=shard.add,
            )
        return shard.judged()

    def _with_tags(self, responses: Sequence[Response]) -> list[Response]:
        """With the `<think>` that the server's template has opened: as the recipe says, or if most of the responses
        that were not cut close it and do not open it."""
        opened = self._plan.recipe.prompt.think_opened
        if opened is None:
            finished = [r.text for r in responses if r.finish_reason is FinishReason.STOP]
            closing = sum("</think>" in text and "<think>" not in text for text in finished)
            opened = 2 * closing > len(finished)
        return [replace(r, text=with_thought_tags(r.text, think_opened=opened)) for r in responses]

    def close(self) -> None:
        """The endpoint is closed by who has opened it."""

    def _message(self, question: str) -> str:
        return self._plan.recipe.prompt.template.replace("{question}", question)

    def _limit(self, benchmark: str, context: int) -> int:
        """What is left of the context behind the longest question: no token of it is shorter than a byte."""
        messages = [self._message(problem.question) for problem in self._plan.problems[benchmark]]
        longest = max(len(message.encode()) for message in messages) + _MESSAGE_OVERHEAD_TOKENS
        if longest >= context:
            raise ModelError(
                f"evaluation on {benchmark}: a question may have {longest} tokens (its tokenizer is the endpoint's, so "
                f"bytes count), the context {context}; raise evaluation.max_context_tokens"
            )
        return context - longest


class _Shard:
    """Responses on their way: kept, counted, and judged while others are still to come."""

    def __init__(
        self,
        journal: Journal,
        verifier: Verifier,
        truths: Mapping[str, str],
        think_opened: bool,
        tell: Callable[[int], None],
        prepare: Callable[[Sequence[Response]], Sequence[Response]] = list,
    ) -> None:
        self.journal = journal
        self._verifier, self._truths, self._think_opened, self._tell = verifier, truths, think_opened, tell
        self._prepare = prepare  # what is judged, by all responses of the shard
        self._tell(len(journal))

    def add(self, responses: Sequence[Response]) -> None:
        self.journal.keep(responses)
        items = self._items(self._prepare(responses))
        self._verifier.verify_ahead(items, require_format=False, think_opened=self._think_opened)
        self._tell(len(self.journal))

    def judged(self) -> Sampled:
        responses = list(self._prepare(self.journal.responses))
        items = self._items(responses)
        return responses, self._verifier.verify_batch(items, require_format=False, think_opened=self._think_opened)

    def _items(self, responses: Sequence[Response]) -> list[tuple[str, str]]:
        return [(response.text, self._truths[response.prompt_id]) for response in responses]


@contextmanager
def _hold(work: Path) -> Iterator[None]:
    """The folder, alone. Raises RunLockedError."""
    lock = work / "evaluate.lock"
    with ExitStack() as stack:
        try:
            stack.enter_context(run_lock(lock))
        except RunLockedError as error:
            holder = lock_holder(lock) or "another process"
            raise RunLockedError(f"{work} is in use by {holder}, which evaluates the same; wait for it") from error
        sweep_temporaries(work)
        yield


def _sha256(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _short(settings: dict[str, Any]) -> str:
    return _sha256(settings)[:10]
