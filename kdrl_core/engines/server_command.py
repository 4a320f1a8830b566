"""How a server of vLLM is started so that kdrl can use it: the arguments and the environment of one."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import kdrl_core
from kdrl_core.engines.server_processes import Replica
from kdrl_core.engines.vllm_engine import VLLMSettings, batched_tokens
from kdrl_core.engines.vllm_support import hf_overrides
from kdrl_core.models.loading import context_limit, read_config

_OF_KDRL = (
    *("--logprobs-mode", "processed_logprobs"),  # of softmax(logits / T)
    *("--generation-config", "vllm"),  # else requests get the model's own top-k, top-p and penalties by default
    *("--worker-extension-cls", "kdrl_core.engines.vllm_extension.KdrlWorker"),
    *("--middleware", "kdrl_core.engines.server_routes.KdrlRoutes"),
    "--disable-uvicorn-access-log",  # a line for every response
    "--no-enable-prefix-caching",  # its entries would be stale after a weight sync
)
_ROOT = Path(kdrl_core.__file__).parents[1]


def server_arguments(model: Path, settings: VLLMSettings) -> list[str]:
    """Arguments of vLLM's server for a model directory; without its address."""
    arguments = [
        *("--model", str(model.absolute()), "--served-model-name", model.absolute().name),
        *("--dtype", settings.dtype, "--max-model-len", str(settings.max_model_len)),
        *("--max-num-seqs", str(settings.max_num_seqs), "--max-num-batched-tokens", str(_pass_tokens(model, settings))),
        *(
            "--tensor-parallel-size",
            str(settings.tensor_parallel),
            "--max-logprobs",
            str(max(1, settings.max_logprobs)),
        ),
        *_OF_KDRL,
    ]
    context = context_limit(read_config(model))
    samples = context is None or settings.max_model_len <= context  # a longer server scores: kdrl serve is not told
    overrides = hf_overrides(context, dtype=settings.dtype, max_model_len=settings.max_model_len, samples=samples)
    if overrides:
        arguments += ["--hf-overrides", json.dumps(overrides)]
    if settings.kv_cache_gb is not None:
        arguments += ["--kv-cache-memory-bytes", str(int(settings.kv_cache_gb * 2**30))]
    if settings.trust_remote_code:
        arguments += ["--trust-remote-code"]
    if settings.device == "cpu":
        arguments += ["--enforce-eager"]
        if settings.samples:  # the CPU's sampler cannot work on half a prompt
            arguments += ["--no-enable-chunked-prefill"]
    else:
        arguments += ["--gpu-memory-utilization", str(settings.gpu_memory_utilization)]
        if settings.sleep:  # not on a CPU: there kdrl's worker frees the cache without sleep mode
            arguments += ["--enable-sleep-mode"]
    return arguments


def replicas_of(
    model: Path,
    settings: VLLMSettings,
    *,
    ports: Sequence[int],
    host: str = "127.0.0.1",
    devices: Sequence[str] | None = None,
    key: str | None = None,
    logs: Path | None = None,
) -> list[Replica]:
    """Servers of a model, one for each port.

    Args:
        devices: the GPUs of all servers, as CUDA_VISIBLE_DEVICES names them; each server gets the next
            `settings.tensor_parallel` of them. None: no GPUs.
        key: asked of whoever calls a server, at every address.
        logs: folder for a log of each server; None: they write to the output of this program.
    """
    arguments, split = server_arguments(model, settings), settings.tensor_parallel
    paths = (str(_ROOT), os.environ.get("PYTHONPATH", ""))
    common = {
        "VLLM_SERVER_DEV_MODE": "1",  # the address by which workers are told to load and to sleep
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # `vllm_process` says why
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        **({} if key is None else {"VLLM_API_KEY": key}),  # not an argument: those are seen by everyone here
        "VLLM_BATCH_INVARIANT": str(int(settings.batch_invariant)),
    }
    if devices is None:
        common["VLLM_CPU_OMP_THREADS_BIND"] = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        common["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(settings.num_threads))
    replicas = []
    for number, port in enumerate(ports):
        environment = {**common, "VLLM_LOGGING_PREFIX": f"[replica {number + 1}] "}
        if devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices[number * split :][:split])
        place = ["--host", host, "--port", str(port)]
        replicas.append(
            Replica(
                url=f"http://{host}:{port}/v1",
                command=[sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments, *place],
                environment=environment,
                log=None if logs is None else logs / f"replica-{number + 1}.log",
            )
        )
    return replicas


def _pass_tokens(model: Path, settings: VLLMSettings) -> int:
    """Tokens of a forward pass: as many as a scorer may take, since kdrl serve is not told what a server is for. The
    sampler of a CPU needs room for whole prompts."""
    samples = settings.samples and settings.device == "cpu"
    most = batched_tokens(model, replace(settings, samples=samples))
    return max(most, min(settings.max_num_seqs, settings.max_model_len))
