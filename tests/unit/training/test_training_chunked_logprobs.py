"""Statistics of tokens from hidden states in chunks, against full logits in float64, and which models allow it."""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM, Qwen2ForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from kdrl_core.logprobs.chunked import OutputLayer, TopKTeacher, best_tokens, token_statistics
from kdrl_core.logprobs.model import (
    LogprobModel,
    PaddedBatch,
    pad_sequences,
    response_logits,
    response_logprobs,
)
from kdrl_core.logprobs.trial import has_linear_logits
from kdrl_core.miniature.models import MiniatureModel, build_model, build_tokenizer
from kdrl_core.objectives import topk_kl
from kdrl_core.types import ScoreRequest

FLOOR = -15.0


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    topk_ids: Tensor
    topk_logits: Tensor
    gradients: Tensor
    """[3, N] of logprobs, entropy and Top-K KL."""

    def leaves(self, dtype: torch.dtype) -> list[Tensor | None]:
        return [None if v is None else v.detach().to(dtype).requires_grad_() for v in self[:3]]


def make_case(
    num_tokens: int, vocabulary: int, hidden_size: int, k: int = 1, *, has_bias: bool = True, seed: int = 0
) -> Case:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    ranks = torch.rand(num_tokens, vocabulary, generator=draw)
    return Case(
        normal(num_tokens, hidden_size),
        normal(vocabulary, hidden_size) * 2 / hidden_size**0.5,
        normal(vocabulary) if has_bias else None,
        torch.randint(vocabulary, (num_tokens,), generator=draw),
        ranks.topk(k).indices,
        normal(num_tokens, k),
        normal(3, num_tokens),
    )


def dense(case: Case, leaves: list[Any], temperature: float) -> list[Tensor]:
    """The three statistics from full logits."""
    hidden, weight, bias = leaves
    logits = torch.nn.functional.linear(hidden, weight, bias) / temperature
    table = logits.log_softmax(-1)
    kl = topk_kl(logits[None], case.topk_ids[None], case.topk_logits[None].to(logits.dtype), floor=FLOOR)[0]
    return [table.gather(1, case.targets[:, None])[:, 0], -(table.exp() * table).sum(-1), kl]


def chunked(case: Case, leaves: list[Any], temperature: float, **options: Any) -> Any:
    hidden, weight, bias = leaves
    return token_statistics(
        hidden,
        OutputLayer(weight, bias, temperature),
        case.targets,
        with_entropy=True,
        topk=TopKTeacher(case.topk_ids, case.topk_logits, FLOOR),
        **options,
    )


def differentiate(results: Any, case: Case, which: list[int] | None = None) -> None:
    parts = [(results[i] * case.gradients[i].to(results[i].dtype)).sum() for i in which or range(3)]
    torch.stack(parts).sum().backward()


