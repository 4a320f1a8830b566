"""vLLM in this process against transformers: the same logprobs, before and after weight syncs, tied and untied."""

import json
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray
from support import keep_from_gc
from vllm_models import SETTINGS, STUDENT, needs_vllm, requests, small_model, tokenizer

from kdrl_core.config.paths import ASSETS
from kdrl_core.engines.sync import sync_weights
from kdrl_core.engines.transformers_engines import TransformersScorer
from kdrl_core.engines.vllm_rollout import VLLMRolloutEngine
from kdrl_core.engines.vllm_scorer import VLLMScorer
from kdrl_core.engines.vllm_support import CPU_HEAD_SIZES
from kdrl_core.engines.weight_digest import folder_digest
from kdrl_core.errors import EngineError
from kdrl_core.models.loading import load_model, stop_token_ids
from kdrl_core.types import FinishReason, Rollout, RolloutRequest, ScoreRequest
from kdrl_core.verify import verify_batch

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


def start(model: Path, *, temperature: float = TEMPERATURE, **settings: Any) -> VLLMRolloutEngine:
    return VLLMRolloutEngine(
        model,
        tokenizer(),
        replace(SETTINGS, **settings),
        stop_ids=stop_token_ids(model, tokenizer()),
        temperature=temperature,
        max_response_tokens=48,
    )


@pytest.fixture(
    scope="module", params=[pytest.param(True, id="tied"), pytest.param(False, id="untied", marks=pytest.mark.slow)]
)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of one architecture: a policy and the next one."""
    import vllm.v1.engine.llm_engine  # noqa: F401

    keep_from_gc()
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
    """As vLLM leaves it on a CPU where it is tied to the input embeddings."""
    is_tied = load_model(models[0]).config.tie_word_embeddings
    engine.rebuild(models[0])
    monkeypatch.setattr("kdrl_core.engines.vllm_extension.renew_output_layer", lambda model: None)
    engine.load_weights(models[1])
    stale = gap(engine.generate(requests()[:8]), models[1])
    assert stale > 1.0 if is_tied else stale < 1e-4
    report = sync_weights(engine, models[1], requests()[:8], reference(models[1]).score, tolerance=1e-3)
    assert report.rebuilt == is_tied
    assert ("the engine has other weights than those that were exported: the digest" in caplog.text) == is_tied
    assert report.digest == folder_digest(models[1], "float32")
    assert report.gap_max < 1e-4
    assert gap(engine.generate(requests()), models[1]) < 1e-4


def test_an_engine_that_never_agrees_is_refused(engine: VLLMRolloutEngine, models: list[Path]) -> None:
    """Its weights are right, and the trainer has others: the probe is what notices."""
    with pytest.raises(
        EngineError, match=r"nats from the trainer's in the mean, .* though it was started anew from .*Its weights are"
    ):
        sync_weights(engine, models[1], requests()[:8], reference(models[0]).score, tolerance=1e-3)


def half_precision_model(path: Path, *, tied: bool) -> Path:
    """A model whose layers add nothing, so that hidden states are the same bits in any kernel: normed embeddings. Its
    logits go beyond 16, where bfloat16 has steps of 0.125."""
    model = load_model(small_model(path, tokenizer(), tied=tied, seed=1))
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        head = model.get_output_embeddings().weight
        head.copy_(torch.randn_like(head).mul_(3 / 8 if tied else 1).to(torch.bfloat16))
    model.save_pretrained(path)
    return path


def with_exact_head(model: Any, asked: Sequence[ScoreRequest], temperature: float) -> NDArray[np.float32]:
    """Logprobs of all tokens: a bfloat16 model whose output layer multiplies in float32."""
    found = []
    with torch.inference_mode():
        for each in asked:
            ids = torch.tensor([[*each.prompt_token_ids, *each.token_ids]])
            hidden = model.model(ids).last_hidden_state[0, len(each.prompt_token_ids) - 1 : -1]
            logits = hidden.float() @ model.get_output_embeddings().weight.float().T
            chosen = torch.tensor(each.token_ids)[:, None]
            found.append((logits / temperature).log_softmax(-1).gather(1, chosen)[:, 0])
    return torch.cat(found).numpy()


def test_bfloat16_has_exact_logits_and_the_digest_finds_what_is_one_update_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without `head_dtype` the mean gap is 0.008 nats, the largest 0.11; an update at 1e-6 moves less than that."""
    path = half_precision_model(tmp_path / "old", tied=False)
    model = load_model(path)
    engine = start(path, temperature=0.6, dtype="bfloat16")
    try:
        rollouts = engine.generate(requests())
        expected = with_exact_head(load_model(path, dtype="bfloat16"), scored(rollouts), 0.6)
        gaps = np.abs(np.concatenate([r.logprobs for r in rollouts]) - expected)
        assert gaps.mean() < 1e-5
        assert gaps.max() < 1e-4

        before = [parameter.to(torch.bfloat16) for parameter in model.parameters()]
        with torch.no_grad():
            for parameter in model.parameters():  # masters in float32, as Adam's first update moves them
                parameter.add_(1e-6 * torch.randn_like(parameter).sign() * (parameter != 0))
        model.save_pretrained(tmp_path / "new")
        after = [parameter.to(torch.bfloat16) for parameter in model.parameters()]
        moved = sum(int((a != b).sum()) for a, b in zip(after, before, strict=True))
        assert 0 < moved < 0.01 * sum(each.numel() for each in after)

        ours = load_model(tmp_path / "new", dtype="bfloat16")

        def score(asked: Sequence[ScoreRequest]) -> list[NDArray[np.float32]]:
            return [with_exact_head(ours, [each], 0.6) for each in asked]

        monkeypatch.setattr(engine, "load_weights", lambda folder: None)
        ignored = {"the engine": ""}
        with monkeypatch.context() as blind:
            blind.setattr(engine, "digests", lambda: ignored)
            report = sync_weights(engine, tmp_path / "new", requests()[:8], score, tolerance=0.01, dtype="bfloat16")
        assert not report.rebuilt
        report = sync_weights(engine, tmp_path / "new", requests()[:8], score, tolerance=0.01, dtype="bfloat16")
        assert report.rebuilt
        assert "the digest of these is bfloat16:" in caplog.text
        assert report.digest == folder_digest(tmp_path / "new", "bfloat16")
    finally:
        engine.close()


