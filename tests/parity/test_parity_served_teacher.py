"""A teacher served by vLLM gives the logprobs of transformers, at temperature 1 and with another one baked in.

Needs vLLM: importable here, or by the Python that KDRL_VLLM_PYTHON names.
"""

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
from transformers import Qwen2Config, Qwen2ForCausalLM
from vllm_models import why_left_out

from flows.cli.local_prefect import free_port
from kdrl_core.config.paths import ASSETS
from kdrl_core.engines.http_scorer import HTTPScorer
from kdrl_core.engines.server_pool import ServedModel
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
def served(model: Path, log: Path) -> Iterator[str]:
    """`vllm serve` on loopback for the time of the context; its URL."""
    assert PYTHON is not None
    port = free_port()
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "t"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--api-key", KEY, "--enforce-eager", "--dtype", "float32"]
    command += ["--max-logprobs", "32"]
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
                if httpx.get(f"{url}/health", timeout=2).is_success:
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


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_vllm_gives_the_logprobs_of_transformers(tmp_path: Path, tied: bool) -> None:
    model = write_model(tmp_path / "teacher", tied=tied)
    bake_temperature(model, tmp_path / "baked", 0.6)
    for folder, temperature in ((model, 1.0), (tmp_path / "baked", 0.6)):
        with served(folder, tmp_path / "vllm.log") as url:
            scorer = HTTPScorer(ServedModel(urls=[url], api_key=KEY, retry_for_s=30.0), num_tokens=24, max_tokens=100)
            found = scorer.score(REQUESTS)
            topk = scorer.score_topk(REQUESTS, 5)
            scorer.close()
        local = TransformersScorer(load_model(model), temperature=temperature, batch_tokens=4096, num_tokens=24)
        pairs = list(zip(found, local.score(REQUESTS), strict=True))
        gap = max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs)
        print(f"tied={tied} T={temperature}: largest difference {gap:.1e}")
        assert gap < 1e-4
        for ours, theirs in zip(topk, local.score_topk(REQUESTS, 5), strict=True):
            assert (ours.topk_ids == theirs.topk_ids).mean() > 0.99  # near ties may change places
            np.testing.assert_allclose(ours.topk_logprobs, theirs.topk_logprobs, atol=1e-4)
