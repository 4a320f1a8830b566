"""`kdrl serve`: vLLM replicas that sample or score for a run. `kdrl bake-teacher`: a teacher for them."""

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.cli.shared import err, errors, out
from kdrl_core.errors import EngineError, ModelError
from kdrl_core.models.devices import visible_devices

if TYPE_CHECKING:
    from kdrl_core.engines.vllm_engine import VLLMSettings


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
    from kdrl_core.engines.server_command import replicas_of
    from kdrl_core.engines.server_processes import ReplicaGroup
    from kdrl_core.engines.vllm_engine import VLLMSettings

    with errors():
        _require_context(model, max_model_len)
        settings = VLLMSettings(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            kv_cache_gb=kv_cache_gb,
            gpu_memory_utilization=gpu_memory_utilization,
            tensor_parallel=tensor_parallel,
            dtype=dtype,
            device="cpu" if cpu else "cuda",
            max_logprobs=max_logprobs,
        )
        _require_servable(model, settings)
        if port + replicas > 65_536:
            raise EngineError(f"--port {port}: {replicas} ports from there on are beyond 65535; give a lower one")
        devices = None
        if not cpu:
            devices = visible_devices(replicas * tensor_parallel, needed_for="--replicas × --tensor-parallel")
        ports = range(port, port + replicas)
        for each in ports:
            _require_free(host, each)
        key = os.environ.get("VLLM_API_KEY") or None
        servers = replicas_of(model, settings, ports=ports, host=host, devices=devices, key=key)
        urls = ",".join(f"'{server.url}'" for server in servers)
        err.say(f'serving {model}; for a run: --set rollout.engine=server --set "rollout.server.urls=[{urls}]"')
        err.say(f'as its teacher: --set "teacher.server.urls=[{urls}]"')
        group = ReplicaGroup(servers, say=err.say, key=key or "", asleep=asleep, keeps_resting=True)
        try:
            group.wait_until_ready()
            answer = "the replica answers" if replicas == 1 else f"all {replicas} replicas answer"
            err.say(f"{answer} at {', '.join(group.urls)}; Ctrl-C ends it all")
            group.wait_until_failed()
        except KeyboardInterrupt:
            err.say("ended")
        finally:
            group.close()


def _require_context(model: Path, asked: int) -> None:
    """Raise ModelError if `model` is no model directory, or its context is too short, one more for a teacher."""
    from kdrl_core.models.loading import context_limit, read_config

    if not (model / "config.json").is_file():
        raise ModelError(f"--model {model} is no model directory: it has no config.json")
    limit = context_limit(read_config(model)) or asked
    if asked > limit + 1:
        raise ModelError(f"--max-model-len {asked}: {model} has a context of {limit} tokens; give {limit} or less")


def _require_servable(model: Path, settings: "VLLMSettings") -> None:
    """Raise EngineError, with the remedy, for what vLLM would refuse after its start."""
    from kdrl_core.engines.vllm_support import how_to_install, install_fault, model_fault
    from kdrl_core.models.loading import read_config

    if (fault := install_fault()) is not None:
        raise EngineError(f"{fault}; install it with {how_to_install(settings.device)}")
    found = model_fault(
        read_config(model),
        tensor_parallel=settings.tensor_parallel,
        kv_cache_gb=settings.kv_cache_gb,
        device=settings.device,
        dtype=settings.dtype,
        tokens=settings.max_model_len,
    )
    if found is not None:
        option = f"--{found[0].replace('_', '-')}: " if found[0] else f"{model} has "
        raise EngineError(f"{option}{found[1]}")


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

    \b
    kdrl bake-teacher --model models/Skywork-OR1-Math-7B --temperature 0.6 --output models/teacher-at-0.6
    """
    with errors():
        if output.exists():
            raise ModelError(f"--output {output} exists; give another folder")
        err.print(f"baking temperature {temperature:g} into a copy of {model} …")
        from kdrl_core.models.prepare import bake_temperature

        manifest = bake_temperature(model.absolute(), output.absolute(), temperature)
        out.say(f"{output}  {manifest.size / 2**20:,.1f} MiB")
