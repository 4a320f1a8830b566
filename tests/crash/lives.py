"""Lives of a tiny run: each is a process that goes on with the run until it is killed or at the end.

A process with everything imported forks them (`python tests/crash/lives.py`), so that a life costs no imports.
Commands and answers are lines of JSON.
"""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import psutil

Kind = Literal["suspend", "kill workers", "cancel"]

_STOPPED = 3
"""Exit status of a life that stopped where it was asked to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """How a life ended."""

    status: int
    """0: it came to the end of the run; `_STOPPED`; or minus the signal that killed it."""
    points: tuple[str, ...]
    """The fault points that it passed; the last is where it died, if it was to die at one."""
    seconds: float
    troubled: int
    """Processes that were suspended, killed or asked to stop from outside."""

    @property
    def finished(self) -> bool:
        """Whether it came to the end of the run."""
        return self.status == 0

    @property
    def killed(self) -> bool:
        """Whether it died in the midst of its work."""
        return self.status == -signal.SIGKILL

    @property
    def stopped(self) -> bool:
        """Whether it was asked to stop, and did so with everything in hand published."""
        return self.status == _STOPPED


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """What may come over a life from outside."""

    kind: Kind
    after_s: float
    seconds: float = 0.0
    """How long the life and all that it started are suspended."""

    def come(self, pid: int) -> int:
        """Wait, and do it to the process `pid`. Returns how many processes it came over."""
        time.sleep(self.after_s)
        with suppress(psutil.Error):
            life = psutil.Process(pid)
            if self.kind == "cancel":
                return _signal(life, signal.SIGTERM)
            children = life.children(recursive=True)
            if self.kind == "kill workers":
                return sum(_signal(child, signal.SIGKILL) for child in children if _is_worker(child))
            told = [each for each in (life, *children) if _signal(each, signal.SIGSTOP)]
            time.sleep(self.seconds)
            return sum(_signal(each, signal.SIGCONT) for each in reversed(told))
        return 0


def _signal(process: psutil.Process, number: signal.Signals) -> bool:
    with suppress(psutil.Error):
        process.send_signal(number)
        return True
    return False


def _is_worker(process: psutil.Process) -> bool:
    """Whether it judges answers; the others are multiprocessing's own."""
    with suppress(psutil.Error):
        return "spawn_main" in " ".join(process.cmdline())
    return False


class Lives:
    """Starts lives of one run after the other. RuntimeError if a life ends otherwise than `Life.status` says."""

    def __enter__(self) -> "Lives":
        self.saves_aside = False
        """Whether the lives to come save checkpoints beside the next rollouts, as with trainers on ranks."""
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def live(
        self,
        artifacts: Path,
        name: str,
        *,
        die_at: str | None = None,
        skip: int = 0,
        after_s: float | None = None,
        trouble: Trouble | None = None,
    ) -> Life:
        """One life of the run, to its end or its death. `trouble` comes over it from outside meanwhile."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        command = {"artifacts": str(artifacts), "name": name, "die_at": die_at, "skip": skip, "after_s": after_s}
        command["trouble"] = None if trouble is None else asdict(trouble)
        command["saves_aside"] = self.saves_aside
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if answer["status"] not in (0, _STOPPED, -signal.SIGKILL):
            raise RuntimeError(f"a life ended with {answer['status']}: {command}")
        return Life(
            status=answer["status"],
            points=tuple(answer["points"]),
            seconds=answer["seconds"],
            troubled=answer["troubled"],
        )


def _serve() -> None:
    # Everything that a life needs is imported and read before the first fork.
    import pandas  # noqa: F401
    from crash import tiny_run

    from kdrl_core.config import load_recipe
    from kdrl_core.data.decontamination import Decontaminator

    Decontaminator(load_recipe("miniature").stage("stage1").data.decontamination)  # keeps its index of the problems

    for line in sys.stdin:
        command = json.loads(line)
        started = time.monotonic()
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _live(command, writer, tiny_run)
        os.close(writer)
        with ThreadPoolExecutor(1) as pool:
            trouble = command["trouble"] and pool.submit(Trouble(**command["trouble"]).come, child)
            with os.fdopen(reader) as points:
                passed = points.read().splitlines()
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answer = {"status": status, "points": passed, "seconds": time.monotonic() - started}
        answer["troubled"] = trouble.result() if trouble else 0
        print(json.dumps(answer), flush=True)


def _live(command: dict[str, Any], writer: int, tiny_run: Any) -> None:
    from crash.faults import Faults, die_after

    from kdrl_core.errors import Stopped
    from kdrl_core.ledger import open_run
    from kdrl_core.ledger.lock import request_stop
    from kdrl_core.training.torch_trainer import TorchTrainer

    TorchTrainer.saves_aside = command["saves_aside"]
    signal.signal(signal.SIGTERM, lambda *_: request_stop("cancelled"))
    os.setsid()
    os.set_inheritable(writer, False)
    try:
        Faults(
            die_at=command["die_at"],
            skip=command["skip"],
            heard=lambda point: os.write(writer, f"{point}\n".encode()),
        ).install()
        if command["after_s"] is not None:
            die_after(command["after_s"])
        run = open_run(command["name"], artifacts=Path(command["artifacts"]))
        tiny_run.train(run)
        tiny_run.finish(run)
        if run.recipe.verification.timeout_s == tiny_run.WORKERS_TIMEOUT_S:
            tiny_run.label(run)
    except Stopped:
        tiny_run.close_sessions()
        os._exit(_STOPPED)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    _serve()
