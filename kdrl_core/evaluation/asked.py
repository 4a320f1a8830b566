"""What a model is asked: the prompts of a benchmark, k times each, and the room that they leave for responses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kdrl_core.config import BenchmarkConfig, Recipe
from kdrl_core.data import render_prompts, think_opened
from kdrl_core.data.benchmarks import BenchmarkProblem, load_benchmark
from kdrl_core.errors import ModelError
from kdrl_core.ledger.seeds import derive_seed
from kdrl_core.types import RolloutRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedBenchmark:
    """The requests of a benchmark, the samples of a problem together."""

    problems: list[BenchmarkProblem]
    requests: list[RolloutRequest]
    think_opened: bool
    """Whether the prompts have opened `<think>` already."""


def response_seed(recipe: Recipe, benchmark: str, problem_id: str, sample: int) -> int:
    """The seed of one response: it depends on nothing else that is evaluated."""
    return derive_seed(recipe.seed, "evaluation", benchmark, problem_id, sample)


def ask_benchmark(benchmark: BenchmarkConfig, recipe: Recipe, tokenizer: Any) -> AskedBenchmark:
    """Render and tokenise the problems of a benchmark, by the chat template that the tokenizer was loaded with.

    Raises DataError, ModelError as reading and rendering do.
    """
    problems = load_benchmark(benchmark)
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None  # the teacher's, say
    prompts = render_prompts([problem.question for problem in problems], tokenizer, recipe, chat_template=own)
    requests = [
        RolloutRequest(
            prompt_id=problem.problem_id,
            sample=sample,
            prompt_token_ids=token_ids,
            seed=response_seed(recipe, benchmark.name, problem.problem_id, sample),
        )
        for problem, (_, token_ids) in zip(problems, prompts, strict=True)
        for sample in range(benchmark.samples)
    ]
    return AskedBenchmark(problems=problems, requests=requests, think_opened=think_opened(prompts[0][0], recipe))


def response_limit(context: int, requests: Sequence[RolloutRequest], what: str) -> int:
    """Most tokens of a response: what the longest prompt leaves of the context. Raises ModelError if that is 0."""
    longest = max(len(request.prompt_token_ids) for request in requests)
    if longest >= context:
        raise ModelError(
            f"evaluation of {what}: a prompt has {longest} tokens, the context {context}; "
            "raise evaluation.max_context_tokens or use a model with a longer context"
        )
    return context - longest
