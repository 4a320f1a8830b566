"""`kdrl deploy` of a wheel, as somebody who has no checkout: real wheel, server, worker and flow run."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from roads.stack import KDRL, ROOT, Stack
from support import TINY


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what pip would install."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    archived = subprocess.run(
        ["tar", "--create", "--null", "--files-from=-"],
        cwd=ROOT,
        input=listed.encode(),
        capture_output=True,
        check=True,
    )
    subprocess.run(["tar", "--extract"], cwd=source, input=archived.stdout, check=True)
    pip = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(folder)], cwd=source, capture_output=True, check=True)
    (wheel,) = folder.glob("kdrl-*.whl")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(folder)
    return folder


@pytest.mark.slow
def test_the_wheel_deploys_itself_and_a_worker_runs_it(unpacked: Path, artifacts: Path, tmp_path: Path) -> None:
    assert (unpacked / "flows" / "prefect.yaml").read_bytes() == (ROOT / "prefect.yaml").read_bytes()
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    stack = Stack(artifacts, tmp_path / "logs", folder=here)
    del stack.environment["KDRL_ARTIFACTS"]  # runs lie below the folder in which they were deployed
    stack.environment["PYTHONPATH"] = str(unpacked)
    try:
        assert stack.call(sys.executable, "-c", "import flows; print(*flows.__path__)").strip() == str(
            unpacked / "flows"
        )
        stack.start_server()
        said = stack.call(KDRL, "deploy")
        assert "work pool    kdrl" in said
        assert said.count("made") == 9
        assert "prefect worker start --pool kdrl\n" in said
        assert "prefect deployment run kdrl/full-pipeline\n" in said
        again = stack.call(KDRL, "deploy")
        assert (again.count("already there"), again.count("made")) == (9, 0)
        stack.folder = elsewhere
        stack.start_worker()
        flow_run = stack.begin("r", TINY)
        stack.wait("the flow run ends", lambda: stack.is_ended(flow_run))
        assert stack.state(flow_run) == "Completed", stack.tails()
        assert (here / "artifacts" / "runs" / "r" / "report" / "report.html").is_file()
        assert list(elsewhere.iterdir()) == []
        stack.folder = here
        assert "finished" in stack.call(KDRL, "status", "r")
    finally:
        stack.close()
