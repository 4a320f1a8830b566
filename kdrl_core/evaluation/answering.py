"""Answer the problems of a benchmark: with a model directory and an engine in this process, or with an endpoint."""

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
from kdrl_core.models.loading import check_device, context_limit, load_tokenizer, read_config
from kdrl_core.sampling.job import Sampler, open_judge
from kdrl_core.sampling.responses import Response, engine_source
from kdrl_core.types import FinishReason, ThinkOpened
from kdrl_core.verify import Verifier

_MESSAGE_OVERHEAD_TOKENS = 64
"""Upper bound on the tokens that a chat template adds to a message."""
SamplerOf = Callable[[BenchmarkConfig], Sampler]
"""Benchmark → the sampler that answers it."""


def sampler_of_directory(
    plan: EvaluationPlan, path: Path, describe: Callable[[BenchmarkConfig], str], stack: ExitStack
) -> SamplerOf:
    """Load a model directory.

    Args:
        describe: names the evaluation of a benchmark in error texts.
        stack: closes engine and verifier.

    Raises:
        RecipeError: the recipe's device is not there.
        ModelError: model or tokenizer cannot be loaded, or a prompt leaves no room for a response.
        EngineError: the engine cannot be started.
    """
    check_device(plan.recipe)
    recipe, model = plan.recipe, plan.model
    verifier = stack.enter_context(Verifier(**recipe.verification.pool_options))
    judge = open_judge(recipe, verifier, stack)
    tokenizer = load_tokenizer(path, chat_template=model.chat_template, trust_remote_code=model.trust_remote_code)
    asked = recipe.evaluation.max_context_tokens
    context = min(asked, context_limit(read_config(path)) or asked)
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None  # for example the teacher's
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

    def sampler_of(benchmark: BenchmarkConfig) -> Sampler:
        rendered = prompts[benchmark.name]
        ids = [problem.problem_id for problem in plan.problems[benchmark.name]]
        return Sampler(
            source=engine_source(engine, limits[benchmark.name]),
            verifier=verifier,
            judge=judge,
            asked=_asked(plan, benchmark),
            prompts={problem_id: tokens for problem_id, (_, tokens) in zip(ids, rendered, strict=True)},
            think_opened=think_opened(rendered[0][0], recipe),
        )

    return sampler_of


def _asked(plan: EvaluationPlan, benchmark: BenchmarkConfig) -> dict[str, tuple[str, str]]:
    """Question and source by id; the source of a benchmark's problem is the benchmark's name."""
    return {problem.problem_id: (problem.question, benchmark.name) for problem in plan.problems[benchmark.name]}


def _response_limit(context: int, prompts: Sequence[tuple[str, Sequence[int]]], what: str) -> int:
    """Token limit of a response: the context minus the longest prompt. Raises ModelError if nothing is left."""
    longest = max(len(token_ids) for _, token_ids in prompts)
    if longest >= context:
        raise ModelError(
            f"evaluation of {what}: a prompt has {longest} tokens, the context {context}; "
            "raise evaluation.max_context_tokens or use a model with a longer context"
        )
    return context - longest


def connect(plan: EvaluationPlan, stack: ExitStack) -> ChatEndpoint:
    """Connect to the plan's endpoint; `stack` closes it. Raises as `ChatEndpoint` does."""
    assert plan.endpoint is not None
    evaluation = plan.recipe.evaluation
    endpoint = ChatEndpoint(
        plan.endpoint,
        temperature=evaluation.temperature,
        max_context_tokens=evaluation.max_context_tokens,
        chat_template_kwargs=plan.recipe.prompt.chat_template_kwargs,
    )
    stack.callback(endpoint.close)
    return endpoint


def sampler_of_endpoint(plan: EvaluationPlan, connected: Callable[[], ChatEndpoint], stack: ExitStack) -> SamplerOf:
    """Prepare the messages. Raises ModelError if a question leaves no room for a response."""
    endpoint, template = connected(), plan.recipe.prompt.template
    messages = {
        name: {problem.problem_id: template.replace("{question}", problem.question) for problem in problems}
        for name, problems in plan.problems.items()
    }
    context = plan.recipe.evaluation.max_context_tokens
    limits = {name: _message_limit(context, name, asked.values()) for name, asked in messages.items()}
    verifier = stack.enter_context(Verifier(**plan.recipe.verification.pool_options))
    judge = open_judge(plan.recipe, verifier, stack)

    def sampler_of(benchmark: BenchmarkConfig) -> Sampler:
        asked, limit = messages[benchmark.name], limits[benchmark.name]
        return Sampler(
            source=partial(endpoint.respond, messages=asked, max_response_tokens=limit),
            verifier=verifier,
            judge=judge,
            asked=_asked(plan, benchmark),
            prompts=dict.fromkeys(asked, ()),
            think_opened="closed" if plan.recipe.prompt.think_opened == "closed" else False,
            mend=partial(_with_tags, plan.recipe.prompt.think_opened),
        )

    return sampler_of


def _message_limit(context: int, benchmark: str, messages: Iterable[str]) -> int:
    """Token limit of a response: the context minus the bytes of the longest question (a token has one or more)."""
    longest = max(len(message.encode()) for message in messages) + _MESSAGE_OVERHEAD_TOKENS
    if longest >= context:
        raise ModelError(
            f"evaluation on {benchmark}: a question may have {longest} tokens (the endpoint's tokenizer is unknown, "
            f"so its bytes are counted), the context {context}; raise evaluation.max_context_tokens"
        )
    return context - longest


def _with_tags(opened: ThinkOpened | None, responses: Sequence[Response]) -> list[Response]:
    """Add the `<think>` that the server's template opened. `opened` is the recipe's value. If it is None, the template
    opened it if most of the responses that were not cut close the thought without opening it."""
    if opened is None:
        finished = [r.text for r in responses if r.finish_reason is FinishReason.STOP]
        closing = sum("</think>" in text and "<think>" not in text for text in finished)
        opened = 2 * closing > len(finished)
    return [replace(r, text=with_thought_tags(r.text, think_opened=opened is True)) for r in responses]