def test_bfloat16_scores_have_their_temperature_on_exact_logits(tmp_path: Path) -> None:
    """Without `head_dtype` the mean gap is 0.16 nats, the largest 0.46 (tied); untied 0.05 and 0.24."""
    path = half_precision_model(tmp_path, tied=True)
    rng = np.random.default_rng(0)
    size = len(tokenizer())
    asked = [ScoreRequest(prompt_token_ids=[2, row], token_ids=rng.integers(0, size, 40).tolist()) for row in range(12)]
    ours = VLLMScorer(path, replace(SETTINGS, dtype="bfloat16", temperature=0.6), num_tokens=size)
    try:
        scores = np.concatenate(ours.score(asked))
    finally:
        ours.close()
    gaps = np.abs(scores - with_exact_head(load_model(path, dtype="bfloat16"), asked, 0.6))
    assert gaps.mean() < 1e-5
    assert gaps.max() < 1e-4


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


@pytest.mark.parametrize("k", [1, 3, 8, 12])
def test_padding_is_never_among_the_likeliest_however_much_of_it_is_likely(models: list[Path], k: int) -> None:
    """All but twelve of the ids taken for padding of the embedding."""
    ours = VLLMScorer(models[0], replace(SETTINGS, temperature=TEMPERATURE), num_tokens=12, max_topk=k)
    theirs = TransformersScorer(load_model(models[0]), temperature=TEMPERATURE, batch_tokens=4096, num_tokens=12)
    asked = [ScoreRequest(prompt_token_ids=[2, row], token_ids=[4, 11, row, 7] * 9) for row in range(12)]
    asked.append(ScoreRequest(prompt_token_ids=[2], token_ids=[]))
    try:
        for best, expected in zip(ours.score_topk(asked, k), theirs.score_topk(asked, k), strict=True):
            assert best.topk_ids.shape == expected.topk_ids.shape
            assert (best.topk_ids < 12).all()
            np.testing.assert_allclose(best.logprobs, expected.logprobs, atol=1e-4)
            np.testing.assert_allclose(best.topk_logprobs, expected.topk_logprobs, atol=1e-4)
        with pytest.raises(ValueError, match="k: expected 1 to 12"):
            ours.score_topk(asked, 13)
    finally:
        ours.close()


