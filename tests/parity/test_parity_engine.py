"""The rollout engine against `model.generate`, a dense forward pass, and the distribution it claims to sample."""

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity.conftest import dense_log_probabilities, dense_logprobs, largest_gap
from transformers import DynamicCache

from kdrl_core.engines.decoding import Decoding, share_key_values
from kdrl_core.engines.transformers_engines import TransformersRolloutEngine
from kdrl_core.errors import EngineError
from kdrl_core.ledger import derive_seed
from kdrl_core.miniature.models import MiniatureModel, build_model
from kdrl_core.models.loading import load_model
from kdrl_core.types import FinishReason, Rollout, RolloutRequest

MakeEngine = Callable[..., TransformersRolloutEngine]


def test_greedy_is_generate_token_by_token(
    make_engine: MakeEngine, student: Any, tokenizer: Any, stop_ids: tuple[int, ...], requests: list[RolloutRequest]
) -> None:
    width = max(len(r.prompt_token_ids) for r in requests)
    assert len({len(r.prompt_token_ids) for r in requests}) > 3
    padded = [[tokenizer.pad_token_id] * (width - len(r.prompt_token_ids)) + [*r.prompt_token_ids] for r in requests]
    ids = torch.tensor(padded)
    generated = student.generate(
        input_ids=ids,
        attention_mask=(ids != tokenizer.pad_token_id).long(),
        do_sample=False,
        temperature=None,
        max_new_tokens=48,
        eos_token_id=list(stop_ids),
        pad_token_id=tokenizer.pad_token_id,
    )[:, width:].tolist()
    rollouts = make_engine(temperature=0.0).generate(requests)
    for rollout, reference in zip(rollouts, generated, strict=True):
        ends = [position for position, token in enumerate(reference) if token in stop_ids]
        assert list(rollout.token_ids) == (reference[: ends[0] + 1] if ends else reference)
    with torch.no_grad():
        expected = [dense_logprobs(student, rollout, 1.0) for rollout in rollouts]
    assert largest_gap([rollout.logprobs for rollout in rollouts], expected) < 1e-5


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_logprobs_are_those_of_the_tempered_distribution(
    make_engine: MakeEngine, student: Any, requests: list[RolloutRequest], temperature: float
) -> None:
    rollouts = make_engine(temperature=temperature).generate(requests)
    with torch.no_grad():
        expected = [dense_logprobs(student, rollout, temperature) for rollout in rollouts]
    assert any(rollout.finish_reason is FinishReason.STOP for rollout in rollouts)  # so EOS's logprob is among them
    assert (
        largest_gap([rollout.logprobs for rollout in rollouts], expected) < 2e-5
    )  # in float32 processors differ by up to 1.1e-5


def test_response_depends_on_its_request_alone(make_engine: MakeEngine, requests: list[RolloutRequest]) -> None:
    def generate(order: list[int], batch_size: int) -> dict[tuple[str, int], Rollout]:
        found = make_engine(batch_size=batch_size).generate([requests[i] for i in order])
        assert [(r.prompt_id, r.sample) for r in found] == [(requests[i].prompt_id, requests[i].sample) for i in order]
        return {(r.prompt_id, r.sample): r for r in found}

    straight = list(range(len(requests)))
    shuffled = np.random.default_rng(0).permutation(len(requests)).tolist()
    reference = generate(straight, 64)
    for order, batch_size in [(straight[::-1], 64), (shuffled, 64), (shuffled, 7), (straight, 1)]:
        for key, rollout in generate(order, batch_size).items():
            assert list(rollout.token_ids) == list(reference[key].token_ids)
            assert (rollout.text, rollout.finish_reason) == (reference[key].text, reference[key].finish_reason)
            assert rollout.logprobs == pytest.approx(reference[key].logprobs, abs=1e-5, rel=1e-5)


def test_same_requests_give_the_same_bits(make_engine: MakeEngine, requests: list[RolloutRequest]) -> None:
    assert make_engine().generate(requests) == make_engine().generate(requests)


def test_samples_of_a_prompt_differ(rollouts: list[Rollout]) -> None:
    by_prompt: dict[str, set[tuple[int, ...]]] = {}
    for rollout in rollouts:
        by_prompt.setdefault(rollout.prompt_id, set()).add(tuple(rollout.token_ids))
    assert any(len(responses) > 1 for responses in by_prompt.values())


