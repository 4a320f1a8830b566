"""`kdrl serve`: vLLM replicas that sample or score for a run. `kdrl bake-teacher`: a teacher for them."""

import json
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.shared import err, errors, out
from kdrl_core.engines.devices import visible_devices
from kdrl_core.errors import EngineError, ModelError

if TYPE_CHECKING:
    from flows.cli.replicas import Replica

_OF_KDRL = (
    *("--logprobs-mode", "processed_logprobs"),  # of softmax(logits / T)
    *("--generation-config", "vllm"),  # else requests get the model's own top-k, top-p and penalties by default
    *("--worker-extension-cls", "kdrl_core.engines.vllm_extension.KdrlWorker"),
    "--disable-uvicorn-access-log",  # a line for every response
    "--no-enable-prefix-caching",  # its entries would be stale after a weight sync
)


def serve(
    model: Annotated[Path, typer.Option(metavar="DIR", help="The student, or a teacher of kdrl bake-teacher.")],
    max_model_len: Annotated[
        int, typer.Option(min=2, help="Limit of prompt and response together, in tokens (a teacher needs one more).")
    ],
    replicas: Annotated[int, typer.Option(min=1, help="Number of servers, on consecutive GPUs and ports.")] = 1,
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Port of the first server.")] = 8000,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on. Anyone who reaches it may load weights: use loopback or a closed network."
        ),
    ] = "127.0.0.1",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, like runtime.dtype of the recipe.")] = "bfloat16",
    cpu: Annotated[bool, typer.Option("--cpu", help="Use vLLM's CPU build.")] = False,
    kv_cache_gb: Annotated[float | None, typer.Option(help="GiB of key-value cache; default: vLLM's choice.")] = None,
    gpu_memory_utilization: Annotated[
        float,
        typer.Option(
            min=0.01, max=1.0, help="Share of the GPU for weights and cache. Servers that share a GPU: below 1 in all."
        ),
    ] = 0.9,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="GPUs per replica.")] = 1,
    asleep: Annotated[
        bool,
        typer.Option(
            "--asleep", help="Put each replica to sleep when it first answers. Its GPU is free until a run wakes it."
        ),
    ] = False,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Most responses in flight per replica.")] = 256,
    max_logprobs: Annotated[
        int, typer.Option(min=1, help="How many of the likeliest tokens a request may ask for (Top-K).")
    ] = 32,
) -> None:
    """Start replicas of vLLM's OpenAI-compatible server, set up as kdrl needs them; Ctrl-C ends them.

    Each replica holds the whole model and has its own port and GPUs, taken from CUDA_VISIBLE_DEVICES in order. A
    replica that ends is started again, and the run loads its weights again. kdrl prints the settings with which a run
    uses the replicas. If their GPUs also train or score, start them with --asleep, and add rollout.server.sleep=true or
    teacher.server.sleep=true to the run.

    \b
    kdrl serve --model models/student --max-model-len 21504 --replicas 8
    """
    from flows.cli.replicas import serve_replicas

    with errors():
        limit = _context_of(model, max_model_len)
        _require_servable(model, "cpu" if cpu else "cuda", dtype, max_model_len, kv_cache_gb, tensor_parallel)
        if port + replicas > 65_536:
            raise EngineError(f"--port {port}: {replicas} ports from there on are beyond 65535; give a lower one")
        devices = None
        if not cpu:
            devices = visible_devices(replicas * tensor_parallel, needed_for="--replicas × --tensor-parallel")
        for number in range(replicas):
            _require_free(host, port + number)
        arguments = [
            *("--model", str(model.absolute()), "--served-model-name", model.absolute().name),
            *("--dtype", dtype, "--max-model-len", str(max_model_len), "--max-num-seqs", str(max_num_seqs)),
            *("--tensor-parallel-size", str(tensor_parallel), "--max-logprobs", str(max_logprobs)),
            *_OF_KDRL,
        ]
        if max_model_len > limit:  # a teacher's one more token; no other token attends to it
            arguments += ["--hf-overrides", json.dumps({"max_position_embeddings": max_model_len})]
        if kv_cache_gb is not None:
            arguments += ["--kv-cache-memory-bytes", str(int(kv_cache_gb * 2**30))]
        if cpu:  # its sampler cannot work on half a prompt
            arguments += ["--enforce-eager", "--no-enable-chunked-prefill"]
            arguments += ["--max-num-batched-tokens", str(max(2048, max_model_len))]
        else:  # not on a CPU: there kdrl's worker frees the cache without sleep mode
            arguments += ["--gpu-memory-utilization", str(gpu_memory_utilization), "--enable-sleep-mode"]
        servers = [
            _replica(number, arguments, host=host, port=port + number, devices=devices, split=tensor_parallel)
            for number in range(replicas)
        ]
        urls = ",".join(f"'{server.url}'" for server in servers)
        err.say(f'serving {model}; for a run: --set rollout.engine=server --set "rollout.server.urls=[{urls}]"')
        err.say(f'as its teacher: --set "teacher.server.urls=[{urls}]"')
        try:
            serve_replicas(servers, asleep=asleep, say=err.say)
        except KeyboardInterrupt:
            err.say("ended")


