"""Every road of going on with a run whose processes were killed (SIGKILL): real server, worker, deployment.

The slow ones are run by `make test-roads`.
"""

import re
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from crash.tiny_run import differing, finish, train
from roads.stack import KDRL, PREFECT, Stack
from support import TINY

from kdrl_core.boxes.session import close_sessions
from kdrl_core.config import load_recipe
from kdrl_core.ledger import Run, create_run, lock_holder, open_run
from kdrl_core.ledger.lock import log_file

LONG = [*TINY, "stage2.steps=12", "stage1.evaluate_every=null", "stage2.evaluate_every=null"]
HIT = 3
"""Whatever is killed dies when this step of stage 2 and its checkpoint have just been published."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run, left alone."""
    run = create_run("r", load_recipe("miniature", LONG), artifacts=tmp_path_factory.mktemp("whole"))
    train(run)
    finish(run)
    close_sessions()
    return run


@pytest.fixture
def stack(artifacts: Path, tmp_path: Path) -> Iterator[Stack]:
    stack = Stack(artifacts, tmp_path / "logs")
    try:
        stack.start_server()
        stack.deploy()
        stack.start_worker()
        yield stack
    finally:
        stack.close()


def wait_for_hit(stack: Stack) -> dict[Path, int]:
    """Until the run is in the middle of stage 2; its published files with their inodes."""
    root = stack.artifacts / "runs" / "r"
    hit = root / "checkpoints" / "stage2" / f"step-{HIT + 1:06d}" / "manifest.json"
    stack.wait(f"step {HIT} of stage 2", hit.is_file)
    return {manifest: manifest.stat().st_ino for manifest in (root / "rollouts").rglob("_*.manifest.json")}


def check_end(stack: Stack, whole: Run, published: dict[Path, int]) -> None:
    """The run is finished, has the bytes of one left alone, and nothing that was published was made anew."""
    assert differing(open_run("r"), whole) == [], stack.tails()
    assert {path: path.stat().st_ino for path in published} == published
    assert "nothing to do: run r is finished" in stack.call(KDRL, "resume", "r")


def ended(stack: Stack, flow_run: str) -> str:
    stack.wait("the flow run ends", lambda: stack.is_ended(flow_run))
    return stack.state(flow_run)


@pytest.mark.slow
def test_everything_at_once_then_recover_and_the_deployment_again(stack: Stack, whole: Run) -> None:
    zombie = stack.begin("r", LONG)
    published = wait_for_hit(stack)
    stack.kill_everything()
    stack.start_server()
    stack.start_worker()
    assert stack.state(zombie) == "Running"  # a zombie: nobody tells Prefect
    said = stack.call(KDRL, "recover", "r")
    assert "r: Running since " in said
    assert "r-stage2: Running since " in said
    assert stack.state(zombie) == "Crashed"
    again = stack.begin("r", LONG)
    assert ended(stack, again) == "Completed", stack.tails()
    reused = re.search(r"stage2: steps 0 to (\d+) are published already, reused", stack.log("worker"))
    assert reused, stack.tails()
    assert int(reused[1]) >= HIT
    assert stack.log("worker").count(f"Task run 'stage2-{HIT:06d}-rollout'") == 1
    check_end(stack, whole, published)
    once_more = stack.begin("r", LONG)
    assert ended(stack, once_more) == "Completed"
    stack.wait("the worker's log says so", lambda: "nothing to do: run r is finished" in stack.log("worker"))


@pytest.mark.slow
@pytest.mark.parametrize("road", ["retry", "deployment", "resume"])
def test_the_flow_process(stack: Stack, whole: Run, road: str) -> None:
    first = stack.begin("r", LONG)
    published = wait_for_hit(stack)
    stack.flow_process().kill()
    assert ended(stack, first) == "Crashed"
    if road == "resume":
        stack.call(KDRL, "resume", "r")
    else:
        if road == "retry":
            assert "has been scheduled for retry" in stack.call(PREFECT, "flow-run", "retry", first)
        flow_run = first if road == "retry" else stack.begin("r", LONG)
        stack.wait("it goes on", lambda: stack.state(flow_run) != "Crashed")
        assert ended(stack, flow_run) == "Completed", stack.tails()
    check_end(stack, whole, published)


@pytest.mark.slow
def test_the_worker(stack: Stack, whole: Run) -> None:
    first = stack.begin("r", LONG)
    published = wait_for_hit(stack)
    stack.kill("worker")
    stack.start_worker()
    state = ended(stack, first)  # the flow process goes on, or ends with its worker: never two at once
    if state != "Completed":
        assert ended(stack, stack.begin("r", LONG)) == "Completed", stack.tails()
    check_end(stack, whole, published)


@pytest.mark.slow
def test_worker_and_flow_process_leave_a_zombie_that_retry_refuses(stack: Stack, whole: Run) -> None:
    zombie = stack.begin("r", LONG)
    published = wait_for_hit(stack)
    flow = stack.flow_process()
    stack.kill("worker")
    flow.kill()
    stack.start_worker()
    stack.wait("nobody works on the run", lambda: "in use by" not in stack.call(KDRL, "status", "r"))
    if stack.state(zombie) == "Running":
        assert "cannot" in stack.call(PREFECT, "flow-run", "retry", zombie, check=False)
        assert "→ Crashed" in stack.call(KDRL, "recover", "r")
    stack.call(PREFECT, "flow-run", "retry", zombie)
    stack.wait("it goes on", lambda: stack.state(zombie) != "Crashed")
    assert ended(stack, zombie) == "Completed", stack.tails()
    check_end(stack, whole, published)