def test_each_response_is_heard_once_and_early(make_engine: MakeEngine, requests: list[RolloutRequest]) -> None:
    heard: list[list[Rollout]] = []
    rollouts = make_engine(batch_size=10).generate(requests, on_finished=lambda new: heard.append(list(new)))
    assert len(heard) > 3  # some before their batch was done
    assert sorted((r for new in heard for r in new), key=by_request) == sorted(rollouts, key=by_request)
    assert [(r.prompt_id, r.sample) for r in rollouts] == [(q.prompt_id, q.sample) for q in requests]
    # Batches one after the other, and within the first one the shorter before the longer.
    assert {by_request(r) for new in heard for r in new[:10]} >= {(q.prompt_id, q.sample) for q in requests[:10]}
    sizes = [len(r.token_ids) for new in heard[: len(heard) // 2] for r in new]
    assert min(sizes) < max(len(r.token_ids) for r in rollouts)


def by_request(rollout: Rollout) -> tuple[str, int]:
    return rollout.prompt_id, rollout.sample


def _chi_square(counts: Counter[Any], expected: dict[Any, float]) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom, cells expected fewer than 5 times pooled into one."""
    assert set(counts) <= set(expected)
    cells = [(counts[cell], value) for cell, value in expected.items() if value >= 5.0]
    rest = sum(counts.values()) - sum(count for count, _ in cells), sum(expected.values()) - sum(v for _, v in cells)
    if rest[1] >= 5.0:
        cells.append(rest)
    return sum((count - value) ** 2 / value for count, value in cells), len(cells) - 1


@pytest.mark.parametrize("temperature", [0.1, 0.25])
def test_tokens_are_drawn_from_the_distribution(make_engine: MakeEngine, random_model: Any, temperature: float) -> None:
    """Pairs of tokens, so that the draws at two positions must be independent as well."""
    num_draws, prompt = 6_000, [2, 8, 17, 9, 3]
    requests = [
        RolloutRequest(prompt_id="p", sample=i, prompt_token_ids=prompt, seed=derive_seed("chi-square", i))
        for i in range(num_draws)
    ]
    engine = make_engine(
        random_model, temperature=temperature, stop_ids=[99], max_response_tokens=2, batch_size=num_draws
    )
    counts = Counter(tuple(rollout.token_ids) for rollout in engine.generate(requests))
    vocabulary = random_model.config.vocab_size
    sequences = torch.tensor([[*prompt, first] for first in range(vocabulary)])
    with torch.no_grad():
        probabilities = (random_model(input_ids=sequences).logits / temperature).softmax(-1).double()
    first, second = probabilities[0, len(prompt) - 1], probabilities[:, len(prompt)]
    assert first.max() > 2 / vocabulary  # not merely uniform
    expected = {
        (a, b): float(num_draws * first[a] * second[a, b]) for a in range(vocabulary) for b in range(vocabulary)
    }
    statistic, freedom = _chi_square(counts, expected)
    assert freedom > 20
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5


def test_an_impossible_token_is_never_drawn(make_engine: MakeEngine, tokenizer: Any) -> None:
    """All mass on one token: the draw's edges must not fall on its neighbours."""
    spec = MiniatureModel(hidden_size=16, num_layers=1, tie_word_embeddings=False, sft_steps=0, learning_rate=1.0)
    model = build_model(spec, tokenizer, seed=0).eval()
    model.lm_head.weight.data.zero_()
    model.lm_head.bias = torch.nn.Parameter(torch.full((len(tokenizer),), -1e4))
    for token in (0, 11, len(tokenizer) - 1):
        model.lm_head.bias.data.fill_(-1e4)
        model.lm_head.bias.data[token] = 0.0
        requests = [
            RolloutRequest(prompt_id="p", sample=i, prompt_token_ids=[2, 3], seed=derive_seed("edge", i))
            for i in range(500)
        ]
        (row,) = {
            tuple(rollout.token_ids)
            for rollout in make_engine(model, stop_ids=[99], max_response_tokens=2, batch_size=500).generate(requests)
        }
        assert row == (token, token)


def test_stop_and_length(make_engine: MakeEngine, random_model: Any, requests: list[RolloutRequest]) -> None:
    stop_ids, limit = (4, 9, 13), 12
    rollouts = make_engine(random_model, stop_ids=stop_ids, max_response_tokens=limit).generate(requests)
    by_reason = Counter(rollout.finish_reason for rollout in rollouts)
    assert min(by_reason[FinishReason.STOP], by_reason[FinishReason.LENGTH]) > 0
    assert {rollout.token_ids[-1] for rollout in rollouts} >= set(stop_ids)
    for rollout in rollouts:
        assert len(rollout.logprobs) == len(rollout.token_ids)
        assert not set(rollout.token_ids[:-1]) & set(stop_ids)
        if rollout.finish_reason is FinishReason.STOP:
            assert rollout.token_ids[-1] in stop_ids
        else:
            assert len(rollout.token_ids) == limit
            assert rollout.token_ids[-1] not in stop_ids


def test_stop_on_the_last_allowed_token_is_a_stop(make_engine: MakeEngine, rollouts: list[Rollout]) -> None:
    stopped = next(rollout for rollout in rollouts if rollout.finish_reason is FinishReason.STOP)
    request = RolloutRequest(
        prompt_id=stopped.prompt_id,
        sample=stopped.sample,
        prompt_token_ids=stopped.prompt_token_ids,
        seed=derive_seed("parity", stopped.prompt_id, stopped.sample),
    )
    limit = len(stopped.token_ids)
    (same,) = make_engine(max_response_tokens=limit).generate([request])
    assert (list(same.token_ids), same.finish_reason) == (list(stopped.token_ids), FinishReason.STOP)
    (cut,) = make_engine(max_response_tokens=limit - 1).generate([request])
    assert (list(cut.token_ids), cut.finish_reason) == (list(stopped.token_ids)[:-1], FinishReason.LENGTH)


def test_text_leaves_special_tokens_out(rollouts: list[Rollout], tokenizer: Any) -> None:
    for rollout in rollouts:
        assert rollout.text == tokenizer.decode(list(rollout.token_ids), skip_special_tokens=True)
        assert tokenizer.eos_token not in rollout.text
    assert any("\\boxed{" in rollout.text for rollout in rollouts)


def test_batch_shrinks_as_responses_end_and_nothing_changes(
    make_engine: MakeEngine, random_model: Any, requests: list[RolloutRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    select = DynamicCache.batch_select_indices

    def spy(self: DynamicCache, indices: torch.Tensor) -> None:
        kept.append(len(indices))
        select(self, indices)

    monkeypatch.setattr(DynamicCache, "batch_select_indices", spy)
    options: dict[str, Any] = {"stop_ids": (4, 9, 13, 20), "max_response_tokens": 40}
    together = make_engine(random_model, **options).generate(requests)
    assert kept[0] == len(requests)  # the prompts' cache, repeated for their samples
    assert len(kept) >= 4
    assert all(after < 0.75 * before for before, after in pairwise(kept))
    alone = make_engine(random_model, batch_size=1, **options).generate(requests)
    assert [list(r.token_ids) for r in together] == [list(r.token_ids) for r in alone]
    with torch.no_grad():
        expected = [dense_logprobs(random_model, rollout, 1.0) for rollout in together]
    assert largest_gap([rollout.logprobs for rollout in together], expected) < 1e-5


def test_load_weights_changes_the_policy(
    make_engine: MakeEngine, student_dir: Path, requests: list[RolloutRequest], rollouts: list[Rollout]
) -> None:
    model = load_model(student_dir)
    model.lm_head.weight.data.neg_()
    engine = make_engine(model)
    assert engine.generate(requests) != rollouts
    engine.load_weights(student_dir)
    assert engine.generate(requests) == rollouts


def test_logits_that_are_not_finite_are_an_error(
    make_engine: MakeEngine, tokenizer: Any, requests: list[RolloutRequest]
) -> None:
    spec = MiniatureModel(hidden_size=16, num_layers=1, tie_word_embeddings=True, sft_steps=0, learning_rate=1.0)
    model = build_model(spec, tokenizer, seed=0).eval()
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(EngineError, match="logits are not finite"):
        make_engine(model).generate(requests)


def test_dense_reference_is_a_distribution(student: Any, rollouts: list[Rollout]) -> None:
    with torch.no_grad():
        table = dense_log_probabilities(student, rollouts[0], 0.6)
    assert table.exp().sum(-1).tolist() == pytest.approx([1.0] * len(rollouts[0].token_ids), abs=1e-5)


@torch.inference_mode()
def test_a_cache_with_room_and_shared_heads_changes_no_bit(student_dir: Path, monkeypatch: Any) -> None:
    """Rows leave in the middle, and the cache outgrows its memory twice. transformers' own beside it."""
    model = load_model(student_dir)
    assert model.config.num_attention_heads > model.config.num_key_value_heads

    def logits_of_all_steps() -> list[torch.Tensor]:
        decoding = Decoding(model, [[5, 6, 7], [8, 9, 10, 11, 12]], limit=150, cache_method="batch_select_indices")
        found = [decoding.logits]
        for step in range(149):
            chosen = decoding.logits.argmax(-1)
            if step in (20, 90):
                rows = torch.tensor([0, 1, 0] if step == 20 else [2, 1])
                decoding.keep(rows)
                chosen = chosen[rows]
            decoding.append(chosen)
            found.append(decoding.logits)
        return found

    share_key_values(model)
    fast = logits_of_all_steps()
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr("kdrl_core.engines.decoding._roomy_cache", lambda model: DynamicCache(config=model.config))
    assert all(map(torch.equal, fast, logits_of_all_steps()))