def test_the_whole_vocabulary_can_be_asked_for(models: list[Path]) -> None:
    size = len(tokenizer())
    ours = VLLMScorer(models[0], SETTINGS, num_tokens=size, max_topk=size)
    try:
        best = ours.score_topk([ScoreRequest(prompt_token_ids=[1], token_ids=[2, 3])], size)[0]
    finally:
        ours.close()
    assert np.exp(best.topk_logprobs).sum(axis=1) == pytest.approx(1.0, abs=1e-5)


def test_what_does_not_fit_the_context_is_refused_and_not_cut(engine: VLLMRolloutEngine) -> None:
    fits = RolloutRequest(prompt_id="p", sample=0, prompt_token_ids=[1] * 48, seed=1)
    assert len(engine.generate([fits])) == 1
    with pytest.raises(EngineError, match=r"request 1: 49 tokens given and up to 48 to come do not fit the 96"):
        engine.generate([fits, replace(fits, prompt_token_ids=[1] * 49)])


def test_logits_that_are_not_finite_are_no_rollouts(
    engine: VLLMRolloutEngine, models: list[Path], tmp_path: Path
) -> None:
    model = load_model(models[0])
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    engine.load_weights(tmp_path)
    with pytest.raises(EngineError, match=r"not finite: training has diverged"):
        engine.generate(requests()[:4])
    engine.load_weights(models[0])
    assert gap(engine.generate(requests()[:4]), models[0]) < 1e-4


def test_a_fault_of_who_listens_is_not_vllms(engine: VLLMRolloutEngine) -> None:
    def listen(rollouts: Sequence[Rollout]) -> None:
        raise KeyError(rollouts[0].prompt_id)

    with pytest.raises(KeyError):
        engine.generate(requests()[:4], on_finished=listen)
    assert len(engine.generate(requests()[:4])) == 4


def test_a_missing_checkpoint_is_named_and_the_engine_goes_on(
    engine: VLLMRolloutEngine, models: list[Path], tmp_path: Path
) -> None:
    engine.load_weights(models[0])
    with pytest.raises(EngineError, match=r"nowhere: no safetensors file is there"):
        engine.load_weights(tmp_path / "nowhere")
    assert gap(engine.generate(requests()[:4]), models[0]) < 1e-4


def test_the_whole_context_can_be_used(tmp_path: Path) -> None:
    """Prompt and response fill the model's 128 positions to the last, in sampling and in scoring."""
    model = small_model(tmp_path, tokenizer(), tied=True, seed=3)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 128}))
    settings = replace(SETTINGS, max_model_len=128)
    engine = VLLMRolloutEngine(model, tokenizer(), settings, stop_ids=[], temperature=0.8, max_response_tokens=48)
    (rollout,) = engine.generate([RolloutRequest(prompt_id="p", sample=0, prompt_token_ids=[2] * 80, seed=0)])
    engine.close()
    assert len(rollout.token_ids) == 48
    ours = VLLMScorer(model, replace(settings, temperature=TEMPERATURE), num_tokens=len(tokenizer()))
    (score,) = ours.score(scored([rollout]))
    ours.close()
    assert gap([rollout], model) < 1e-4
    np.testing.assert_allclose(score, rollout.logprobs, atol=1e-4)


def test_an_engine_can_be_used_from_another_thread(engine: VLLMRolloutEngine, models: list[Path]) -> None:
    """As Prefect's tasks do."""
    engine.load_weights(models[0])
    expected = engine.generate(requests())
    with ThreadPoolExecutor(1) as threads:
        found = threads.submit(engine.generate, requests()).result(timeout=120)
    assert [r.token_ids for r in found] == [r.token_ids for r in expected]


