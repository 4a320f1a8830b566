"""The lock under which extensions are built: held by one at a time, and free when its holder is killed."""

import subprocess
import sys
import threading
from pathlib import Path

from torch.utils import cpp_extension

from kdrl_core.training.extensions import KernelBaton, use_kernel_lock

_HOLDER = """
import sys, time
from kdrl_core.training.extensions import KernelBaton
KernelBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_one_holds_it_and_a_killed_holder_gives_it_up(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    (tmp_path / "lock").touch()  # as PyTorch's own is left
    holder = subprocess.Popen([sys.executable, "-c", _HOLDER, path], stdout=subprocess.PIPE, text=True)
    waiter = KernelBaton(path)
    acquired = threading.Event()
    thread = threading.Thread(target=lambda: waiter.try_acquire() and acquired.set(), daemon=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        thread.start()
        assert not acquired.wait(0.5)
    finally:
        holder.kill()
        holder.communicate()
    assert acquired.wait(10)
    waiter.release()
    waiter.release()  # a second time does nothing
    again = KernelBaton(path)
    assert again.try_acquire() is True
    again.release()


def test_pytorch_takes_it(tmp_path: Path) -> None:
    """In a process of its own: it is the ranks' alone."""
    assert cpp_extension.FileBaton is not KernelBaton
    program = f"""
from torch.utils import cpp_extension
from kdrl_core.training.extensions import {use_kernel_lock.__name__} as use_kernel_lock
use_kernel_lock()
cpp_extension._write_ninja_file_and_build_library = lambda **arguments: print("built")
cpp_extension._import_module_from_library = lambda *arguments: None
cpp_extension._jit_compile(
    "name", [], [], [], [], [], [], {str(tmp_path)!r}, False, False, False, True, False
)
"""
    (tmp_path / "lock").touch()
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (found.returncode, found.stdout) == (0, "built\n"), found.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"lock", "lock.kernel"}
