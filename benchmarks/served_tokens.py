"""What it costs to get scores and responses from a server of vLLM, as JSON and as kdrl's bytes.

python benchmarks/served_tokens.py [--requests 32] [--tokens 2048] [--url http://…/v1]

A model of 0.1M parameters on a CPU, so that what is measured is everything but the model: tokens per second, bytes per
token, and microseconds of processor time per token here and in the server's process that answers requests.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from kdrl_core.config.paths import ASSETS
from kdrl_core.engines import server_client
from kdrl_core.engines.http_rollout import HTTPRolloutEngine
from kdrl_core.engines.http_scorer import HTTPScorer
from kdrl_core.miniature.models import MiniatureModel, build_model, save_model
from kdrl_core.models.loading import load_tokenizer
from kdrl_core.types import RolloutRequest, ScoreRequest

CONTEXT = 32_768
TOPK = 20
STUDENT = ASSETS / "miniature" / "student-vllm"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2048, help="of a response that is scored")
    parser.add_argument("--url", help="a server that runs already; its key is in VLLM_API_KEY")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if args.url:
            compare(args.url, os.environ.get("VLLM_API_KEY"), args)
            return
        tokenizer = load_tokenizer(STUDENT)
        model = build_model(
            MiniatureModel(
                hidden_size=64, num_heads=2, num_layers=2, tie_word_embeddings=True, sft_steps=1, learning_rate=1e-3
            ),
            tokenizer,
            seed=1,
        )
        model.config.max_position_embeddings = CONTEXT
        save_model(model, tokenizer, Path(folder, "model"))
        with server(Path(folder, "model"), Path(folder)) as (url, key):
            compare(url, key, args)


@contextmanager
def server(model: Path, logs: Path) -> Iterator[tuple[str, str]]:
    """A server of a model, as a run starts it; its URL and its key."""
    from kdrl_core.engines.server_command import replicas_of
    from kdrl_core.engines.server_processes import ReplicaGroup, free_ports, new_key
    from kdrl_core.engines.vllm_engine import VLLMSettings

    settings = VLLMSettings(max_model_len=CONTEXT, kv_cache_gb=0.5, max_num_seqs=64, max_logprobs=TOPK + 8)
    key = new_key()
    group = ReplicaGroup(replicas_of(model, settings, ports=free_ports(1), key=key, logs=logs), say=print, key=key)
    try:
        group.wait_until_ready(300.0)
        yield group.urls[0], key
    finally:
        group.close()


def compare(url: str, key: str | None, args: argparse.Namespace) -> None:
    """Print a line for each kind of request and each form of the answer."""
    served: Any = server_client.ServedModel(urls=[url], api_key=key)
    rng = np.random.default_rng(0)
    scored = [
        ScoreRequest(
            prompt_token_ids=rng.integers(4, 24, 32).tolist(), token_ids=rng.integers(4, 24, args.tokens).tolist()
        )
        for _ in range(args.requests)
    ]
    sampled = [RolloutRequest(prompt_id=str(row), sample=0, prompt_token_ids=[5, 6, 7], seed=row) for row in range(64)]
    scorer = HTTPScorer(served)
    tokenizer = load_tokenizer(STUDENT)
    engine = HTTPRolloutEngine(
        served,
        tokenizer,
        stop_ids=[],
        temperature=1.0,
        max_response_tokens=256,
        max_prompt_tokens=8,
    )
    for is_json in (True, False):
        form = "JSON" if is_json else "bytes"
        for pool in (scorer._pool, engine._pool):
            pool.servers[0].has_routes = not is_json
        measure(f"scores, {form}", url, lambda: scorer.score(scored))
        measure(
            f"scores and top {TOPK}, {form}", url, lambda: [s.logprobs for s in scorer.score_topk(scored[:8], TOPK)]
        )
        measure(f"responses, {form}", url, lambda: [r.token_ids for r in engine.generate(sampled)])
    scorer.close()
    engine.close()


def measure(what: str, url: str, call: Callable[[], list[Any]]) -> None:
    """Print the best of three."""
    port = url.removesuffix("/v1").rpartition(":")[2]
    running = [(process, process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    (process,) = [process for process, words in running if port in words and words[1:2] == ["-m"]]
    received = [0]
    read_body = server_client.read_body

    def counted(*arguments: Any, **options: Any) -> bytes:
        body = read_body(*arguments, **options)
        received[0] += len(body)
        return body

    server_client.read_body = counted  # type: ignore[attr-defined]
    best: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    for _ in range(3):
        received[0] = 0
        theirs, ours, started = sum(process.cpu_times()[:2]), time.process_time(), time.perf_counter()
        tokens = sum(map(len, call()))
        seconds = time.perf_counter() - started
        ours, theirs = time.process_time() - ours, sum(process.cpu_times()[:2]) - theirs
        best = max(best, (tokens / seconds, received[0] / tokens, 1e6 * ours / tokens, 1e6 * theirs / tokens))
    server_client.read_body = read_body  # type: ignore[attr-defined]
    rate, size, ours, theirs = best
    print(f"{what:24} {rate:9,.0f} tokens/s, {size:.1f} bytes, here {ours:5.2f} µs, there {theirs:5.1f} µs a token")


if __name__ == "__main__":
    main()