def test_the_known_head_sizes_are_those_of_vllm() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert list(CPU_HEAD_SIZES) == CPUAttentionBackend.get_supported_head_sizes()


@pytest.mark.parametrize("own_process", [False, True])
@pytest.mark.slow
def test_an_engine_that_sleeps_gives_its_cache_back_and_wakes_as_it_was(own_process: bool, models: list[Path]) -> None:
    """A GiB of key-value cache, in a process of its own as on GPUs, or in this one."""
    settings = replace(SETTINGS, kv_cache_gb=1.0, own_process=own_process)
    engine = VLLMRolloutEngine(
        models[0],
        tokenizer(),
        settings,
        stop_ids=stop_token_ids(models[0], tokenizer()),
        temperature=TEMPERATURE,
        max_response_tokens=48,
    )
    first = engine.generate(requests())
    before = resident_gib()
    engine.sleep()
    engine.sleep()
    assert before - resident_gib() > 0.9
    assert [r.token_ids for r in engine.generate(requests())] == [r.token_ids for r in first]
    engine.sleep()
    engine.load_weights(models[1])
    assert gap(engine.generate(requests()), models[1]) < 1e-4
    engine.close()


@pytest.mark.slow
def test_a_second_engine_starts_after_torch_has_worked_in_parallel(tmp_path: Path) -> None:
    """In processes of their own, from a thread, with a checkpoint in float32 loaded in bfloat16, while answers are
    verified: a worker that was forked now would hang in its first cast."""
    model = small_model(tmp_path, tokenizer(), tied=True, seed=1)
    run_lock = (tmp_path / "run.lock").open("w")
    os.set_inheritable(run_lock.fileno(), True)
    is_over = threading.Event()

    def verify() -> int:
        done = 0
        while not is_over.is_set():
            done += len(verify_batch([(r"<think>a</think>\boxed{1}", "1")] * 20, workers=1, timeout_s=20.0))
        return done

    def sample() -> list[list[Sequence[int]]]:
        found, before = [], dict(os.environ)
        for _ in range(2):
            torch.mm(torch.randn(800, 800), torch.randn(800, 800)).to(torch.bfloat16).sum()
            engine = start(model, dtype="bfloat16", own_process=True)
            found.append([r.token_ids for r in engine.generate(requests()[:4])])
            (worker,) = [each for each in psutil.Process().children() if "VLLM" in each.name()]
            opened = [str(each.readlink()) for each in Path(f"/proc/{worker.pid}/fd").iterdir()]
            assert any(each.startswith("pipe:") for each in opened)
            assert not any("run.lock" in each for each in opened)
            engine.close()
        changed = {name for name in {*before, *os.environ} if before.get(name) != os.environ.get(name)}
        assert not {name for name in changed if name.startswith(("VLLM_", "LD_", "OMP_"))}
        return found

    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(2) as threads:
            verified = threads.submit(verify)
            try:
                first, second = threads.submit(sample).result(timeout=400)
            finally:
                is_over.set()
            assert verified.result(timeout=60) > 0
    finally:
        torch.set_num_threads(1)
        run_lock.close()
    assert first == second


def resident_gib() -> float:
    """Of this process and its children."""
    this = psutil.Process()
    return sum(process.memory_info().rss for process in [this, *this.children(recursive=True)]) / 2**30


def test_what_vllm_cannot_serve_is_told_before_it_starts() -> None:
    with pytest.raises(
        EngineError, match=r"attention heads of size 12; vLLM on a CPU knows 32, 64.*engine transformers"
    ):
        start(ASSETS / "miniature" / "student")


def test_too_small_a_cache_names_its_setting() -> None:
    settings = replace(SETTINGS, kv_cache_gb=1e-5)
    with pytest.raises(EngineError, match=r"vllm.kv_cache_gb: 1e-05 GiB, but .* take 9.25e-05; raise it"):
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
