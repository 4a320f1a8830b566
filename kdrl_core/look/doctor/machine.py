"""What the machine has: GPUs and their links, shared memory, memory, files, disk. CUDA is not started.

How much is needed comes from the recipe; the numbers per process are those of NCCL, vLLM and DeepSpeed:

    /dev/shm   NCCL: ~64 MB a rank; DeepSpeed on a CPU: two buffers of 32 MB a rank and 4 MB of small ones;
               vLLM, if its workers are processes of their own: queues of 160 MB for the engine (16 MB × 10) and of
               240 MB for each worker (24 MB × 10)
    open files one connection per request in flight, besides what Python, sockets and shards of models take
"""

import os
import re
import resource
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from kdrl_core.config import Recipe
from kdrl_core.errors import EngineError, StorageError
from kdrl_core.ledger.publish import storage_errors
from kdrl_core.look.doctor.checks import CheckFailed, NotApplicable, Observed
from kdrl_core.models.devices import CSV, Gpu, ask_nvidia_smi

MIB, GIB = 2**20, 2**30

_SHM = Path("/dev/shm")  # noqa: S108
_SHM_RANK = 68 * MIB
_SHM_ENGINE, _SHM_WORKER = 160 * MIB, 240 * MIB
_OPEN_FILES = 512
_MOST_WRITTEN = 256 * MIB
_SHARE_WRITTEN = 0.05
"""At most this share of what is free is written to measure the disk."""
_BLOCK = 8 * MIB
_SLOW_DISK = 50e6
"""Bytes per second. A disk below it keeps a GPU node waiting: 21 GB of a 1.5B checkpoint take 7 minutes."""
_LINKS = {"NV": "NVLink", "PIX": "PCIe", "PXB": "PCIe", "PHB": "PCIe", "NODE": "PCIe", "SYS": "PCIe, across sockets"}


def gpus_needed(recipe: Recipe) -> int:
    """GPUs of this machine that a run of the recipe uses at a time."""
    if recipe.runtime.device == "cpu":
        return 0
    engines = recipe.vllm.tensor_parallel * recipe.vllm.replicas
    return max(engines, recipe.trainer.ranks if recipe.trainer.hostfile is None else 1)


def check_visible_gpus(recipe: Recipe, found: Sequence[Gpu]) -> Observed:
    """The number of visible GPUs against ranks and engines, their kind and memory."""
    needed = gpus_needed(recipe)
    if needed == 0:
        raise NotApplicable("runtime.device=cpu")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    limited = f" with CUDA_VISIBLE_DEVICES={visible}" if visible is not None else ""
    kinds = sorted({(gpu.name, gpu.memory) for gpu in found})
    figures = {
        "gpus": [{"name": gpu.name, "memory": gpu.memory} for gpu in found],
        "needed": needed,
        "visible": visible,
    }
    told = ", ".join(f"{name} {memory / GIB:.0f} GiB" for name, memory in kinds) or "none"
    if len(found) < needed:
        raise CheckFailed(
            f"{len(found)} GPUs are visible{limited} ({told}), the recipe uses {needed}: trainer.ranks="
            f"{recipe.trainer.ranks}, vllm.replicas={recipe.vllm.replicas}, vllm.tensor_parallel="
            f"{recipe.vllm.tensor_parallel}",
            _use_fewer(recipe, len(found)),
            **figures,
        )
    if len(kinds) > 1:
        raise CheckFailed(
            f"the GPUs differ ({told}); the smallest sets the limit for all", "show equal GPUs only", **figures
        )
    return Observed(says=f"{len(found)} × {told}{limited}, {needed} used", figures=figures)


