"""What the start of a vLLM engine leaves behind, and what its workers get. Without vLLM: only processes are started."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = """
import multiprocessing, os, sys
from kdrl_core.engines.vllm_process import _workers_without_main
print("main", flush=True)  # no guard: whoever imports this file says it again
lock = open("run.lock", "w")
os.set_inheritable(lock.fileno(), True)
context = multiprocessing.get_context("spawn")
with _workers_without_main():
    worker = context.Process(target=os.system, args=("ls -l /proc/$PPID/fd",), name="VllmWorker-0", daemon=True)
    worker.start()
    worker.join()
print("worker ended with", worker.exitcode)
"""


@pytest.mark.parametrize("how", ["file", "module", "-c", "stdin"])
def test_a_worker_runs_no_main_program_and_holds_no_file_of_its_parent(how: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(SCRIPT)
    arguments = {"file": ["program.py"], "module": ["-m", "program"], "-c": ["-c", SCRIPT], "stdin": ["-"]}[how]
    done = subprocess.run(
        [sys.executable, *arguments],
        input=SCRIPT,
        cwd=tmp_path,
        env={"PYTHONPATH": f"{ROOT}:{tmp_path}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("main\n") == 1
    assert "worker ended with 0" in done.stdout
    assert "pipe:" in done.stdout  # the listing of its open files is there
    assert "run.lock" not in done.stdout
