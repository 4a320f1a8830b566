"""A kernel lock for PyTorch's builds of C++ extensions.

DeepSpeed builds its communication on a CPU, and its optimiser for offloading, through `torch.utils.cpp_extension`.
Its lock is the existence of a file (`FileBaton`): if a process is killed while it holds the lock, the file stays,
and every later process waits for ever. A kernel lock ends with the process that holds it.
"""

import fcntl
import os


class KernelBaton:
    """`torch.utils.file_baton.FileBaton` by `flock`, on a file `.kernel` beside torch's, which is never deleted. It
    ignores torch's intervals for waiting and warning.

    Every process gets the lock in turn and then runs ninja, which builds what is not up to date. So a killed process
    may leave an extension half-built.
    """

    def __init__(self, lock_file_path: str, wait_seconds: float = 0.1, warn_after_seconds: int | None = None) -> None:
        self._path = f"{lock_file_path}.kernel"
        self._file: int | None = None

    def try_acquire(self) -> bool:
        """Wait for the lock. Always True; raises OSError where the folder cannot be written."""
        self._file = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o666)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return True

    def wait(self) -> None:
        """Never called: `try_acquire` has waited."""

    def release(self) -> None:
        """Let the next one build."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def use_kernel_lock() -> None:
    """Have PyTorch build extensions in this process under `KernelBaton`."""
    from torch.utils import cpp_extension

    cpp_extension.FileBaton = KernelBaton  # type: ignore[misc,assignment]
