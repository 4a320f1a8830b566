"""Temperature at Qwen's full vocabulary: scorer, trainer and engine against log softmax(logits / T) in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from parity.conftest import largest_gap
from transformers import Qwen2Config, Qwen2ForCausalLM

from kdrl_core.config import load_recipe
from kdrl_core.data import render_prompts
from kdrl_core.engines.transformers_engines import TransformersRolloutEngine, TransformersScorer
from kdrl_core.ledger import derive_seed
from kdrl_core.logprobs.model import LogprobModel, pad_sequences
from kdrl_core.models.tokenizer import read_tokenizer
from kdrl_core.types import RolloutRequest, ScoreRequest

VOCABULARY = 151_936
"""Rows of the 1.5B model's embedding; the tokenizer has 151,665 tokens."""
TOLERANCE = 5e-5
"""Of the engine, measured 1.4e-5: torch's float32 log_softmax sums 151,936 terms."""
CHUNKED_TOLERANCE = 1e-5
"""Of scorer and trainer, measured 2e-6."""
RESPONSES = [
    "Half of 4 is 2.\n</think>\n\nThe largest element is $4$, so the answer is \\boxed{2}.",
    "数学 é 🙂 \\frac{1}{2}</think>\\boxed{\\frac{1}{2}}",
]


@pytest.fixture(scope="module")
def tokenizer(r1_tokenizer_dir: Path) -> Any:
    return read_tokenizer(r1_tokenizer_dir)


@pytest.fixture(scope="module")
def model() -> Any:
    """Untrained, with an output layer so wide that its next token is neither certain nor any."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.8)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=1.0)
    return model


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    questions = ["Find half of $4$.", "What is the largest element of $\\{x : x^2 = 16\\}$ divided by two?"]
    return [token_ids for _, token_ids in render_prompts(questions, tokenizer, load_recipe("paper-1.5b"))]


@pytest.fixture(scope="module")
def requests(tokenizer: Any, prompts: list[list[int]]) -> list[ScoreRequest]:
    """Prompts and responses of different lengths, EOS included."""
    return [
        ScoreRequest(
            prompt_token_ids=prompt,
            token_ids=[*tokenizer.encode(response, add_special_tokens=False), tokenizer.eos_token_id],
        )
        for prompt, response in zip(prompts, RESPONSES, strict=True)
    ]


def reference(model: Any, request: Any, temperature: float) -> torch.Tensor:
    """Logprobs [T] float64 of a response, one position after another: logit / T − log Σ exp(logits / T)."""
    hidden = model.model(input_ids=torch.tensor([[*request.prompt_token_ids, *request.token_ids]])).last_hidden_state[0]
    weight = model.lm_head.weight.double()
    first = len(request.prompt_token_ids) - 1
    found = []
    for position, token in enumerate(request.token_ids):
        scaled = (weight @ hidden[first + position].double()) / temperature
        highest = scaled.max()
        found.append(scaled[token] - highest - (scaled - highest).exp().sum().log())
    return torch.stack(found)


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_scorer_and_trainer(model: Any, requests: list[ScoreRequest], temperature: float) -> None:
    with torch.no_grad():
        expected = [reference(model, request, temperature) for request in requests]
    scores = TransformersScorer(model, temperature=temperature, batch_tokens=4096).score(requests)
    assert largest_gap(scores, expected) < CHUNKED_TOLERANCE
    batch = pad_sequences(requests)
    logprobs = LogprobModel(model, temperature=temperature)(batch).logprobs
    trained = [row[: len(request.token_ids)].detach() for row, request in zip(logprobs, requests, strict=True)]
    assert len({len(row) for row in trained}) == 2  # one of them is padded
    assert largest_gap(trained, expected) < CHUNKED_TOLERANCE


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_sampled_tokens(model: Any, tokenizer: Any, prompts: list[list[int]], temperature: float) -> None:
    engine = TransformersRolloutEngine(
        model,
        tokenizer,
        stop_ids=[tokenizer.eos_token_id],
        temperature=temperature,
        max_response_tokens=16,
        batch_size=4,
    )
    rollouts = engine.generate(
        [
            RolloutRequest(
                prompt_id=str(row), sample=sample, prompt_token_ids=prompt, seed=derive_seed("vocabulary", row, sample)
            )
            for row, prompt in enumerate(prompts)
            for sample in range(2)
        ]
    )
    with torch.no_grad():
        expected = [reference(model, rollout, temperature) for rollout in rollouts]
    assert len({token for rollout in rollouts for token in rollout.token_ids}) > 20
    sampled = [torch.tensor(rollout.logprobs) for rollout in rollouts]
    assert largest_gap(sampled, expected) < TOLERANCE
    sequences = [ScoreRequest(prompt_token_ids=r.prompt_token_ids, token_ids=r.token_ids) for r in rollouts]
    scores = TransformersScorer(model, temperature=temperature, batch_tokens=4096).score(sequences)
    assert largest_gap(scores, expected) < CHUNKED_TOLERANCE
    assert largest_gap(scores, sampled) < TOLERANCE


def test_a_logprob_cannot_be_rescaled_afterwards(model: Any, requests: list[ScoreRequest]) -> None:
    """(z − log Σ eᶻ) / T and z/T − log Σ e^(z/T) differ by what the sums of a position make of it: no constant."""
    plain = TransformersScorer(model, temperature=1.0, batch_tokens=4096).score(requests)
    tempered = TransformersScorer(model, temperature=0.6, batch_tokens=4096).score(requests)
    missing = [ours / 0.6 - theirs for ours, theirs in zip(plain, tempered, strict=True)]
    assert min(abs(gap).min() for gap in missing) > 0.1
    assert max(gap.max() - gap.min() for gap in missing) > 0.1