def _context_of(model: Path, asked: int) -> int:
    """The model's context in tokens; `asked` if its config has none. Raises ModelError if `asked` is above it."""
    from kdrl_core.models.loading import context_limit, read_config

    if not (model / "config.json").is_file():
        raise ModelError(f"--model {model} is no model directory: it has no config.json")
    limit = context_limit(read_config(model)) or asked
    if asked > limit + 1:
        raise ModelError(f"--max-model-len {asked}: {model} has a context of {limit} tokens; give {limit} or less")
    return limit


def _require_servable(
    model: Path, device: str, dtype: str, tokens: int, kv_cache_gb: float | None, tensor_parallel: int
) -> None:
    """Raise EngineError, with the remedy, for what vLLM would refuse after its start."""
    from kdrl_core.engines.vllm_support import how_to_install, install_fault, model_fault
    from kdrl_core.models.loading import read_config

    if (fault := install_fault()) is not None:
        raise EngineError(f"{fault}; install it with {how_to_install(device)}")
    found = model_fault(
        read_config(model),
        tensor_parallel=tensor_parallel,
        kv_cache_gb=kv_cache_gb,
        device=device,
        dtype=dtype,
        tokens=tokens,
    )
    if found is not None:
        option = f"--{found[0].replace('_', '-')}: " if found[0] else f"{model} has "
        raise EngineError(f"{option}{found[1]}")


def _replica(
    number: int, arguments: Sequence[str], *, host: str, port: int, devices: Sequence[str] | None, split: int
) -> "Replica":
    """How server `number` is started. `devices` are the GPUs of all servers; each gets `split` of them."""
    from flows.cli.replicas import Replica

    environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment["VLLM_LOGGING_PREFIX"] = f"[replica {number + 1}] "
    if devices is None:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    else:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices[number * split :][:split])
    place = ["--host", host, "--port", str(port)]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments, *place]
    return Replica(url=f"http://{host}:{port}/v1", command=command, environment=environment)


def _require_free(host: str, port: int) -> None:
    """Raise EngineError if the port cannot be used: vLLM notices it only after it has loaded the model."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise EngineError(f"cannot listen at {host}:{port} ({reason}); give another --port") from None


def bake_teacher(
    model: Annotated[Path, typer.Option(metavar="DIR", help="The teacher: a Hugging Face model directory.")],
    temperature: Annotated[
        float, typer.Option(min=0.01, max=10.0, help="The stage's sampling temperature, e.g. 0.6 (Table 3).")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the copy is written.")],
) -> None:
    """Divide a teacher's output layer by the temperature, so that a server returns logprobs of softmax(logits / T).

    Serve the copy (`vllm serve DIR --max-logprobs 32`) and set teacher.server.urls and teacher.server.temperature.
    """
    with errors():
        if output.exists():
            raise ModelError(f"--output {output} exists; give another folder")
        err.print(f"baking temperature {temperature:g} into a copy of {model} …")
        from kdrl_core.models.prepare import bake_temperature

        manifest = bake_temperature(model.absolute(), output.absolute(), temperature)
        out.say(f"{output}  {manifest.size / 2**20:,.1f} MiB")
