"""Output layers give float32 logits, though they multiply bfloat16 numbers: head by head against float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from gpu.conftest import DEVICES, config_of, model_of
from parity.ranks import OPTIONS
from torch import Tensor
from transformers import Gemma2Config

from kdrl_core.engines.transformers_engines import TransformersRolloutEngine, TransformersScorer
from kdrl_core.logprobs.chunked_function import float32_product
from kdrl_core.logprobs.model import LogprobModel, pad_sequences
from kdrl_core.training.protocols import OptimizerSettings
from kdrl_core.training.torch_trainer import TorchTrainer
from kdrl_core.types import RolloutRequest, ScoreRequest

TEMPERATURE = 0.6
LARGEST_GAP = 2e-5
"""Nats: float32 sums of 64 products and of 800 exponentials leave 1e-6. Rounding the logits to bfloat16 costs 0.001 in
the mean with these small models, and 0.013 at Qwen2.5-1.5B's size."""
REQUESTS = [
    ScoreRequest(prompt_token_ids=list(range(3, 6 + 2 * row)), token_ids=[(7 * i + row) % 20 + 2 for i in range(24)])
    for row in range(4)
]


def tempered(logits: Tensor, ids: Tensor) -> Tensor:
    """Logprobs [N] of `ids` from logits [N, V]."""
    return (logits / TEMPERATURE).log_softmax(-1).gather(-1, ids[:, None])[:, 0]


@contextmanager
def hidden_states(module: Any, *, is_input: bool) -> Iterator[list[Tensor]]:
    """The last hidden states that pass by: what `module` is given, or what it returns."""
    seen: list[Tensor] = []
    if is_input:
        hook = module.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    else:
        hook = module.register_forward_hook(lambda _, given, found: seen.append(found.last_hidden_state.detach()))
    yield seen
    hook.remove()


def exact_logprobs(model: Any, hidden: Tensor, ids: Tensor, cap: float | None = None) -> tuple[Tensor, Tensor]:
    """From hidden states [N, H]: in float64 with the bfloat16 operands, and as torch's bfloat16 product gives them."""
    hidden, weight = hidden.bfloat16(), model.get_output_embeddings().weight.detach().bfloat16()
    exact, rounded = hidden.double() @ weight.double().t(), (hidden @ weight.t()).float()
    if cap is not None:
        exact, rounded = ((logits / cap).tanh() * cap for logits in (exact, rounded))
    return tempered(exact, ids), tempered(rounded, ids)


def assert_only_torch_rounds(found: Tensor, exact: Tensor, rounded: Tensor) -> None:
    """Mean and largest error of both are printed."""
    gaps = [(values.double() - exact).abs() for values in (found, rounded)]
    ours, torchs = ((float(gap.mean()), float(gap.max())) for gap in gaps)
    print(f"{len(exact)} tokens: ours {ours[0]:.1e} ({ours[1]:.1e}), rounded {torchs[0]:.1e} ({torchs[1]:.1e}) nats")
    assert ours[1] < LARGEST_GAP
    assert torchs[0] > 10 * LARGEST_GAP


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_of_short_numbers_is_summed_and_kept_in_float32(device: str, dtype: torch.dtype) -> None:
    """K = 1,536, sums of size 1: float32 leaves 1e-6. Rows of the right matrix are strided, as a weight's transpose."""
    torch.manual_seed(0)
    left, right = torch.randn(33, 1536, device=device).to(dtype), torch.randn(257, 1536, device=device).to(dtype) / 39
    found, exact = float32_product(left, right.t()), left.double() @ right.double().t()
    assert found.dtype == torch.float32
    assert float((found - exact).abs().max()) < 1e-5
    assert float(((left @ right.t()) - exact).abs().max()) > (1e-3 if dtype is torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("who", ["scorer", "trainer", "scorer with a soft cap"])
def test_scores_are_those_of_float32_logits(who: str, device: str, tokenizer: Any) -> None:
    """bfloat16 weights for the scorer, autocast for the trainer; a soft cap makes kdrl take the model's own logits."""
    cap = 5.0 if "cap" in who else None
    config: Any = config_of()
    if cap is not None:
        sizes = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
        config = Gemma2Config(**sizes, num_hidden_layers=2, head_dim=16, final_logit_softcapping=cap)
    model = model_of(config, device, torch.float32 if who == "trainer" else torch.bfloat16)
    head, place = model.get_output_embeddings(), model.base_model
    if who == "trainer":
        settings = OptimizerSettings(**{**OPTIONS, "temperature": TEMPERATURE})
        ours: Any = TorchTrainer(model, tokenizer, settings, autocast_dtype=torch.bfloat16)
    else:
        ours = TransformersScorer(model, temperature=TEMPERATURE, batch_tokens=10_000)
    with hidden_states(head if cap else place, is_input=cap is not None) as seen:
        scores = ours.score(REQUESTS)
    batch = pad_sequences(REQUESTS, device=device)
    hidden = seen[0][:, -batch.input_ids.shape[1] :]  # a head is given the last positions alone
    first = batch.input_ids.shape[1] - hidden.shape[1]
    rows = torch.arange(len(REQUESTS), device=device)[:, None]
    packed = hidden[rows, batch.sources - first].flatten(0, 1)
    found = torch.tensor([value for row in scores for value in row], device=device)
    assert_only_torch_rounds(found, *exact_logprobs(model, packed, batch.response_ids.flatten(), cap))


@pytest.mark.parametrize("device", DEVICES)
def test_samples_are_drawn_from_float32_logits(device: str, tokenizer: Any) -> None:
    """The logprob that comes with a sampled token, from what its output layer was given."""
    model = model_of(config_of(), device, torch.bfloat16)
    engine = TransformersRolloutEngine(
        model, tokenizer, stop_ids=[], temperature=TEMPERATURE, max_response_tokens=20, batch_size=8
    )
    requests = [
        RolloutRequest(prompt_id=str(row), sample=0, prompt_token_ids=r.prompt_token_ids, seed=row)
        for row, r in enumerate(REQUESTS)
    ]
    with hidden_states(model.get_output_embeddings(), is_input=True) as seen:
        rollouts = engine.generate(requests)
    hidden = torch.stack([given[:, -1] for given in seen], 1).flatten(0, 1)  # of every step
    ids = torch.tensor([rollout.token_ids for rollout in rollouts], device=device).flatten()
    found = torch.tensor([rollout.logprobs for rollout in rollouts], device=device).flatten()
    assert_only_torch_rounds(found, *exact_logprobs(model, hidden, ids))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("has_cap", [False, True])
def test_gradients_through_float32_logits_are_as_exact_as_bfloat16_allows(has_cap: bool, device: str) -> None:
    """Of the output layer, against float64 with the same weights; 2 % is what bfloat16 gradients of it are off by."""
    sizes = {"vocab_size": 800, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 1, "head_dim": 16}
    config: Any = Gemma2Config(**sizes, tie_word_embeddings=False) if has_cap else config_of(tie_word_embeddings=False)
    found, exact = model_of(config, device, torch.bfloat16), model_of(config, device, torch.bfloat16).double()
    batch = pad_sequences(REQUESTS, device=device)
    for model in (found, exact):
        LogprobModel(model, temperature=TEMPERATURE)(batch).logprobs.mean().backward()
    ours, theirs = (model.get_output_embeddings().weight.grad for model in (found, exact))
    assert ours.dtype == torch.bfloat16
    assert float((ours.double() - theirs).norm() / theirs.norm()) < 0.02
