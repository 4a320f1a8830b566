"""vLLM in this process against transformers: the same logprobs, before and after weight syncs, tied and untied."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from vllm_models import SETTINGS, STUDENT, needs_vllm, requests, small_model, tokenizer

from kdrl_core.config.paths import ASSETS
from kdrl_core.engines.models import load_model, stop_token_ids
from kdrl_core.engines.sync import sync_weights
from kdrl_core.engines.transformers_scorer import TransformersScorer
from kdrl_core.engines.vllm_rollout import VLLMRolloutEngine
from kdrl_core.engines.vllm_scorer import VLLMScorer
from kdrl_core.errors import EngineError
from kdrl_core.types import FinishReason, Rollout, ScoreRequest

pytestmark = needs_vllm
TEMPERATURE = 0.8


def scored(rollouts: Sequence[Rollout]) -> list[ScoreRequest]:
    return [ScoreRequest(prompt_token_ids=r.prompt_token_ids, token_ids=r.token_ids) for r in rollouts]


def reference(model: Path, *, temperature: float = TEMPERATURE) -> TransformersScorer:
    return TransformersScorer(
        load_model(model), temperature=temperature, batch_tokens=4096, num_tokens=len(tokenizer())
    )


def gap(rollouts: Sequence[Rollout], model: Path) -> float:
    """Largest difference of the recorded logprobs from those of transformers."""
    theirs = reference(model).score(scored(rollouts))
    return max(float(np.abs(np.asarray(r.logprobs) - t).max()) for r, t in zip(rollouts, theirs, strict=True))


def start(model: Path, *, temperature: float = TEMPERATURE) -> VLLMRolloutEngine:
    return VLLMRolloutEngine(
        model,
        tokenizer(),
        SETTINGS,
        stop_ids=stop_token_ids(model, tokenizer()),
        temperature=temperature,
        max_response_tokens=48,
    )


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of one architecture: a policy and the next one."""
    folder = tmp_path_factory.mktemp("models")
    return [small_model(folder / str(seed), tokenizer(), tied=request.param, seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def engine(models: list[Path]) -> Iterator[VLLMRolloutEngine]:
    engine = start(models[0])
    yield engine
    engine.close()


def test_sampled_logprobs_are_those_of_transformers_before_and_after_a_sync(
    engine: VLLMRolloutEngine, models: list[Path]
) -> None:
    engine.load_weights(models[0])
    heard: list[Rollout] = []
    rollouts = engine.generate(requests(), on_finished=heard.extend)
    assert gap(rollouts, models[0]) < 1e-4
    assert sorted(r.prompt_id for r in heard) == sorted(r.prompt_id for r in rollouts)
    assert [(r.prompt_id, r.sample) for r in rollouts] == [(r.prompt_id, r.sample) for r in requests()]
    assert {r.finish_reason for r in rollouts} == {FinishReason.STOP, FinishReason.LENGTH}
    stop = set(stop_token_ids(models[0], tokenizer()))
    for rollout in rollouts:
        ended = rollout.token_ids[-1] in stop
        assert ended == (rollout.finish_reason is FinishReason.STOP)
        assert not stop & set(rollout.token_ids[:-1])
        assert len(rollout.token_ids) == 48 or ended
    engine.load_weights(models[1])
    assert gap(engine.generate(requests()), models[1]) < 1e-4


def test_a_response_depends_on_its_seed_and_not_on_the_others(engine: VLLMRolloutEngine) -> None:
    whole = engine.generate(requests())
    part = engine.generate(requests()[5:9])
    assert [r.token_ids for r in part] == [r.token_ids for r in whole[5:9]]
    assert len({tuple(r.token_ids) for r in whole}) > 30
    short = engine.generate(requests()[:4], max_response_tokens=3)
    assert [r.token_ids[:3] for r in whole[:4]] == [r.token_ids for r in short]


def test_a_stale_output_layer_is_caught_and_the_engine_started_anew(
    engine: VLLMRolloutEngine, models: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As vLLM leaves it on a CPU where it is tied to the input embeddings; the probe is what notices."""
    is_tied = load_model(models[0]).config.tie_word_embeddings
    engine.rebuild(models[0])
    monkeypatch.setattr("kdrl_core.engines.vllm_extension.renew_output_layer", lambda model: None)
    report = sync_weights(engine, models[1], requests()[:8], reference(models[1]).score, tolerance=1e-3)
    assert report.rebuilt == is_tied
    assert ("nats from the trainer's after it took" in caplog.text) == is_tied
    assert report.gap_max < 1e-4
    assert gap(engine.generate(requests()), models[1]) < 1e-4


def test_an_engine_that_never_agrees_is_refused(engine: VLLMRolloutEngine, models: list[Path]) -> None:
    with pytest.raises(EngineError, match=r"nats from the trainer's in the mean, .* though it was started anew from"):
        sync_weights(engine, models[1], requests()[:8], reference(models[0]).score, tolerance=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_and_likeliest_tokens_are_those_of_transformers(models: list[Path], temperature: float) -> None:
    rng = np.random.default_rng(0)
    size = len(tokenizer())
    asked = [
        ScoreRequest(
            prompt_token_ids=rng.integers(0, size, 1 + row % 9).tolist(),
            token_ids=rng.integers(0, size, 1 + 7 * (row % 10)).tolist(),
        )
        for row in range(30)
    ]
    ours = VLLMScorer(models[0], replace(SETTINGS, temperature=temperature), num_tokens=size, max_topk=5)
    theirs = reference(models[0], temperature=temperature)
    try:
        for one, other in zip(ours.score(asked), theirs.score(asked), strict=True):
            assert one.dtype == np.float32
            np.testing.assert_allclose(one, other, atol=1e-4)
        for best, expected in zip(ours.score_topk(asked, 5), theirs.score_topk(asked, 5), strict=True):
            np.testing.assert_allclose(best.topk_logprobs, expected.topk_logprobs, atol=1e-4)
            assert (best.topk_ids == expected.topk_ids).mean() > 0.99  # ties may be in another order
    finally:
        ours.close()


def test_what_vllm_cannot_serve_is_told_before_it_starts() -> None:
    with pytest.raises(
        EngineError, match=r"attention heads of size 12; vLLM on a CPU knows 32, 64.*engine transformers"
    ):
        start(ASSETS / "miniature" / "student")


def test_too_small_a_cache_names_its_setting() -> None:
    settings = replace(SETTINGS, kv_cache_gb=1e-5)
    with pytest.raises(EngineError, match=r"key-value cache is too small .*raise vllm\.kv_cache_gb, now 1e-05"):
        VLLMScorer(STUDENT, settings, num_tokens=24)


def test_closing_one_engine_leaves_the_others_at_work(engine: VLLMRolloutEngine, models: list[Path]) -> None:
    before = os.environ.get("LD_PRELOAD")
    expected = [r.token_ids for r in engine.generate(requests()[:8])]
    other = start(models[1])
    other.generate(requests()[:4])
    other.close()
    other.close()
    assert [r.token_ids for r in engine.generate(requests()[:8])] == expected
    assert os.environ.get("LD_PRELOAD") == before  # every child process would inherit it


def test_threads_stay_as_they_were(engine: VLLMRolloutEngine) -> None:
    """vLLM's CPU worker makes torch.set_num_threads do nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
