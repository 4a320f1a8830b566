"""Prefect for one process or one demo: a server of its own on loopback, or the user's, asked once whether it answers.

This module imports no Prefect before the environment is set, because Prefect reads its settings when it is first
imported.
"""

import atexit
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from flows.cli.shared import err
from flows.private_prefect import IS_PRIVATE, QUIET, private_environment, without_foreign_files
from kdrl_core.errors import KdrlError, told
from kdrl_core.ledger import artifacts_root
from kdrl_core.ledger.publish import require_writable
from kdrl_core.process_guard import kill_group

_MIN_FREE_MB = 64
_START_S = 120.0
_STOP_S = 1.5
_PROBE_S = 5.0


class PortError(KdrlError, OSError):
    """A port is taken, or is not a port number."""


class ServerError(KdrlError, ConnectionError):
    """A Prefect server does not answer, or cannot be started."""


class _Warnings(logging.Handler):
    """Prints kdrl's warnings where Prefect's log is off."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger("prefect.flow_runs").isEnabledFor(record.levelno):
            err.say(f"{record.levelname.lower()}: {record.getMessage()}")


_warnings = _Warnings(logging.WARNING)


def use_private_prefect(*, log_level: str) -> Callable[[], None]:
    """Make Prefect ready without any set-up; call it before Prefect is imported. Returns a function that waits until
    the server answers. Raises ServerError, and so does that function, if it does not.

    With PREFECT_API_URL set, flows are shown on that server. Otherwise a temporary one is started on loopback, and
    nothing of the user's Prefect reaches it.
    """
    logging.getLogger("kdrl").addHandler(_warnings)
    if os.environ.get("PREFECT_API_URL", "").strip():
        os.environ.pop(IS_PRIVATE, None)
        os.environ.update(QUIET)
        os.environ.setdefault("PREFECT_LOGGING_LEVEL", log_level)
        _import_prefect()
        _probe()
        return lambda: None
    port = free_port()
    environment = server_environment(port)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment, PREFECT_LOGGING_LEVEL=log_level)
    _drop_unusable_proxies()
    server = PrivateServer(environment, port)
    _import_prefect()
    return server.wait


def use_set_prefect() -> str:
    """Make ready the Prefect that PREFECT_API_URL or a profile of the user names; call it before Prefect is imported.
    Returns the URL of its server. Raises ServerError if none is set, or if it does not answer."""
    os.environ.update(QUIET)
    _import_prefect(otherwise="")
    from prefect.settings import PREFECT_API_URL

    if not (url := PREFECT_API_URL.value()):
        raise ServerError(
            "no Prefect server is set; start one that stays (prefect server start), and say where it is: "
            "export PREFECT_API_URL=http://127.0.0.1:4200/api"
        )
    _probe(remedy="start it (prefect server start), or correct PREFECT_API_URL")
    return str(url)


class PrivateServer:
    """A Prefect server in a session of its own, so that signals to this process's group do not end it first. It ends
    with this process; if this process is killed, its guard ends it."""

    def __init__(self, environment: dict[str, str], port: int) -> None:
        home = Path(environment[IS_PRIVATE])
        self._health = f"{environment['PREFECT_API_URL']}/health"
        self._log = home / "logs" / f"server-of-{os.getpid()}.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        # As Prefect starts its own temporary server; `prefect server start` takes two seconds more.
        place = ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error", "--lifespan", "on"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app", *place],
                env={**environment, "PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1"},
                cwd=home,  # where no settings of others lie
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        atexit.register(self.stop)

    def wait(self) -> None:
        """Wait until it answers. Raises ServerError."""
        deadline = time.monotonic() + _START_S
        without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
                raise ServerError(
                    f"the temporary Prefect server ended with exit code {self._process.returncode}: "
                    f"{''.join(said)} (all of it: {self._log})"
                )
            with suppress(urllib.error.URLError, OSError), without_proxy.open(self._health, timeout=2):
                return
            time.sleep(0.1)
        raise ServerError(f"the temporary Prefect server did not answer within {_START_S:.0f} s; its log: {self._log}")

    def stop(self) -> None:
        """End it. What it holds is on disk, and nothing of a run depends on it."""
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_S)
        kill_group(self._process.pid)
        self._process.wait()
        with suppress(OSError):
            self._log.unlink()


def server_environment(port: int) -> dict[str, str]:
    """The environment of a private server on loopback and of its clients."""
    return private_environment(prefect_home(), port, os.environ)


def prefect_home() -> Path:
    """The project's own PREFECT_HOME. It is made if it is missing, since Prefect's database needs the folder.

    Raises StorageError if it cannot be written or the disk is full: Prefect's own message would not say so.
    """
    home = artifacts_root() / "prefect"
    require_writable(home, free_mb=_MIN_FREE_MB)
    return home


def free_port(wanted: int | None = None) -> int:
    """`wanted` if it is free on loopback, or any free port. Raises PortError if `wanted` is taken or not a port."""
    if wanted is not None and not 0 < wanted < 2**16:
        raise PortError(f"{wanted} is not a port; choose one between 1024 and 65535, e.g. make demo PORT=4200")
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", wanted or 0))
        except OSError as error:
            raise PortError(
                f"port {wanted} on 127.0.0.1 cannot be used ({error.strerror}); stop its program or choose another, "
                f"e.g. make demo PORT={(wanted or 0) + 1}"
            ) from error
        return int(probe.getsockname()[1])


def _import_prefect(*, otherwise: str = ", or unset PREFECT_API_URL: then kdrl uses a Prefect of its own") -> None:
    """Import Prefect, which reads its settings. Raises ServerError if they are not valid."""
    try:
        with without_foreign_files():
            import prefect.context  # noqa: F401 (reads the settings)
    except Exception as error:  # pydantic's, or of a settings file
        raise ServerError(
            f"the settings of Prefect are not valid ({told(error)[:300]}); correct them (environment, profile, "
            f"prefect.toml){otherwise}"
        ) from error


def _probe(*, remedy: str = "start it, or unset PREFECT_API_URL: then kdrl uses a server of its own") -> None:
    """Ask the user's server once, with the user's settings. Raises ServerError if it does not answer."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    url = str(PREFECT_API_URL.value())
    try:
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
            get_client(sync_client=True, httpx_settings={"timeout": _PROBE_S}) as client,
        ):
            fault = client.api_healthcheck()
            if fault is None and "/api" not in url:
                client.api_version()  # raises where a server's web page answers: it does so at every path
    except Exception as error:  # the URL, a proxy or a certificate cannot be used at all
        fault = error
    if fault is not None:
        proxies = sorted(name for name in os.environ if name.lower() in _PROXIES)
        hint = f" through the proxy of {', '.join(proxies)}" if proxies else ""
        hint += "" if "/api" in url else ", and the URL of a Prefect server ends with /api"
        raise ServerError(
            f"the Prefect server of PREFECT_API_URL, {url}, does not answer{hint} ({told(fault)[:200]}); {remedy}"
        ) from fault


_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def _drop_unusable_proxies() -> None:
    """Forget proxies that httpx cannot use at all, such as SOCKS without its package: no client could be made."""
    import httpx

    for name in [name for name in os.environ if name.lower() in _PROXIES]:
        try:
            httpx.HTTPTransport(proxy=os.environ[name]).close()
        except Exception as error:
            err.say(f"warning: {name} is ignored: it cannot be used ({told(error)[:200]})")
            del os.environ[name]
