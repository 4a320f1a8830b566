"""Small models that vLLM can serve, and whether it is here."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kdrl_core.config import load_recipe
from kdrl_core.config.paths import ASSETS
from kdrl_core.data import render_prompts
from kdrl_core.engines.vllm_engine import VLLMSettings
from kdrl_core.miniature.models import MiniatureModel, build_model, save_model
from kdrl_core.models.loading import load_tokenizer
from kdrl_core.types import RolloutRequest

STUDENT = ASSETS / "miniature" / "student-vllm"
SETTINGS = VLLMSettings(max_model_len=96, kv_cache_gb=0.1, max_num_seqs=64)


def why_left_out() -> str:
    """What set-up wrote down where it could not install vLLM."""
    note = Path(sys.prefix, "vllm-left-out")
    said = note.read_text(encoding="utf-8").strip() if note.is_file() else ""
    return said or "vLLM is not installed: make setup"


needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason=why_left_out())


def small_model(path: Path, tokenizer: Any, *, tied: bool, seed: int) -> Path:
    """A random model whose distributions are far from uniform."""
    spec = MiniatureModel(
        hidden_size=64, num_heads=2, num_layers=2, tie_word_embeddings=tied, sft_steps=1, learning_rate=1e-3
    )
    model = build_model(spec, tokenizer, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    save_model(model, tokenizer, path)
    return path


def tokenizer() -> Any:
    return load_tokenizer(STUDENT)


def requests(num_samples: int = 4) -> list[RolloutRequest]:
    """Requests to 18 prompts, with seeds of the whole range."""
    questions = [f"{a}+{b}*{c}=?" for a in range(3) for b in range(3) for c in range(2)]
    prompts = render_prompts(questions, tokenizer(), load_recipe("miniature"))
    return [
        RolloutRequest(prompt_id=str(row), sample=sample, prompt_token_ids=ids, seed=2**63 + 10 * row + sample)
        for row, (_, ids) in enumerate(prompts)
        for sample in range(num_samples)
    ]