def gap(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value or to 1: logits are of that size, and so is their rounding."""
    scale = expected.detach().double().abs().max().clamp(min=1.0)
    return float((actual.detach().double() - expected.detach().double()).abs().max() / scale)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few columns, so that small vocabularies have several."""
    monkeypatch.setattr("kdrl_core.logprobs.chunked_function._MIN_COLUMNS", 1)


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(1, 9),
    vocabulary=st.integers(2, 40),
    hidden_size=st.integers(1, 6),
    columns=st.integers(1, 45),
    k=st.integers(1, 6),
    temperature=st.sampled_from([0.3, 0.6, 1.0, 2.5]),
    has_bias=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    which=st.sampled_from([[0], [1], [2], [0, 1], [0, 1, 2]]),
    seed=st.integers(0, 2**16),
)
def test_values_and_gradients_are_those_of_full_logits(
    num_tokens: int,
    vocabulary: int,
    hidden_size: int,
    columns: int,
    k: int,
    temperature: float,
    has_bias: bool,
    dtype: torch.dtype,
    which: list[int],
    seed: int,
) -> None:
    case = make_case(num_tokens, vocabulary, hidden_size, min(k, vocabulary), has_bias=has_bias, seed=seed)
    ours, exact = case.leaves(dtype), case.leaves(torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdrl_core.logprobs.chunked_function._MIN_COLUMNS", 1)
        found = chunked(case, ours, temperature, chunk_bytes=columns * num_tokens * dtype.itemsize)
        expected = dense(case, exact, temperature)
        differentiate(found, case, which)
        differentiate(expected, case, which)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4  # full logits in float32 are up to 4e-5 from float64 here
    for values, reference in zip(found, expected, strict=True):
        assert values.dtype == dtype
        assert gap(values, reference) < tolerance
    for leaf, reference in zip(ours, exact, strict=True):
        if leaf is not None and reference is not None:
            assert leaf.grad is not None
            assert leaf.grad.dtype == dtype
            assert gap(leaf.grad, reference.grad) < tolerance


@pytest.mark.usefixtures("small_chunks")
def test_gradcheck() -> None:
    case = make_case(4, 11, 3, 3)

    def results(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return tuple(chunked(case, [hidden, weight, bias], 0.7, chunk_bytes=3 * 4 * 8))

    assert torch.autograd.gradcheck(results, case.leaves(torch.float64))


def test_golden() -> None:
    """Logits 0, 0 and ln 2 at temperature ½ become 0, 0, ln 4: probabilities 1/6, 1/6, 4/6."""
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [0.0], [0.5**0.5]])
    weight[2] = torch.tensor(2.0).log()
    found = token_statistics(
        hidden,
        OutputLayer(weight, None, 0.5),
        torch.tensor([2]),
        with_entropy=True,
        topk=TopKTeacher(torch.tensor([[2, 0]]), torch.tensor([[0.0, 0.0]]), -3.0),
    )
    assert found.logprobs.item() == pytest.approx(-0.4054651)  # ln 2/3
    assert found.entropy is not None
    assert found.entropy.item() == pytest.approx(0.8675632)  # 2/6 ln 6 + 4/6 ln 1.5
    assert found.topk_kl is not None
    # −H + (4/6 + 1/6) ln 2 + 1/6 · 3
    assert found.topk_kl.item() == pytest.approx(-0.8675632 + 5 / 6 * 0.6931472 + 0.5)


def test_float32_is_as_exact_as_full_logits() -> None:
    case = make_case(64, 5000, 32, 8)
    exact, naive, ours = case.leaves(torch.float64), case.leaves(torch.float32), case.leaves(torch.float32)
    expected, full = dense(case, exact, 0.7), dense(case, naive, 0.7)
    found = chunked(case, ours, 0.7, chunk_bytes=1)
    for values, reference in zip(found, full, strict=True):
        assert gap(values, reference) < 1e-6
    for which in ([0], [1], [2]):
        for leaves, results in ((exact, expected), (naive, full), (ours, found)):
            for leaf in leaves:
                assert leaf is not None
                leaf.grad = None
            inputs = [leaf for leaf in leaves if leaf is not None]
            total = (results[which[0]] * case.gradients[which[0]].to(results[which[0]].dtype)).sum()
            for leaf, gradient in zip(inputs, torch.autograd.grad(total, inputs, retain_graph=True), strict=True):
                leaf.grad = gradient
        for leaf, reference, other in zip(ours, exact, naive, strict=True):
            assert leaf is not None
            assert reference is not None
            assert other is not None
            assert gap(leaf.grad, reference.grad) < max(2e-6, 4 * gap(other.grad, reference.grad))


def test_in_bfloat16_only_operands_and_gradients_are_rounded() -> None:
    """Each row of the weight's gradient is rounded once, as in a single matmul."""
    case = make_case(64, 3000, 32, 8, has_bias=False)
    rounded = case._replace(hidden=case.hidden.bfloat16().double(), weight=case.weight.bfloat16().double())
    exact, naive, ours = rounded.leaves(torch.float64), case.leaves(torch.bfloat16), case.leaves(torch.bfloat16)
    expected = dense(rounded, exact, 0.7)
    hidden, weight, _ = naive
    assert hidden is not None
    logits = (hidden @ weight.t()).float() / 0.7
    table = logits.log_softmax(-1)
    kl = topk_kl(logits[None], case.topk_ids[None], case.topk_logits[None], floor=FLOOR)[0]
    full = [table.gather(1, case.targets[:, None])[:, 0], -(table.exp() * table).sum(-1), kl]
    found = chunked(case, ours, 0.7, chunk_bytes=1)
    for results in (expected, full, found):
        differentiate(results, case)
    for values, reference, other in zip(found, expected, full, strict=True):
        assert values.dtype == torch.float32
        assert gap(values, reference) < 1e-6 < 1e-4 < gap(other, reference)  # only torch rounds the logits
    for leaf, reference, other in zip(ours[:2], exact[:2], naive[:2], strict=True):
        assert leaf is not None
        assert reference is not None
        assert other is not None
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.bfloat16
        assert gap(leaf.grad, reference.grad) < 1.5 * gap(other.grad, reference.grad)


