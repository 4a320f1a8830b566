"""What answers the problems of a benchmark: a model directory by an engine in this process, or an endpoint."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from kdrl_core.config import BenchmarkConfig
from kdrl_core.data import render_prompts, think_opened
from kdrl_core.engines.from_recipe import rollout_engine
from kdrl_core.errors import ModelError
from kdrl_core.evaluation.endpoint import ChatEndpoint, with_thought_tags
from kdrl_core.evaluation.evaluation_plan import EvaluationPlan
from kdrl_core.models.device import check_device
from kdrl_core.models.loading import context_limit, load_tokenizer, read_config
from kdrl_core.sampling.job import Sampler
from kdrl_core.sampling.requests import requests_for
from kdrl_core.sampling.responses import EngineSource, OnResponses, Response
from kdrl_core.types import FinishReason, RolloutRequest
from kdrl_core.verify import Verifier

_MESSAGE_OVERHEAD_TOKENS = 64
"""What a chat template adds to a message, at most."""


class _Model(Protocol):
    """What answers."""

    def sampler(self, benchmark: BenchmarkConfig, verifier: Verifier) -> Sampler: ...


class LoadedLater:
    """The model of a plan and the verifier, loaded when a shard first needs them: a second evaluation loads nothing.

    Args:
        stack: closes them.
        path: gives the model's directory, when it is to be loaded; None: it is at an endpoint.
        describe: what errors call the evaluation of a benchmark.
    """

    def __init__(
        self,
        plan: EvaluationPlan,
        stack: ExitStack,
        path: Callable[[], Path] | None,
        describe: Callable[[BenchmarkConfig], str],
    ) -> None:
        self._plan, self._stack, self._path, self._describe = plan, stack, path, describe
        self._endpoint: ChatEndpoint | None = None
        self._loaded: tuple[_Model, Verifier] | None = None

    @property
    def endpoint(self) -> ChatEndpoint:
        """Where the model is served. Raises EngineError, SecretError as `ChatEndpoint` does."""
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

    def sampler(self, benchmark: BenchmarkConfig) -> Sampler:
        """What answers this benchmark. Raises as loading the model does."""
        if self._loaded is None:
            model: _Model
            if self._path is None:
                model = _Served(self._plan, self.endpoint)
            else:
                check_device(self._plan.recipe)
                model = self._stack.enter_context(closing(_Local(self._plan, self._path(), self._describe)))
            self._loaded = model, self._stack.enter_context(Verifier(**self._plan.recipe.verification.pool_options))
        model, verifier = self._loaded
        return model.sampler(benchmark, verifier)


class _Local:
    """A model directory."""

    def __init__(self, plan: EvaluationPlan, path: Path, describe: Callable[[BenchmarkConfig], str]) -> None:
        self._plan = plan
        recipe, model = plan.recipe, plan.model
        tokenizer = load_tokenizer(path, chat_template=model.chat_template, trust_remote_code=model.trust_remote_code)
        asked = recipe.evaluation.max_context_tokens
        context = min(asked, context_limit(read_config(path)) or asked)
        own = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None  # the teacher's, say
        self._prompts: dict[str, list[tuple[str, list[int]]]] = {}
        self._limits: dict[str, int] = {}
        for benchmark in plan.benchmarks:
            questions = [problem.question for problem in plan.problems[benchmark.name]]
            prompts = render_prompts(questions, tokenizer, recipe, chat_template=own)
            self._prompts[benchmark.name] = prompts
            self._limits[benchmark.name] = _response_limit(context, prompts, describe(benchmark))
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
            engine=plan.engine,
        )

    def sampler(self, benchmark: BenchmarkConfig, verifier: Verifier) -> Sampler:
        prompts = self._prompts[benchmark.name]
        return Sampler(
            source=EngineSource(engine=self._engine, max_response_tokens=self._limits[benchmark.name]),
            verifier=verifier,
            requests=_requests(self._plan, benchmark, [token_ids for _, token_ids in prompts]),
            ground_truths=_ground_truths(self._plan, benchmark),
            think_opened=think_opened(prompts[0][0], self._plan.recipe),
        )

    def close(self) -> None:
        self._engine.close()


class _Served:
    """An endpoint, which is closed by who has opened it."""

    def __init__(self, plan: EvaluationPlan, endpoint: ChatEndpoint) -> None:
        self._plan, self._endpoint = plan, endpoint
        context = plan.recipe.evaluation.max_context_tokens
        self._limits = {name: self._limit(name, context) for name in plan.problems}

    def sampler(self, benchmark: BenchmarkConfig, verifier: Verifier) -> Sampler:
        problems = self._plan.problems[benchmark.name]
        messages = {problem.problem_id: self._message(problem.question) for problem in problems}
        return Sampler(
            source=_ChatSource(self._endpoint, messages, self._limits[benchmark.name]),
            verifier=verifier,
            requests=_requests(self._plan, benchmark, [()] * len(problems)),
            ground_truths=_ground_truths(self._plan, benchmark),
            think_opened=False,
            mend=self._with_tags,
        )

    def _with_tags(self, responses: Sequence[Response]) -> list[Response]:
        """With the `<think>` that the server's template has opened: as the recipe says, or if most of the responses
        that were not cut close it and do not open it."""
        opened = self._plan.recipe.prompt.think_opened
        if opened is None:
            finished = [r.text for r in responses if r.finish_reason is FinishReason.STOP]
            closing = sum("</think>" in text and "<think>" not in text for text in finished)
            opened = 2 * closing > len(finished)
        return [replace(r, text=with_thought_tags(r.text, think_opened=opened)) for r in responses]

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


@dataclass(frozen=True, slots=True)
class _ChatSource:
    """An endpoint as `Source`."""

    endpoint: ChatEndpoint
    messages: dict[str, str]
    max_response_tokens: int

    def answer(self, requests: Sequence[RolloutRequest], on_finished: OnResponses) -> list[Response]:
        return self.endpoint.respond(
            requests, self.messages, max_response_tokens=self.max_response_tokens, on_finished=on_finished
        )


def _requests(
    plan: EvaluationPlan, benchmark: BenchmarkConfig, token_ids: Sequence[Sequence[int]]
) -> list[RolloutRequest]:
    """A response's seed depends on nothing else that is evaluated."""
    ids = [problem.problem_id for problem in plan.problems[benchmark.name]]
    prompts = zip(ids, token_ids, strict=True)
    return requests_for(prompts, benchmark.samples, plan.recipe.seed, "evaluation", benchmark.name)


def _ground_truths(plan: EvaluationPlan, benchmark: BenchmarkConfig) -> Mapping[str, str]:
    return {problem.problem_id: problem.answer for problem in plan.problems[benchmark.name]}


def _response_limit(context: int, prompts: Sequence[tuple[str, Sequence[int]]], what: str) -> int:
    """Most tokens of a response: what the longest prompt leaves of the context. Raises ModelError if that is 0."""
    longest = max(len(token_ids) for _, token_ids in prompts)
    if longest >= context:
        raise ModelError(
            f"evaluation of {what}: a prompt has {longest} tokens, the context {context}; "
            "raise evaluation.max_context_tokens or use a model with a longer context"
        )
    return context - longest
