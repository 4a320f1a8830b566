"""The installed `kdrl` in a fork of a process that has the heavy libraries already: the program without its imports.

A process with everything imported forks the commands (`python tests/forked.py`), each with the folder, environment and
standard streams of a program of its own. Commands and exit codes are lines of JSON.
"""

import atexit
import gc
import json
import os
import runpy
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

KDRL = Path(sys.executable).with_name("kdrl")


class Forked:
    """Runs one command after the other. RuntimeError if one takes longer than `timeout_s`."""

    def __enter__(self) -> "Forked":
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate(timeout=60)

    def run(
        self, arguments: Sequence[str], folder: Path, *, cwd: Path, environment: Mapping[str, str], timeout_s: float
    ) -> "subprocess.CompletedProcess[str]":
        """`kdrl ARGUMENTS` in `cwd`; what it prints passes through two files in `folder`, which are gone afterwards."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        streams = [folder / f".{name}-{os.getpid()}" for name in ("stdout", "stderr")]
        command = {
            "arguments": list(arguments),
            "cwd": str(cwd),
            "environment": dict(environment),
            "streams": [str(path) for path in streams],
        }
        clock = threading.Timer(timeout_s, self._process.kill)
        clock.start()
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        finally:
            clock.cancel()
        if not answer:
            raise RuntimeError(f"kdrl {' '.join(arguments)} did not end within {timeout_s:.0f} s")
        printed = [path.read_text() for path in streams]
        for path in streams:
            path.unlink()
        return subprocess.CompletedProcess([str(KDRL), *arguments], json.loads(answer), *printed)


def _serve() -> None:
    import math_verify  # noqa: F401
    import pandas  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import rich.console  # noqa: F401
    import typer  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    # Of kdrl what reads neither environment nor folder when it is imported; the command line itself does.
    import kdrl_core.boxes.preflight
    import kdrl_core.evaluation.answering
    import kdrl_core.look.rollouts.query  # noqa: F401
    from kdrl_core.config import load_recipe
    from kdrl_core.data.decontamination import Decontaminator

    Decontaminator(load_recipe("miniature").stage("stage1").data.decontamination)  # keeps its index of the problems
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(*, arguments: list[str], cwd: str, environment: dict[str, str], streams: list[str]) -> None:
    """The program, until it exits."""
    null = os.open(os.devnull, os.O_RDONLY)
    targets = [null, *(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for path in streams)]
    for descriptor, target in enumerate(targets):
        os.dup2(target, descriptor)
        os.close(target)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(KDRL), *arguments]
    status = 0
    try:
        runpy.run_path(str(KDRL), run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    # What an interpreter does at its end, without taking apart the modules: that alone lasts longer than most commands.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve()
