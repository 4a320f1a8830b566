"""Whose Prefect a command uses, what reaches a private one, and how errors end a command."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flows.cli import shared
from kdrl_core.config import load_recipe
from kdrl_core.errors import DataError
from kdrl_core.ledger import create_run, run_lock
from kdrl_core.ledger.lock import log_file

DEAD = "http://127.0.0.1:9"
"""Nothing listens on the discard port."""

FOREIGN = {
    "PREFECT_API_KEY": "foreign",
    "PREFECT_API_AUTH_STRING": "foreign:foreign",
    "PREFECT_SERVER_API_AUTH_STRING": "foreign:foreign",
    "PREFECT_API_DATABASE_CONNECTION_URL": "sqlite+aiosqlite:////nowhere/prefect.db",
    "PREFECT_CLIENT_CUSTOM_HEADERS": '{"X-Foreign": "foreign"}',
    "PREFECT_LOGGING_LEVEL": "no such level",
    "PREFECT_SERVER_PORT": "no such port",
    "prefect_tasks_default_retries": "77",
    "HTTP_PROXY": DEAD,
    "https_proxy": DEAD,
    "ALL_PROXY": "socks5://127.0.0.1:9",
}
ASK = """
from flows.cli.local_prefect import use_private_prefect
wait = use_private_prefect(log_level="CRITICAL")
from prefect.client.orchestration import get_client
from prefect.settings import get_current_settings
wait()
with get_client(sync_client=True) as client:
    assert client.api_healthcheck() is None
    assert str(client.api_url).startswith("http://127.0.0.1:")
    client.read_flow_runs()
settings = get_current_settings()
foreign = [name for name, value in settings.to_environment_variables(exclude_unset=True).items() if "foreign" in value]
print("foreign:", foreign, settings.tasks.default_retries)
"""


def test_no_setting_of_the_users_reaches_the_private_server(tmp_path: Path, prefect_database: Path) -> None:
    """From the environment, `.env`, prefect.toml, pyproject.toml, or the active profile."""
    here, home = tmp_path / "here", tmp_path / "home" / ".prefect"
    here.mkdir()
    home.mkdir(parents=True)
    own = tmp_path / "artifacts" / "prefect"
    own.mkdir(parents=True)
    shutil.copy(prefect_database, own)
    (here / ".env").write_text(f"PREFECT_API_URL={DEAD}/api\nPREFECT_API_KEY=foreign\n")
    (here / "prefect.toml").write_text('[api]\nkey = "foreign"\n[server.api]\nport = "no such port"\n')
    (here / "pyproject.toml").write_text('[tool.prefect.api]\nauth_string = "foreign"\n')
    profile = f'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "{DEAD}/api"\nPREFECT_API_KEY = "foreign"\n'
    (home / "profiles.toml").write_text(profile)
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        cwd=here,
        env={**os.environ, **FOREIGN, "HOME": str(tmp_path / "home"), "KDRL_ARTIFACTS": str(tmp_path / "artifacts")},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "foreign: [] 0"
    assert "warning: ALL_PROXY is ignored" in done.stderr


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, f"the Prefect server of PREFECT_API_URL, {DEAD}/api, does not answer (ConnectError"),
        ({"HTTP_PROXY": DEAD}, "does not answer through the proxy of HTTP_PROXY (ConnectError"),
        ({"PREFECT_CLIENT_MAX_RETRIES": "many"}, "the settings of Prefect are not valid ("),
    ],
)
def test_a_server_that_was_set_is_asked_once(cli: Any, artifacts: Path, settings: dict[str, str], said: str) -> None:
    done = cli("run", "--name", "r", PREFECT_API_URL=f"{DEAD}/api", **settings)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said in line
    assert "unset PREFECT_API_URL" in line
    assert "Traceback" not in done.stderr
    assert not (artifacts / "runs" / "r").exists()


def test_deploy_needs_a_server_that_stays(cli: Any, tmp_path: Path) -> None:
    done = cli("deploy", PREFECT_HOME=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: no Prefect server is set; start one that stays (prefect server start), and say where it is: "
        "export PREFECT_API_URL=http://127.0.0.1:4200/api\n"
    )


def test_a_run_in_use_is_refused_at_once(cli: Any, artifacts: Path) -> None:
    run = create_run("held", load_recipe("miniature", []), artifacts=artifacts)
    with run_lock(run.paths.lock):
        cli("recipes")  # the program's modules are in the page cache
        began = time.monotonic()
        for command in (("resume", "held"), ("run", "--name", "held")):
            done = cli(*command)
            assert done.returncode == 1
            assert f"run held is in use by pid {os.getpid()} on " in done.stderr
        assert (time.monotonic() - began) / 2 < 5  # 2 s on a quiet machine


def test_a_bug_is_told_in_one_line_with_its_traceback_in_a_file(
    artifacts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KDRL_ARTIFACTS", str(artifacts))
    with pytest.raises(SystemExit) as ended, shared.errors():
        {}["step"]
    assert ended.value.code == 1
    (line,) = "".join(capsys.readouterr().err.splitlines()).split("error: ")[1:]
    (log,) = (artifacts / "logs").iterdir()
    assert "Traceback" in log.read_text()
    assert line.replace(" ", "") == f"KeyError:'step';thisisabuginkdrl,pleasereportit(log:{log})"


def test_a_fault_of_the_machine_is_no_bug(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), shared.errors():
        raise PermissionError(13, "Permission denied", "/somewhere")
    said = capsys.readouterr().err
    assert said.startswith("error: PermissionError: [Errno 13] Permission denied")
    assert "bug" not in said


def test_an_error_of_a_run_names_its_log_and_is_in_its_status(
    artifacts: Path, cli: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = create_run("failed", load_recipe("miniature", []), artifacts=artifacts)
    with pytest.raises(SystemExit), shared.errors(), run_lock(run.paths.lock):
        raise DataError("problems.parquet row 41: empty; drop the row")
    log = log_file(run.paths.root)
    assert f"error: problems.parquet row 41: empty; drop the row (log: {log})" in capsys.readouterr().err
    for arguments in (["status"], ["status", "failed"]):
        done = cli(*arguments)
        assert "last error of failed, 20" in done.stdout
        assert f": problems.parquet row 41: empty; drop the row (log: {log})" in done.stdout
