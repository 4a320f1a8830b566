"""The miniature's models, requests with prompts of several lengths, and a dense reference for what engines compute."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kdrl_core.config import resolve_path
from kdrl_core.engines.transformers_engines import TransformersRolloutEngine
from kdrl_core.ledger import derive_seed
from kdrl_core.miniature.models import MiniatureModel, build_model, build_tokenizer
from kdrl_core.models.loading import load_model, load_tokenizer, stop_token_ids
from kdrl_core.types import Rollout, RolloutRequest

QUESTIONS = ["3+5", "1*2-4+5*6-7", "9-9*3", "0+0*5-1", "7*7", "2+3*4-5+6", "8-1+1*3-2*2+9", "4*4"]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def student_dir() -> Path:
    return resolve_path("builtin:miniature/student")


@pytest.fixture(scope="session")
def teacher_dir() -> Path:
    return resolve_path("builtin:miniature/teacher")


@pytest.fixture(scope="session")
def tokenizer(student_dir: Path) -> Any:
    return load_tokenizer(student_dir)


@pytest.fixture(scope="session")
def student(student_dir: Path) -> Any:
    """Shared: tests that train load their own."""
    return load_model(student_dir)


@pytest.fixture(scope="session")
def teacher(teacher_dir: Path) -> Any:
    return load_model(teacher_dir)


@pytest.fixture(scope="session")
def random_model() -> Any:
    """An untrained model: its next token is far from certain, and it hardly ever ends a response."""
    spec = MiniatureModel(hidden_size=32, num_layers=2, tie_word_embeddings=True, sft_steps=0, learning_rate=1.0)
    return build_model(spec, build_tokenizer(), seed=3).eval()


@pytest.fixture(scope="session")
def stop_ids(student: Any, tokenizer: Any) -> tuple[int, ...]:
    return stop_token_ids(student, tokenizer)


@pytest.fixture(scope="session")
def requests(tokenizer: Any) -> list[RolloutRequest]:
    """Three samples of each question, prompts of 5 to 17 tokens."""
    return [
        RolloutRequest(
            prompt_id=question,
            sample=sample,
            prompt_token_ids=tokenizer.encode(f"<|user|>{question}<|assistant|>", add_special_tokens=False),
            seed=derive_seed("parity", question, sample),
        )
        for question in QUESTIONS
        for sample in range(3)
    ]


@pytest.fixture(scope="session")
def make_engine(student: Any, tokenizer: Any, stop_ids: tuple[int, ...]) -> Callable[..., TransformersRolloutEngine]:
    """An engine over the student (or `model`), with these defaults."""

    def make(model: Any = None, **options: Any) -> TransformersRolloutEngine:
        values = {"stop_ids": stop_ids, "temperature": 1.0, "max_response_tokens": 48, "batch_size": 64, **options}
        return TransformersRolloutEngine(student if model is None else model, tokenizer, **values)

    return make


@pytest.fixture(scope="session")
def rollouts(make_engine: Callable[..., TransformersRolloutEngine], requests: list[RolloutRequest]) -> list[Rollout]:
    """The student's sampled responses at temperature 1."""
    return make_engine().generate(requests)


def dense_log_probabilities(model: Any, rollout: Any, temperature: float) -> torch.Tensor:
    """log softmax(logits / T) [T, V] at each response position, from one unpadded forward pass of the full sequence."""
    start = len(rollout.prompt_token_ids)
    ids = torch.tensor([[*rollout.prompt_token_ids, *rollout.token_ids]])
    return (model(input_ids=ids).logits[0, start - 1 : -1] / temperature).log_softmax(-1)


def dense_logprobs(model: Any, rollout: Any, temperature: float) -> torch.Tensor:
    """Logprobs [T] of the response tokens, the same way."""
    table = dense_log_probabilities(model, rollout, temperature)
    return table.gather(-1, torch.tensor(list(rollout.token_ids))[:, None]).squeeze(1)


def largest_gap(actual: Sequence[Any], expected: Sequence[torch.Tensor]) -> float:
    """The largest difference between two lists of per-token values, relative to values beyond 1.

    Float32 itself is that coarse: on these models a logprob of −13 is 5e-5 from its float64 value.
    """
    return max(
        float(((torch.as_tensor(ours) - theirs).abs() / theirs.abs().clamp(min=1.0)).max())
        for ours, theirs in zip(actual, expected, strict=True)
    )
