"""Tokens per second of the rollout engines on the same requests, the gap of their logprobs, the time of a sync.

python benchmarks/rollout_engines.py [--hidden 64] [--layers 2] [--responses 512]
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdrl_core.config.paths import ASSETS
from kdrl_core.engines.sync import sync_weights
from kdrl_core.engines.transformers_engines import TransformersRolloutEngine, TransformersScorer
from kdrl_core.engines.vllm_engine import VLLMSettings
from kdrl_core.engines.vllm_rollout import VLLMRolloutEngine
from kdrl_core.miniature.models import MiniatureModel, build_model, save_model
from kdrl_core.models.loading import load_model, load_tokenizer, stop_token_ids
from kdrl_core.types import Rollout, RolloutRequest, ScoreRequest

RESPONSE_TOKENS = 64


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=64, help="hidden size; heads of 32")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--responses", type=int, default=512)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(ASSETS / "miniature" / "student-vllm")
    spec = MiniatureModel(
        hidden_size=args.hidden,
        num_heads=args.hidden // 32,
        num_layers=args.layers,
        tie_word_embeddings=True,
        sft_steps=1,
        learning_rate=1e-3,
    )
    rng = np.random.default_rng(0)
    requests = [
        RolloutRequest(prompt_id=str(row), sample=0, prompt_token_ids=rng.integers(4, 24, 12).tolist(), seed=row)
        for row in range(args.responses)
    ]
    with tempfile.TemporaryDirectory() as folder:
        models = []
        for seed in (1, 2):
            save_model(build_model(spec, tokenizer, seed=seed), tokenizer, Path(folder) / str(seed))
            models.append(Path(folder) / str(seed))
        compare(models, tokenizer, requests)


def compare(models: list[Path], tokenizer: Any, requests: list[RolloutRequest]) -> None:
    """Print a line for each engine, and one for the sync."""
    options: dict[str, Any] = {
        "stop_ids": stop_token_ids(models[0], tokenizer),
        "temperature": 1.0,
        "max_response_tokens": RESPONSE_TOKENS,
    }
    model = load_model(models[0])
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {len(requests)} responses")
    scorers = [TransformersScorer(load_model(path), temperature=1.0, batch_tokens=8192) for path in models]
    plain = TransformersRolloutEngine(model, tokenizer, batch_size=256, **options)
    rate = measure("transformers", plain, requests, scorers[0])
    settings = VLLMSettings(max_model_len=12 + RESPONSE_TOKENS, kv_cache_gb=0.5)
    vllm = VLLMRolloutEngine(models[0], tokenizer, replace(settings, max_num_seqs=256), **options)
    print(f"vllm / transformers {measure('vllm', vllm, requests, scorers[0]) / rate:.2f}")
    report = sync_weights(vllm, models[1], requests[:8], scorers[1].score, tolerance=1e-3)
    print(f"sync {report.seconds:.3f} s, gap {report.gap_max:.1e}, started anew: {report.rebuilt}")
    vllm.close()


def measure(name: str, engine: Any, requests: list[RolloutRequest], scorer: TransformersScorer) -> float:
    """Tokens per second, the best of three."""
    best, rollouts = 0.0, list[Rollout]()
    for _ in range(3):
        started = time.perf_counter()
        rollouts = engine.generate(requests)
        best = max(best, sum(len(r.token_ids) for r in rollouts) / (time.perf_counter() - started))
    asked = [ScoreRequest(prompt_token_ids=r.prompt_token_ids, token_ids=r.token_ids) for r in rollouts]
    gap = max(np.abs(r.logprobs - s).max() for r, s in zip(rollouts, scorer.score(asked), strict=True))
    print(f"{name:13} {best:9,.0f} tokens/s, largest logprob gap {gap:.1e}")
    return best


if __name__ == "__main__":
    main()
