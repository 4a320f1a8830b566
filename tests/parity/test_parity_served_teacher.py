"""A teacher served by the documented commands gives the logprobs of transformers at the temperature baked into it.

Needs vLLM: importable here, or by the Python that KDRL_VLLM_PYTHON names.
"""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from documented import serving
from transformers import Qwen2Config, Qwen2ForCausalLM
from vllm_models import why_left_out

from flows.cli.local_prefect import free_port
from kdrl_core.config.paths import ASSETS
from kdrl_core.engines.http_scorer import HTTPScorer
from kdrl_core.engines.server_client import ServedModel
from kdrl_core.engines.transformers_engines import TransformersScorer
from kdrl_core.models.loading import load_model
from kdrl_core.models.prepare import bake_temperature
from kdrl_core.types import ScoreRequest

PYTHON = os.environ.get("KDRL_VLLM_PYTHON") or (sys.executable if find_spec("vllm") else None)
KEY = "sk-parity"
REQUESTS = [
    ScoreRequest(prompt_token_ids=list(range(4, 4 + n)), token_ids=[9, 4, 7, 11, 6, 1, 13, 8][: 2 + n % 7])
    for n in range(1, 17)
]
needs_vllm = pytest.mark.skipif(PYTHON is None, reason=f"{why_left_out()}; or set KDRL_VLLM_PYTHON")


def write_model(folder: Path, *, tied: bool) -> Path:
    """A random Qwen2 with the miniature's tokenizer and heads of 32, which vLLM's CPU attention can do."""
    source = ASSETS / "miniature" / "teacher"
    config = Qwen2Config.from_pretrained(source)
    config.update(
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "layer_types": None,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "tie_word_embeddings": tied,
            "max_position_embeddings": 131_072,  # as Skywork-OR1-Math-7B's
        }
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in config.to_dict().items() if v is not None}))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    for file in source.glob("*token*"):
        shutil.copy(file, folder)
    return folder


def expected(model: Path, temperature: float) -> list[np.ndarray]:
    return TransformersScorer(load_model(model), temperature=temperature, batch_tokens=4096).score(REQUESTS)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_a_baked_model_has_the_logprobs_of_the_temperature(tmp_path: Path, tied: bool, temperature: float) -> None:
    model = write_model(tmp_path / "teacher", tied=tied)
    bake_temperature(model, tmp_path / "baked", temperature)
    for ours, theirs in zip(expected(tmp_path / "baked", 1.0), expected(model, temperature), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@contextmanager
def served(command: list[str], log: Path) -> Iterator[str]:
    """A server on loopback for the time of the context; its URL."""
    port = free_port()
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_API_KEY": KEY,
    }
    command = [*command, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, env={**os.environ, **settings}, stdout=output, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 240
        while True:
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                if httpx.get(f"{url}/v1/models", timeout=2, headers={"Authorization": f"Bearer {KEY}"}).is_success:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield f"{url}/v1"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def documented_command(program: str, model: Path) -> list[str]:
    """`kdrl serve` or `vllm serve` of docs/teacher-servers.md, for a CPU, with another model."""
    assert PYTHON is not None
    blocks = [block for page, block in serving() if page == "teacher-servers"]
    (words,) = [words for block in blocks for words in block if words[:2] == [program, "serve"]]
    if program == "kdrl":
        named = [str(model) if before == "--model" else word for before, word in itertools.pairwise(words)]
        return [PYTHON, "-m", "flows.cli", *named, "--cpu"]
    start = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    return [*start, *words[3:], "--enforce-eager"]


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("program", ["vllm", "kdrl"])
def test_a_documented_teacher_gives_the_logprobs_of_transformers(tmp_path: Path, program: str) -> None:
    model = write_model(tmp_path / "teacher", tied=True)
    bake_temperature(model, tmp_path / "baked", 0.6)
    limit = 1024 + 20_480
    longest = ScoreRequest(prompt_token_ids=[5, 6, 7, 8] * 256, token_ids=[9, 4, 7, 11, 6, 1, 13, 8] * 2560)
    with served(documented_command(program, tmp_path / "baked"), tmp_path / "vllm.log") as url:
        scorer = HTTPScorer(ServedModel(urls=[url], api_key=KEY, retry_for_s=30.0), num_tokens=24, max_tokens=limit)
        found = scorer.score(REQUESTS)
        topk = scorer.score_topk(REQUESTS, 5)
        (whole,) = scorer.score([longest])
        assert scorer._pool.servers[0].has_routes == (program == "kdrl")
        refused = httpx.post(f"{url.removesuffix('/v1')}/collective_rpc", json={"method": "kdrl_sleep"})
        assert refused.status_code == (401 if program == "kdrl" else 404)
        scorer.close()
    assert whole.shape == (20_480,)
    local = TransformersScorer(load_model(model), temperature=0.6, batch_tokens=4096, num_tokens=24)
    pairs = list(zip(found, local.score(REQUESTS), strict=True))
    gap = max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs)
    print(f"{program} serve: largest difference {gap:.1e}")
    assert gap < 1e-4
    for ours, theirs in zip(topk, local.score_topk(REQUESTS, 5), strict=True):
        assert (ours.topk_ids == theirs.topk_ids).mean() > 0.99  # near ties may change places
        np.testing.assert_allclose(ours.topk_logprobs, theirs.topk_logprobs, atol=1e-4)
