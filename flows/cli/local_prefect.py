"""Prefect for one process or one demo: its own home below the artifacts folder, no analytics, loopback only.

This module imports no Prefect, because Prefect reads its settings from the environment when it is first imported.
"""

import logging
import os
import socket
from pathlib import Path

from flows.cli.shared import err
from flows.guard import guard_children
from kdrl_core.errors import KdrlError
from kdrl_core.ledger import artifacts_root
from kdrl_core.ledger.publish import require_writable

_QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
}

_OWN_ORIGIN = "http://127.0.0.1"
"""By default Prefect lets every web page use its API: a page in a browser could run code on this machine."""

_MIN_FREE_MB = 64


class PortError(KdrlError, OSError):
    """A port is taken, or is not a port number."""


class _Warnings(logging.Handler):
    """Prints kdrl's warnings where Prefect's log is off."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger("prefect.flow_runs").isEnabledFor(record.levelno):
            err.say(f"{record.levelname.lower()}: {record.getMessage()}")


_warnings = _Warnings(logging.WARNING)


def use_private_prefect(*, log_level: str) -> None:
    """Set the environment so that Prefect needs no set-up. Call it before Prefect is imported.

    With PREFECT_API_URL set, flows are shown on that server; otherwise Prefect starts a temporary one on loopback.
    """
    logging.getLogger("kdrl").addHandler(_warnings)
    os.environ.update(_QUIET)
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", log_level)
    if "PREFECT_API_URL" not in os.environ:
        guard_children()
        os.environ.setdefault("PREFECT_HOME", str(prefect_home()))
        os.environ["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] = "true"
        os.environ["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] = _OWN_ORIGIN


def server_environment(port: int) -> dict[str, str]:
    """The environment of a private server on loopback and of its clients."""
    return {
        **os.environ,
        **_QUIET,
        "PREFECT_HOME": str(prefect_home()),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_UI_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"{_OWN_ORIGIN}:{port}",
    }


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