def _use_fewer(recipe: Recipe, count: int) -> str:
    """What to do if only `count` GPUs are there."""
    if count == 0:
        return "take a node with GPUs and a driver; in a container pass them through (docker run --gpus all)"
    replicas = max(1, count // recipe.vllm.tensor_parallel)
    fields = f"--set trainer.ranks={count} --set vllm.replicas={replicas}"
    return f"show more GPUs, or use these: {fields}; whether that fits: kdrl plan --gpus {count} {fields}"


def check_links(recipe: Recipe, found: Sequence[Gpu]) -> Observed:
    """How the GPUs are linked, from `nvidia-smi topo -m`. Without NVLink the ranks' collectives are slow, not wrong."""
    if gpus_needed(recipe) < 2 or len(found) < 2:
        raise NotApplicable("one GPU or none, so no links")
    try:
        table = ask_nvidia_smi("topo", "-m")
    except EngineError as error:
        raise NotApplicable(str(error)) from error
    kinds = sorted(links_in(table))
    if not kinds:
        raise NotApplicable("nvidia-smi topo -m names no links")
    slow = "" if kinds == ["NVLink"] else "; collectives are slow without NVLink: prefer trainer.zero_stage=2 to 3"
    return Observed(says=f"{', '.join(kinds)}{slow}", figures={"links": kinds})


def links_in(table: str) -> set[str]:
    """The kinds of links between GPUs in the table of `nvidia-smi topo -m`."""
    rows = [line.split() for line in table.splitlines() if re.match(r"GPU\d+\s", line)]
    cells = [cell for row in rows for cell in row[1 : 1 + len(rows)]]
    return {kind for cell in cells for mark, kind in _LINKS.items() if re.fullmatch(rf"{mark}\d*", cell)}


def check_shared_memory(recipe: Recipe, *, place: Path = _SHM) -> Observed:
    """Free space in /dev/shm against what ranks and vLLM's workers put there."""
    ranks = recipe.trainer.ranks if recipe.trainer.engine == "deepspeed" else 0
    needed = ranks * _SHM_RANK + _vllm_shared_memory(recipe)
    if not needed:
        raise NotApplicable("one process computes, nothing is shared")
    if not place.is_dir():
        raise CheckFailed(f"{place} is not there", "mount a tmpfs there")
    free = shutil.disk_usage(place).free
    figures = {"free": free, "needed": needed}
    says = f"{free / GIB:.2f} GiB free, about {needed / GIB:.2f} needed"
    if free < needed:
        raise CheckFailed(
            says, "give the container more: docker run --shm-size=16g, Kubernetes: an emptyDir of Memory", **figures
        )
    return Observed(says=says, figures=figures)


def _vllm_shared_memory(recipe: Recipe) -> int:
    """Bytes of the queues between vLLM and its workers. A server with one GPU and an engine on a CPU have none."""
    vllm = recipe.vllm
    if recipe.runtime.device == "cpu" or (vllm.replicas > 1 and vllm.tensor_parallel == 1):
        return 0
    is_sampling, teacher = recipe.rollout.engine == "vllm", recipe.teacher
    has_reference = any(recipe.stage(name).ref_beta > 0 for name in recipe.stages)
    has_teacher = teacher is not None and teacher.server is None and teacher.engine == "vllm"
    engines = is_sampling + (is_sampling and has_reference) + has_teacher
    return engines * vllm.replicas * (_SHM_ENGINE + vllm.tensor_parallel * _SHM_WORKER)


def check_open_files(recipe: Recipe) -> Observed:
    """The limit on open files against the connections of requests in flight."""
    teacher = recipe.teacher.server if recipe.teacher is not None else None
    servers = [server for server in (recipe.rollout.server, teacher) if server is not None]
    most = recipe.vllm.max_num_seqs
    in_flight = max((server.concurrency or len(server.urls) * most for server in servers), default=0)
    if recipe.vllm.replicas > 1:
        in_flight = max(in_flight, recipe.vllm.replicas * most)
    needed = _OPEN_FILES + in_flight
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    figures = {"limit": limit, "needed": needed}
    says = f"{limit:,} may be open, about {needed:,} needed"
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise CheckFailed(says, "ulimit -n 65536, in the shell or job script that starts the run", **figures)
    return Observed(says=says, figures=figures)


def check_disk(folder: Path) -> Observed:
    """Write a file and wait until it is on the disk (fsync), as checkpoints are written."""
    try:
        with storage_errors(folder):
            size = int(min(_MOST_WRITTEN, _SHARE_WRITTEN * shutil.disk_usage(folder).free)) // _BLOCK * _BLOCK
            if size < _BLOCK:
                free = shutil.disk_usage(folder).free
                raise CheckFailed(
                    f"only {free / MIB:.0f} MiB are free", "free some, or give another disk: --folder DIR"
                )
            seconds = _write(folder / "disk", size)
    except StorageError as error:
        raise CheckFailed(
            f"{error}", "free some space, or give another disk: --folder DIR, KDRL_ARTIFACTS=DIR"
        ) from error
    speed, free = size / seconds, shutil.disk_usage(folder).free
    figures = {"bytes_per_s": speed, "written": size, "free": free}
    says = f"{speed / 1e6:,.0f} MB/s ({size / MIB:.0f} MiB with fsync), {free / 1e9:,.1f} GB free"
    if speed < _SLOW_DISK:
        raise CheckFailed(
            f"{says}: checkpoints would hold up the run", "put the artifacts on a local disk: KDRL_ARTIFACTS", **figures
        )
    return Observed(says=says, figures=figures)


def gpu_memory_used() -> list[float]:
    """GiB in use on each GPU of this machine; empty if nvidia-smi does not say."""
    try:
        return [int(line) / 1024 for line in ask_nvidia_smi("--query-gpu=memory.used", CSV).split()]
    except (EngineError, ValueError):
        return []


def size_words(num_bytes: float) -> str:
    """A size in MB, or from 1 GB on in GB."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def _write(file: Path, size: int) -> float:
    """Seconds to write `size` random bytes, so that a disk that compresses is not flattered. The file is removed."""
    block = os.urandom(_BLOCK)
    started = time.perf_counter()
    try:
        with file.open("wb", buffering=0) as target:
            for _ in range(size // _BLOCK):
                target.write(block)
            os.fsync(target.fileno())
        return time.perf_counter() - started
    finally:
        file.unlink(missing_ok=True)


def describe_machine(found: Sequence[Gpu]) -> dict[str, object]:
    """The machine for a bug report, without its name."""
    return {
        "cpus": os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "gpus": [{"name": gpu.name, "memory": gpu.memory, "driver": gpu.driver} for gpu in found],
    }


def kernel_kills() -> int | None:
    """How many processes the kernel has ended for want of memory since it started; None if it does not say."""
    try:
        found = re.search(r"^oom_kill (\d+)", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None