def test_autocast_multiplies_in_bfloat16_and_keeps_float32_gradients() -> None:
    case = make_case(16, 700, 8, 4)
    ours, naive = case.leaves(torch.float32), case.leaves(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = chunked(case, ours, 0.7, chunk_bytes=1)
        hidden, weight, bias = naive
        logits = torch.nn.functional.linear(hidden, weight, bias).float() / 0.7
    table = logits.log_softmax(-1)
    full = [table.gather(1, case.targets[:, None])[:, 0], -(table.exp() * table).sum(-1)]
    for values, reference in zip(found, full, strict=False):
        assert gap(values, reference) < 1e-2
    rounded = [*case.leaves(torch.bfloat16)[:2], case.leaves(torch.float32)[2]]
    for values, reference in zip(found, chunked(case, rounded, 0.7, chunk_bytes=1), strict=True):
        assert torch.equal(values, reference)  # the matmuls' operands alone are bfloat16, no sum after them
    differentiate(found, case, [0, 1])
    differentiate(full, case, [0, 1])
    for leaf, reference in zip(ours, naive, strict=True):
        assert leaf is not None
        assert reference is not None
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32
        assert gap(leaf.grad, reference.grad) < 3e-2


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("excluded", [[0], [0, 1, 2, 3], [4, 11], [1, 2, 5, 6, 9]])
def test_excluded_tokens_leave_everything_finite(excluded: list[int]) -> None:
    """Logits of −∞, also for whole chunks and within the Top-K: their share is 0 · log 0 = 0."""
    case = make_case(5, 12, 3, 4)
    assert case.bias is not None
    case.bias[excluded] = -torch.inf
    kept = [v for v in range(12) if v not in excluded]
    case = case._replace(targets=torch.tensor(kept)[:5])
    ours, exact = case.leaves(torch.float64), case.leaves(torch.float64)
    found = chunked(case, ours, 0.7, chunk_bytes=2 * 5 * 8)
    differentiate(found, case)
    assert all(torch.isfinite(values).all() for values in found)
    hidden, weight, bias = exact
    assert hidden is not None
    assert bias is not None
    logits = (torch.nn.functional.linear(hidden, weight, bias) / 0.7)[:, kept]
    table = logits.log_softmax(-1)
    entropy = -(table.exp() * table).sum(-1)
    assert gap(found.entropy, entropy) < 1e-12
    kl = topk_kl(
        torch.nn.functional.linear(hidden, weight, bias)[None] / 0.7,
        case.topk_ids[None],
        case.topk_logits[None],
        floor=FLOOR,
    )[0]
    assert gap(found.topk_kl, kl) < 1e-12
    own = table.gather(1, torch.arange(5)[:, None])[:, 0]
    differentiate([own, entropy], case, [0, 1])
    only_two = case.leaves(torch.float64)
    differentiate(chunked(case, only_two, 0.7, chunk_bytes=2 * 5 * 8), case, [0, 1])
    for leaf, reference in zip(only_two, exact, strict=True):
        assert leaf is not None
        assert reference is not None
        assert gap(leaf.grad, reference.grad) < 1e-12
    for leaf in ours:
        assert leaf is not None
        assert torch.isfinite(leaf.grad).all()


def test_the_entropy_of_a_sharp_distribution_keeps_its_digits() -> None:
    """Logits near 1000: log Σ e^z − Σ π z would leave three digits."""
    case = make_case(8, 600, 4, has_bias=True)
    assert case.bias is not None
    case.bias[:] += 1000.0
    case = case._replace(bias=case.bias.float().double(), weight=torch.zeros_like(case.weight))
    found = chunked(case, case.leaves(torch.float32), 1.0, chunk_bytes=1)
    assert gap(found.entropy, dense(case, case.leaves(torch.float64), 1.0)[1]) < 1e-6


def test_no_tokens() -> None:
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.zeros(7, 4, requires_grad=True)
    found = token_statistics(
        hidden, OutputLayer(weight, None, 1.0), torch.zeros(0, dtype=torch.long), with_entropy=True
    )
    assert found.entropy is not None
    (found.logprobs.sum() + found.entropy.sum()).backward()
    assert found.logprobs.shape == (0,)
    assert hidden.grad is not None
    assert weight.grad is not None
    assert weight.grad.abs().sum() == 0


@pytest.mark.parametrize("asked", [(True, False), (False, True)])
def test_only_what_is_asked_for_gets_a_gradient(asked: tuple[bool, bool]) -> None:
    case = make_case(5, 30, 4, has_bias=False)
    hidden, weight = case.hidden.requires_grad_(asked[0]), case.weight.requires_grad_(asked[1])
    found = token_statistics(hidden, OutputLayer(weight, None, 1.0), case.targets)
    assert found.entropy is found.topk_kl is None
    found.logprobs.sum().backward()
    assert (hidden.grad is not None, weight.grad is not None) == asked


def test_tied_weights_get_the_sum_of_their_gradients() -> None:
    """Hidden states that depend on the output layer's own weight."""
    case = make_case(6, 20, 4, has_bias=False)
    gradients = []
    for compute in (dense, chunked):
        weight = case.weight.detach().clone().requires_grad_()
        results = compute(case, [weight[:6] * 2.0, weight, None], 0.7)
        differentiate(results, case)
        gradients.append(weight.grad)
    assert gap(gradients[1], gradients[0]) < 1e-12


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("columns", [1, 4, 5, 100])
def test_best_tokens_are_those_of_full_logits_without_padding_ids(columns: int) -> None:
    case = make_case(7, 23, 5)
    table = (torch.nn.functional.linear(case.hidden, case.weight, case.bias) / 0.6).log_softmax(-1)
    expected = table[:, :20].topk(6)
    found = best_tokens(
        case.hidden,
        OutputLayer(case.weight, case.bias, 0.6),
        case.targets,
        6,
        num_tokens=20,
        chunk_bytes=columns * 7 * 8,
    )
    assert torch.equal(found.ids, expected.indices)
    assert torch.allclose(found.values, expected.values, rtol=1e-12, atol=1e-12)
    assert torch.allclose(found.logprobs, table.gather(1, case.targets[:, None])[:, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"targets": torch.tensor([0, 12, 1])}, r"target_ids: expected ids in \[0, V = 12\), given 12 at token 1"),
        ({"targets": torch.tensor([0, -1, 1])}, r"target_ids: .*given -1 at token 1"),
        ({"targets": torch.tensor([0, 1])}, r"target_ids: expected shape \[N\] = \(3,\)"),
        ({"targets": torch.tensor([0.0, 1.0, 2.0])}, r"target_ids: expected an integer dtype"),
        ({"topk_ids": torch.tensor([[0, 1], [2, 99], [0, 1]])}, r"topk_ids: .*given 99 at token 1"),
        ({"topk_ids": torch.tensor([[0, 1], [2, 2], [0, 1]])}, r"topk_ids: .*distinct ids, given 2 twice at token 1"),
        ({"topk_logits": torch.tensor([[0, 1], [2, torch.inf], [0, 1]])}, r"topk_logits: .*given inf at token 1"),
        ({"topk_logits": torch.zeros(3, 1)}, r"topk_logits: expected shape \(3, 2\)"),
        ({"bias": torch.zeros(3)}, r"bias: expected shape \[V\] = \(12,\)"),
        ({"weight": torch.zeros(12, 3)}, r"hidden and weight: expected \[N, H\] and \[V, H\]"),
    ],
)
def test_bad_input_is_refused(changed: dict[str, Any], message: str) -> None:
    case = make_case(3, 12, 4, 2)._replace(**changed)
    with pytest.raises(ValueError, match=message):
        chunked(case, [case.hidden, case.weight, case.bias], 1.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_temperature_is_refused(temperature: float) -> None:
    case = make_case(3, 12, 4)
    with pytest.raises(ValueError, match="temperature: expected a finite number above 0"):
        token_statistics(case.hidden, OutputLayer(case.weight, None, temperature), case.targets)


def tiny_model(*, is_tied: bool = True) -> Any:
    spec = MiniatureModel(hidden_size=16, num_layers=1, tie_word_embeddings=is_tied, sft_steps=0, learning_rate=1.0)
    return build_model(spec, build_tokenizer(), seed=0)


def gemma(softcap: float | None) -> Any:
    config = Gemma2Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=softcap,
    )
    torch.manual_seed(0)
    return Gemma2ForCausalLM(config)


