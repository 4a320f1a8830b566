"""Two real vLLM replicas, started by `kdrl serve`: their logprobs are those of transformers after every sync."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from crash.tiny_run import open_tiny, train
from vllm_models import needs_vllm, requests, small_model, tokenizer

from kdrl_core.engines.http_rollout import HTTPRolloutEngine
from kdrl_core.engines.models import load_model, stop_token_ids
from kdrl_core.engines.server_pool import ServedModel
from kdrl_core.engines.transformers_scorer import TransformersScorer
from kdrl_core.rollouts.metrics import load_metrics
from kdrl_core.rollouts.schema import read_table
from kdrl_core.types import ScoreRequest

pytestmark = [pytest.mark.slow, needs_vllm]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two policies with tied embeddings, which vLLM reloads wrongly by itself."""
    folder = tmp_path_factory.mktemp("models")
    return [small_model(folder / str(seed), tokenizer(), tied=True, seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def urls(models: list[Path]) -> Iterator[list[str]]:
    processes, urls = [], []
    try:
        for _ in range(2):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            options = ["--max-model-len", "96", "--dtype", "float32", "--cpu", "--kv-cache-gb", "0.1"]
            command = [sys.executable, "-m", "flows.cli", "serve", "--model", str(models[0]), "--port", str(port)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            processes.append(subprocess.Popen([*command, *options], env=environment, start_new_session=True))
            urls.append(f"http://127.0.0.1:{port}/v1")
        deadline = time.monotonic() + 400
        for url in urls:
            while not _answers(url):
                assert time.monotonic() < deadline, "the replicas did not start"
                time.sleep(1)
        yield urls
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/models", trust_env=False).is_success
    except httpx.TransportError:
        return False


def test_replicas_sample_from_the_policy_that_they_were_told_to_load(urls: list[str], models: list[Path]) -> None:
    engine = HTTPRolloutEngine(
        ServedModel(urls=urls, timeout_s=60.0, retry_for_s=60.0),
        tokenizer(),
        stop_ids=stop_token_ids(models[0], tokenizer()),
        temperature=0.8,
        max_response_tokens=48,
        max_prompt_tokens=40,
    )
    for model in (models[1], models[0]):
        engine.load_weights(model)
        rollouts = engine.generate(requests())
        asked = [ScoreRequest(prompt_token_ids=r.prompt_token_ids, token_ids=r.token_ids) for r in rollouts]
        theirs = TransformersScorer(load_model(model), temperature=0.8, batch_tokens=4096).score(asked)
        gap = max(np.abs(r.logprobs - t).max() for r, t in zip(rollouts, theirs, strict=True))
        print(f"replicas: largest logprob gap {gap:.1e}")
        assert gap < 1e-4
        assert [r.token_ids for r in engine.generate(requests())] == [r.token_ids for r in rollouts]
    engine.close()


@pytest.mark.usefixtures("fast_sessions")
def test_a_stage_is_trained_on_their_rollouts(urls: list[str], models: list[Path], tmp_path: Path) -> None:
    listed = ",".join(f"'{url}'" for url in urls)
    overrides = [
        f"student.path={models[0]}",
        "stage1=null",
        "stage2.steps=3",
        "rollout.engine=server",
        f"rollout.server.urls=[{listed}]",
    ]
    run = open_tiny(tmp_path, "r", overrides)
    train(run)
    for row in load_metrics(run, "stage2"):
        assert row["sync/gap_max"] < 1e-4
        assert row["engine/logprob_gap_max"] < 1e-4
    assert set(read_table(run.paths.rollouts("stage2", 2))["engine"].to_pylist()) == {"server"}
