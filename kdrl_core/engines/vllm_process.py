"""What the start of a vLLM engine does to this process and hands to its workers; both are kept apart here.

Workers of an engine with processes of its own are spawned, never forked. A child that is forked after torch has run in
parallel hangs at its first parallel operation, and a forked child holds everything that is open here: the run's lock,
the connections to the ranks. vLLM forks by default. A spawned worker of kdrl does not import this process's `__main__`:
it needs nothing from it, and a script without an `if __name__ == "__main__"` guard would run again.

vLLM changes its process: its CPU worker replaces `torch.set_num_threads` by a no-op, and it leaves environment
variables behind (LD_PRELOAD, OMP_NUM_THREADS, its own), which every later child would inherit. All of this is undone.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import spawn
from typing import Any

_CHANGED = (
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "LOCAL_WORLD_SIZE",
    "NUMEXPR_MAX_THREADS",
    "OMP_NUM_THREADS",
    "TORCHINDUCTOR_COMPILE_THREADS",
    "TORCHINDUCTOR_CPP_DYNAMIC_THREADS",
)
"""Variables that vLLM sets when an engine starts, beside those that begin with VLLM_."""
_OF_VLLM = ("VllmWorker", "EngineCore")
"""Names of its processes begin so."""


@contextmanager
def starting(*, device: str, num_threads: int, batch_invariant: bool) -> Iterator[None]:
    """Set what vLLM reads from the environment while an engine starts; afterwards undo its changes to this process."""
    import torch
    from vllm import envs

    logging.getLogger("vllm.logging_utils.dump_input").disabled = True  # it logs 100 kB for any fault
    set_num_threads, before = torch.set_num_threads, _environment()
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ["VLLM_BATCH_INVARIANT"] = str(int(batch_invariant))
    if device == "cpu":
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    envs.disable_envs_cache()  # else the variables of an earlier engine stay in force
    try:
        with warnings.catch_warnings(), _workers_without_main():
            warnings.simplefilter("ignore", FutureWarning)  # from vLLM about itself
            yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)
        for name in _environment().keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _environment() -> dict[str, str]:
    """The variables that vLLM may change."""
    return {name: value for name, value in os.environ.items() if name in _CHANGED or name.startswith("VLLM_")}


@contextmanager
def _workers_without_main() -> Iterator[None]:
    """Have vLLM's processes start from an empty `__main__`. Other processes are spawned as always."""
    prepared = spawn.get_preparation_data

    def without_main(name: str) -> dict[str, Any]:
        data = prepared(name)
        if not name.startswith(_OF_VLLM):
            return data
        return {key: value for key, value in data.items() if not key.startswith("init_main_from")}

    spawn.get_preparation_data = without_main
    try:
        yield
    finally:
        spawn.get_preparation_data = prepared
