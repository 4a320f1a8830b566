"""A Prefect server, a work pool with the deployments, and a worker: real processes on loopback, to be killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import forked
import httpx
import psutil
from support import MARK

from flows.cli.local_prefect import free_port, server_environment

ROOT = Path(__file__).resolve().parents[2]
PREFECT = str(Path(sys.executable).with_name("prefect"))
KDRL = str(forked.KDRL)
_PATIENCE_S = 180.0


class Stack:
    """Starts, kills and asks. Logs lie in `logs`; `close` ends whatever is left."""

    def __init__(self, artifacts: Path, logs: Path, *, folder: Path = ROOT) -> None:
        """`artifacts` has to be what KDRL_ARTIFACTS says; programs are called in `folder`."""
        self.artifacts, self.logs, self.folder = artifacts, logs, folder
        self.port = free_port()
        self.environment = {**server_environment(self.port), MARK: str(artifacts)}
        self.api = self.environment["PREFECT_API_URL"]
        logs.mkdir(parents=True, exist_ok=True)
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start_server(self) -> None:
        self._start("server", [PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(self.port)])
        self.wait("the server is healthy", self._is_healthy)

    def deploy(self) -> None:
        self.call(PREFECT, "work-pool", "create", "kdrl", "--type", "process", "--overwrite")
        self.call(PREFECT, "--no-prompt", "deploy", "--all")

    def start_worker(self) -> None:
        self._start("worker", [PREFECT, "worker", "start", "--pool", "kdrl"])

    def start(self, name: str, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """A program in the background, its output in the log `name`."""
        return self._start(name, list(command), environment)

    def call(self, *command: str, check: bool = True) -> str:
        """A program to its end; what it said."""
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=300, check=False
        )
        said = done.stdout + done.stderr
        assert not check or done.returncode == 0, f"{command}: exit {done.returncode}\n{said}\n{self.tails()}"
        return said

    def begin(self, run_name: str, overrides: list[str]) -> str:
        """`prefect deployment run kdrl/full-pipeline`; the id of the flow run."""
        said = self.call(
            *(PREFECT, "deployment", "run", "kdrl/full-pipeline", "-p", "recipe=miniature"),
            *("-p", f"run_name={run_name}", "-p", f"overrides={json.dumps(overrides)}"),
        )
        found = re.search(r"UUID: ([0-9a-f-]{36})", said)
        assert found, said
        return found[1]

    def find(self, name: str) -> str:
        """The id of the only flow run of this name."""
        asked = {"flow_runs": {"name": {"any_": [name]}}}
        (found,) = httpx.post(f"{self.api}/flow_runs/filter", json=asked, timeout=5).json()
        return str(found["id"])

    def state(self, flow_run_id: str) -> str:
        """Name of a flow run's state; `unreachable` while the server is."""
        return str(self._flow_run(flow_run_id).get("state_name", "unreachable"))

    def is_ended(self, flow_run_id: str) -> bool:
        """Whether a flow run is in a terminal state."""
        return self._flow_run(flow_run_id).get("state_type") in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")

    def _flow_run(self, flow_run_id: str) -> dict[str, Any]:
        try:
            return dict(httpx.get(f"{self.api}/flow_runs/{flow_run_id}", timeout=5).json())
        except httpx.HTTPError:
            return {}

    def flow_process(self) -> psutil.Process:
        """The process of the only flow run that is being worked on: it holds the run's lock."""
        found = [p for p in self._marked() if "flow-run" in " ".join(p.cmdline()) or "engine" in " ".join(p.cmdline())]
        assert found, f"no flow process: {[' '.join(p.cmdline()) for p in self._marked()]}\n{self.tails()}"
        return found[0]

    def kill(self, *names: str) -> None:
        """SIGKILL programs by name, without warning, each alone (its children live on)."""
        for name in names:
            process = self.running.pop(name)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()

    def kill_everything(self) -> None:
        """As a machine that loses power."""
        for process in self._marked():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        for child in self.running.values():
            child.wait()
        self.running.clear()

    def wait(self, what: str, condition: Callable[[], bool], patience_s: float = _PATIENCE_S) -> float:
        """Seconds until `condition` holds."""
        started = time.monotonic()
        while not condition():
            assert time.monotonic() - started < patience_s, f"in vain: {what}\n{self.tails()}"
            time.sleep(0.05)
        return time.monotonic() - started

    def tails(self) -> str:
        """The ends of all logs."""
        logs = sorted(self.logs.glob("*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)

    def log(self, name: str) -> str:
        """What a program has said so far."""
        return (self.logs / f"{name}.log").read_text(errors="replace")

    def close(self) -> None:
        self.kill_everything()

    def _start(
        self, name: str, command: list[str], environment: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        with (self.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**self.environment, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.running[name] = process
        return process

    def _is_healthy(self) -> bool:
        try:
            return httpx.get(f"{self.api}/health", timeout=2).is_success
        except httpx.HTTPError:
            return False

    def _marked(self) -> list[psutil.Process]:
        """Live processes that inherited this stack's mark."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                is_ours = process.environ().get(MARK) == str(self.artifacts)
                if is_ours and process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
                    found.append(process)
        return found
