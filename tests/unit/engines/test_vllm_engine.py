"""What of vLLM's start can be decided without it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kdrl_core.engines.vllm_engine import VLLMSettings, batched_tokens
from kdrl_core.engines.vllm_support import hf_overrides

SCORES = VLLMSettings(max_model_len=20_481, samples=False)


@pytest.mark.parametrize(("vocab_size", "tokens"), [(151_936, 441), (32_768, 2048), (27, 2048)])
def test_logits_of_what_is_scored_at_once_are_bounded(vocab_size: int, tokens: int, tmp_path: Path) -> None:
    """By 2^28 bytes of float32, and by 2048 tokens: 2^28 / (4 x 151,936) = 441.7."""
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": vocab_size}))
    assert batched_tokens(tmp_path, SCORES) == tokens
    assert batched_tokens(tmp_path, replace(SCORES, samples=True)) == 20_481


@pytest.mark.parametrize(
    ("context", "dtype", "max_model_len", "samples", "overrides"),
    [
        (128, "float32", 128, True, {}),
        (128, "bfloat16", 128, True, {"head_dtype": "float32"}),
        (128, "float32", 129, False, {"max_position_embeddings": 129}),
        (128, "bfloat16", 129, False, {"head_dtype": "float32", "max_position_embeddings": 129}),
        (128, "float32", 129, True, {}),  # vLLM refuses it
        (None, "float32", 129, False, {}),
    ],
)
def test_changes_to_a_models_config(
    context: int | None, dtype: str, max_model_len: int, samples: bool, overrides: dict[str, object]
) -> None:
    assert hf_overrides(context, dtype=dtype, max_model_len=max_model_len, samples=samples) == overrides


@pytest.mark.parametrize(("runner", "tokens"), [(None, 8192), ("1", 8192), ("0", 441)])
def test_a_gpu_scores_long_pieces_unless_vllm_keeps_all_their_logits(
    runner: str | None, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's earlier model runner, which VLLM_USE_V2_MODEL_RUNNER=0 asks for, has the logits of a whole piece."""
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    if runner is not None:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 151_936}))
    assert batched_tokens(tmp_path, replace(SCORES, device="cuda")) == tokens
