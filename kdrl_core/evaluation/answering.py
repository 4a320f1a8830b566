"""What answers the problems of a benchmark: a model directory by an engine in this process, or an endpoint."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from kdrl_core.config import BenchmarkConfig
from kdrl_core.data import render_prompts, think_opened
from kdrl_core.engines.from_recipe import rollout_engine
from kdrl_core.errors import ModelError
from kdrl_core.evaluation.endpoint import ChatEndpoint, with_thought_tags
from kdrl_core.evaluation.evaluation_plan import EvaluationPlan
from kdrl_core.models.device import check_device
from kdrl_core.models.loading import context_limit, load_tokenizer, read_config
from kdrl_core.sampling.job import Sampler
from kdrl_core.sampling.responses import Response, engine_source
from kdrl_core.types import FinishReason
from kdrl_core.verify import Verifier

_MESSAGE_OVERHEAD_TOKENS = 64
"""What a chat template adds to a message, at most."""
_SamplerOf = Callable[[BenchmarkConfig, Verifier], Sampler]


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
        self._loaded: tuple[_SamplerOf, Verifier] | None = None

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
            if self._path is None:
                loaded = _served(self._plan, self.endpoint)
            else:
                check_device(self._plan.recipe)
                loaded = _local(self._plan, self._path(), self._describe, self._stack)
            self._loaded = loaded, self._stack.enter_context(Verifier(**self._plan.recipe.verification.pool_options))
        sampler_of, verifier = self._loaded
        return sampler_of(benchmark, verifier)


def _local(
    plan: EvaluationPlan, path: Path, describe: Callable[[BenchmarkConfig], str], stack: ExitStack
) -> _SamplerOf:
    """A model directory, loaded until `stack` ends."""
    recipe, model = plan.recipe, plan.model
    tokenizer = load_tokenizer(path, chat_template=model.chat_template, trust_remote_code=model.trust_remote_code)
    asked = recipe.evaluation.max_context_tokens
    context = min(asked, context_limit(read_config(path)) or asked)
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None  # the teacher's, say
    prompts: dict[str, list[tuple[str, list[int]]]] = {}
    limits: dict[str, int] = {}
    for benchmark in plan.benchmarks:
        questions = [problem.question for problem in plan.problems[benchmark.name]]
        prompts[benchmark.name] = render_prompts(questions, tokenizer, recipe, chat_template=own)
        limits[benchmark.name] = _response_limit(context, prompts[benchmark.name], describe(benchmark))
    longest = max(limits.values())
    import torch

    torch.set_num_threads(recipe.runtime.num_threads)
    engine = rollout_engine(
        recipe,
        path,
        model,
        tokenizer,
        temperature=recipe.evaluation.temperature,
        max_prompt_tokens=context - longest,
        max_response_tokens=longest,
        engine=plan.engine,
    )
    stack.callback(engine.close)

    def sampler_of(benchmark: BenchmarkConfig, verifier: Verifier) -> Sampler:
        rendered = prompts[benchmark.name]
        ids = [problem.problem_id for problem in plan.problems[benchmark.name]]
        return Sampler(
            source=engine_source(engine, limits[benchmark.name]),
            verifier=verifier,
            prompts={problem_id: tokens for problem_id, (_, tokens) in zip(ids, rendered, strict=True)},
            think_opened=think_opened(rendered[0][0], recipe),
        )

    return sampler_of


def _response_limit(context: int, prompts: Sequence[tuple[str, Sequence[int]]], what: str) -> int:
    """Most tokens of a response: what the longest prompt leaves of the context. Raises ModelError if that is 0."""
    longest = max(len(token_ids) for _, token_ids in prompts)
    if longest >= context:
        raise ModelError(
            f"evaluation of {what}: a prompt has {longest} tokens, the context {context}; "
            "raise evaluation.max_context_tokens or use a model with a longer context"
        )
    return context - longest


def _served(plan: EvaluationPlan, endpoint: ChatEndpoint) -> _SamplerOf:
    """An endpoint."""
    template = plan.recipe.prompt.template
    messages = {
        name: {problem.problem_id: template.replace("{question}", problem.question) for problem in problems}
        for name, problems in plan.problems.items()
    }
    context = plan.recipe.evaluation.max_context_tokens
    limits = {name: _message_limit(context, name, asked.values()) for name, asked in messages.items()}

    def sampler_of(benchmark: BenchmarkConfig, verifier: Verifier) -> Sampler:
        asked, limit = messages[benchmark.name], limits[benchmark.name]
        return Sampler(
            source=partial(endpoint.respond, messages=asked, max_response_tokens=limit),
            verifier=verifier,
            prompts=dict.fromkeys(asked, ()),
            think_opened=False,
            mend=partial(_with_tags, plan.recipe.prompt.think_opened),
        )

    return sampler_of


def _message_limit(context: int, benchmark: str, messages: Iterable[str]) -> int:
    """What is left of the context behind the longest question: no token of it is shorter than a byte."""
    longest = max(len(message.encode()) for message in messages) + _MESSAGE_OVERHEAD_TOKENS
    if longest >= context:
        raise ModelError(
            f"evaluation on {benchmark}: a question may have {longest} tokens (its tokenizer is the endpoint's, so "
            f"bytes count), the context {context}; raise evaluation.max_context_tokens"
        )
    return context - longest


def _with_tags(opened: bool | None, responses: Sequence[Response]) -> list[Response]:
    """With the `<think>` that the server's template has opened: as the recipe says, or if most of the responses that
    were not cut close it and do not open it."""
    if opened is None:
        finished = [r.text for r in responses if r.finish_reason is FinishReason.STOP]
        closing = sum("</think>" in text and "<think>" not in text for text in finished)
        opened = 2 * closing > len(finished)
    return [replace(r, text=with_thought_tags(r.text, think_opened=opened)) for r in responses]
