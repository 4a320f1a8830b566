"""What to do about errors that do not say it themselves. kdrl's own errors end with their remedy."""

import re

_GPU_MEMORY = (
    "a GPU's memory ran out: lower vllm.gpu_memory_utilization, set trainer.zero_stage=3 or "
    "trainer.offload_optimizer=true, or lower micro_batch_tokens of the stage; kdrl plan says which of them suffices"
)
_HOST_MEMORY = (
    "the host's memory ran out: give the job more (Slurm: --mem=0), use fewer or smaller models, or take "
    "trainer.offload_optimizer off"
)
_REMEDIES = (
    (r"CUDA out of memory|OutOfMemoryError|No available memory for the cache|Free memory on device", _GPU_MEMORY),
    (r"signal SIGKILL|return code = -9|MemoryError|Cannot allocate memory|DefaultCPUAllocator", _HOST_MEMORY),
    (
        r"NCCL|ProcessGroup|Gloo|gloo",
        "the ranks cannot talk to each other: export NCCL_DEBUG=INFO and look at the log below; often /dev/shm is too "
        "small (Docker: --shm-size=16g), or NCCL_SOCKET_IFNAME names no interface",
    ),
    (r"No space left|no disk space", "free some space, or give another disk: --folder DIR, KDRL_ARTIFACTS=DIR"),
    (r"C compiler|Python\.h", "Triton compiles small C files: install gcc and Python's headers (apt: gcc python3-dev)"),
    (
        r"nvcc|CUDA_HOME|ninja|compiler",
        "something has to be compiled here: install the CUDA toolkit of torch's version and g++, and set CUDA_HOME",
    ),
    (
        r"signal SIG(SEGV|BUS|ILL|ABRT|FPE)",
        "compiled code crashed: compare the versions above with the pins; with SIGBUS look at /dev/shm first",
    ),
)


def remedy_for(error: BaseException) -> str | None:
    """What to do about an error; None if its own text has to do."""
    given = getattr(error, "remedy", None)
    return given if isinstance(given, str) else remedy_for_text(f"{type(error).__name__}: {error}")


def remedy_for_text(text: str) -> str | None:
    """As `remedy_for`, for the text of an error, or the end of a process's log."""
    return next((remedy for pattern, remedy in _REMEDIES if re.search(pattern, text)), None)