@pytest.mark.slow
def test_the_server_for_half_a_minute(stack: Stack, whole: Run) -> None:
    flow_run = stack.begin("r", LONG)
    published = wait_for_hit(stack)
    stack.kill("server")
    time.sleep(30)  # the outage itself
    stack.start_server()
    assert ended(stack, flow_run) == "Completed", stack.tails()
    check_end(stack, whole, published)


@pytest.mark.slow
def test_the_server_for_good(stack: Stack, whole: Run) -> None:
    stack.begin("r", LONG)
    published = wait_for_hit(stack)
    flow = stack.flow_process()
    stack.kill("server")
    seconds = stack.wait("the flow gives up", lambda: not flow.is_running(), 300)
    print(f"gave up after {seconds:.0f} s")
    stack.kill("worker")
    stack.environment.pop("PREFECT_API_URL")
    assert "in use by" not in stack.call(KDRL, "status", "r")
    stack.call(KDRL, "resume", "r")  # without any server
    check_end(stack, whole, published)


@pytest.mark.slow
def test_a_locked_database(stack: Stack, whole: Run) -> None:
    flow_run = stack.begin("r", LONG)
    published = wait_for_hit(stack)
    database = next((stack.artifacts / "prefect").glob("*.db"))
    with sqlite3.connect(database, isolation_level=None, timeout=60) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        time.sleep(20)  # nobody else can write in the meantime
        connection.execute("ROLLBACK")
    assert ended(stack, flow_run) == "Completed", stack.tails()
    check_end(stack, whole, published)


@pytest.mark.slow
def test_two_at_once(stack: Stack, whole: Run) -> None:
    first = stack.begin("r", LONG)
    wait_for_hit(stack)
    flow = stack.flow_process()
    flow.send_signal(signal.SIGSTOP)  # so that it holds the run for as long as this takes
    said = stack.call(KDRL, "resume", "r", check=False)
    assert f"run r is in use by pid {flow.pid} on " in said
    second = stack.begin("r", LONG)
    assert ended(stack, second) == "Failed"
    stack.wait("the worker's log says so", lambda: f"run r is in use by pid {flow.pid} on " in stack.log("worker"))
    flow.send_signal(signal.SIGCONT)
    assert ended(stack, first) == "Completed"
    assert differing(open_run("r"), whole) == []


@pytest.mark.slow
def test_kdrl_run_leaves_no_server_behind(artifacts: Path, tmp_path: Path, whole: Run) -> None:
    stack = Stack(artifacts, tmp_path / "logs")
    stack.environment.pop("PREFECT_API_URL")
    sets = [part for value in LONG for part in ("--set", value)]
    try:
        stack.start("run", KDRL, "run", "--name", "r", *sets)
        published = wait_for_hit(stack)
        family = psutil.Process(stack.running["run"].pid).children(recursive=True)
        assert any("uvicorn" in " ".join(child.cmdline()) for child in family)
        stack.kill("run")
        seconds = stack.wait("the temporary server ends", lambda: not any(child.is_running() for child in family), 30)
        began = time.monotonic()
        stack.start("resume", KDRL, "resume", "r")
        hit = stack.artifacts / "runs/r/rollouts/stage=stage2" / f"step={HIT + 2:06d}" / "_update.manifest.json"
        stack.wait("a new step", hit.is_file)
        print(f"server gone after {seconds:.1f} s; first new step {time.monotonic() - began:.1f} s after kdrl resume")
        assert stack.running["resume"].wait(120) == 0
        assert re.search(r"stage2: steps 0 to \d+ are published already, reused", stack.log("resume"))
        check_end(stack, whole, published)
    finally:
        stack.close()


@pytest.mark.slow
@pytest.mark.parametrize("by", ["deployment", "kdrl run"])
def test_a_cancelled_flow_run_stops_after_publishing(stack: Stack, whole: Run, by: str) -> None:
    """`prefect flow-run cancel`: a worker also sends SIGTERM; for `kdrl run` nobody but the run itself looks."""
    if by == "deployment":
        flow_run = stack.begin("r", LONG)
    else:
        stack.start("run", KDRL, "run", "--name", "r", *(part for one in LONG for part in ("--set", one)))
    published = wait_for_hit(stack)
    if by == "kdrl run":
        flow_run = stack.find("r")
    said = stack.call(PREFECT, "flow-run", "cancel", flow_run)
    assert "scheduled for cancellation" in " ".join(said.split())
    assert ended(stack, flow_run) == "Cancelled", stack.tails()
    run = open_run("r")
    stack.wait("the run is free", lambda: lock_holder(run.paths.lock) is None)
    log = log_file(run.paths.root).read_text()
    assert re.search(r"session ends: (cancelled in Prefect|stopped by its worker); go on with: kdrl resume r", log), log
    if by == "kdrl run":
        assert stack.running["run"].wait(30) == 1
        assert "cancelled in Prefect; go on with: kdrl resume r" in stack.log("run")
    steps = sorted(path.parent.name for path in run.paths.root.glob("rollouts/stage=stage2/*/update.parquet"))
    assert len(steps) < 12
    assert run.paths.checkpoint("stage2", len(steps)).is_dir()  # the last step is published whole
    stack.call(KDRL, "resume", "r")
    check_end(stack, whole, published)