def granite(scaling: float) -> Any:
    config = GraniteConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        logits_scaling=scaling,
    )
    torch.manual_seed(0)
    return GraniteForCausalLM(config)


class ScaledHidden(Qwen2ForCausalLM):
    """Scales the hidden states before the output layer, as some architectures do."""

    def forward(self, input_ids: Tensor, logits_to_keep: int = 0, **options: Any) -> CausalLMOutput:
        hidden = self.model(input_ids=input_ids, **options).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(0.5 * hidden[:, -logits_to_keep:]))


@pytest.mark.parametrize(
    ("make", "is_linear"),
    [
        (tiny_model, True),
        (lambda: tiny_model(is_tied=False), True),
        (lambda: gemma(30.0), False),
        (lambda: gemma(None), True),
        (lambda: granite(8.0), False),
        (lambda: granite(1.0), True),
        (lambda: ScaledHidden(tiny_model().config), False),
    ],
)
def test_models_with_more_than_an_output_layer_are_found_out(make: Any, is_linear: bool) -> None:
    model = make().eval()
    state = torch.get_rng_state()
    assert has_linear_logits(model) == is_linear
    assert torch.equal(torch.get_rng_state(), state)


def ragged_batch() -> PaddedBatch:
    return pad_sequences(
        [
            ScoreRequest(prompt_token_ids=[2, 3, 4], token_ids=[5]),
            ScoreRequest(prompt_token_ids=[6], token_ids=[7, 8, 9]),
        ]
    )


