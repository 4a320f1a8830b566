"""`kdrl recover` against a real server: zombies of the run, and of no other, are ended."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.events.clients import PrefectEventsClient
from prefect.events.schemas.events import Event
from prefect.events.worker import EventsWorker
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Pending, Running, State
from typer.testing import CliRunner, Result

from flows import stopping
from flows.cli import app
from kdrl_core.config import load_recipe
from kdrl_core.ledger import Run, create_run, run_lock

Begin = Callable[[str, State], FlowRun]


@flow(name="kdrl")
def pipeline(run_name: str) -> None:
    """Stands for the pipeline where only its run on the server matters."""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("KDRL_ARTIFACTS", str(tmp_path))
    monkeypatch.setenv("PREFECT_API_URL", str(PREFECT_API_URL.value()))
    create_run("other", load_recipe("miniature"))
    return create_run("zombie", load_recipe("miniature"))


@pytest.fixture
def begin() -> Begin:
    """Begin a flow run of a kdrl run in a state, without a process."""

    def begin(run_name: str, state: State) -> FlowRun:
        with get_client(sync_client=True) as client:
            return client.create_flow_run(pipeline, parameters={"run_name": run_name}, state=state)

    return begin


def state_of(flow_run: FlowRun) -> str:
    with get_client(sync_client=True) as client:
        return str(client.read_flow_run(flow_run.id).state_name)


def recover(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["recover", *arguments])


def test_zombies_of_the_run_are_ended_and_no_others(run: Run, begin: Begin) -> None:
    zombies = [begin("zombie", Running()), begin("zombie", Pending())]
    others = [begin("other", Running()), begin("zombie", Completed()), begin("no-such-run", Running())]
    leftover = run.paths.root / ".tmp-pool.parquet-1-00000000"
    leftover.write_text("half")

    done = recover("zombie")

    assert done.exit_code == 0, done.output
    assert [state_of(zombie) for zombie in zombies] == ["Crashed", "Crashed"]
    assert [state_of(other) for other in others] == ["Running", "Completed", "Running"]
    for zombie, was in zip(zombies, ("Running", "Pending"), strict=True):
        assert f"{zombie.name}: {was} since " in done.output
    assert "unfinished files swept: 1" in done.output
    assert "go on with: kdrl resume zombie" in done.output
    assert not leftover.exists()
    again = recover("zombie")
    assert again.exit_code == 0
    assert "no flow run of zombie is running on http://" in again.output


def test_as_json(run: Run, begin: Begin) -> None:
    zombie = begin("zombie", Running())
    found = json.loads(recover("zombie", "--json").stdout)
    assert (found["run"], found["swept"]) == ("zombie", 0)
    assert [one["id"] for one in found["crashed"]] == [str(zombie.id)]


def test_a_run_that_is_worked_on_is_left_alone(run: Run, begin: Begin, tmp_path: Path) -> None:
    alive = begin("zombie", Running())
    script = "import sys; from pathlib import Path; from kdrl_core.ledger import run_lock\n"
    script += "with run_lock(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(run.paths.lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        done = recover("zombie")
        assert done.exit_code == 1
        assert f"run zombie is in use by pid {holder.pid} on " in done.output
        assert state_of(alive) == "Running"
        holder.communicate()
    with run_lock(run.paths.lock):  # free again
        pass


def test_a_server_that_is_gone_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "from flows.cli import app; app()"
    environment = {**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_CLIENT_MAX_RETRIES": "0"}
    command = [sys.executable, "-c", program, "recover", "zombie"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the Prefect server at http://127.0.0.1:9/api cannot be asked (ConnectError)")


def test_without_a_server_it_says_what_it_did(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL")
    done = recover("zombie")
    assert done.exit_code == 0
    assert "PREFECT_API_URL is not set: no server was asked" in done.output
    unknown = recover("nobody")
    assert unknown.exit_code == 1
    assert "no run 'nobody'" in unknown.output


def test_events_do_not_hold_up_a_process_whose_server_is_gone() -> None:
    """Dozens are left when a flow gives up. Prefect tries each for 7 s; these wait for the next one."""

    async def emit() -> int:
        assert EventsWorker._client_override is not None
        client_type, options = EventsWorker._client_override
        client = client_type(**dict(options))
        assert isinstance(client, PrefectEventsClient)
        client._in_context = True
        for number in range(20):
            resource = {"prefect.resource.id": f"kdrl.event.{number}"}
            with pytest.raises(OSError, match="Connect"):
                await client.emit(Event(occurred=datetime.now(UTC), event="kdrl.event", resource=resource))
        return len(client._unconfirmed_events)

    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        stopping.let_no_event_wait()
        began = time.monotonic()
        assert asyncio.run(emit()) == 20
        assert time.monotonic() - began < 5