@pytest.mark.parametrize("make", [tiny_model, lambda: tiny_model(is_tied=False), lambda: gemma(2.0)])
def test_models_statistics_are_those_of_their_logits(make: Any) -> None:
    """Whichever way is taken; the gradient of every parameter as well, on padding 0."""
    batch = ragged_batch()
    is_response = batch.response_mask.bool()
    ids = torch.arange(4).expand(2, 3, 4).contiguous()
    ids[~is_response] = -7
    logits = torch.where(is_response[..., None], torch.linspace(0, 1, 4).expand(2, 3, 4), torch.nan)
    found, expected = make().double(), make().double()
    ours = LogprobModel(found, temperature=0.6)(batch, ids, logits, with_entropy=True, floor=FLOOR)
    full = response_logits(expected, batch, temperature=0.6)
    theirs = [
        *response_logprobs(full, batch, with_entropy=True),
        topk_kl(full, ids, logits, floor=FLOOR, response_mask=batch.response_mask),
    ]
    for values, reference in zip(ours, theirs, strict=True):
        assert values is not None
        assert reference is not None
        assert values.shape == (2, 3)
        assert (values[~is_response] == 0).all()
        assert gap(values, reference) < 1e-6
    torch.stack([values.sum() for values in ours if values is not None]).sum().backward()
    torch.stack([values.sum() for values in theirs if values is not None]).sum().backward()
    for ours_parameter, reference in zip(found.parameters(), expected.parameters(), strict=True):
        assert gap(ours_parameter.grad, reference.grad) < 1e-5


@pytest.mark.parametrize("make", [tiny_model, lambda: gemma(2.0)])
def test_models_best_tokens_are_those_of_their_logits(make: Any) -> None:
    batch, model = ragged_batch(), make().eval()
    with torch.no_grad():
        table = response_logits(model, batch, temperature=0.6).log_softmax(-1)
    found = LogprobModel(model, temperature=0.6).best_tokens(batch, 3, num_tokens=12)
    expected = table[..., :12].topk(3)
    is_response = batch.response_mask.bool()
    assert torch.equal(found.ids[is_response], expected.indices[is_response])
    assert gap(found.values[is_response], expected.values[is_response]) < 1e-6
    assert gap(found.logprobs[is_response], response_logprobs(table, batch)[0][is_response]) < 1e-6
