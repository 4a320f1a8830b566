"""A Prefect that knows nothing of the user's: settings of a private server and of the programs that talk to it.

Prefect reads settings from the environment, from `.env`, `prefect.toml` and `pyproject.toml` in the working directory,
and from a profile. So the environment is cleaned, the profile is one that does not exist, and Prefect is first imported
in its own home: it reads its settings then, and never again. Importing this module imports no Prefect.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

IS_PRIVATE = "KDRL_PRIVATE_PREFECT"
"""Environment variable with the home of the private Prefect: programs that kdrl starts use it as well."""

QUIET = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
"""Send no analytics, to any server."""
_IN_BATCHES = {
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL": "1",
}
"""Record the states of task runs, and events, once a second. One by one, as by default, the server of two cells takes a
quarter of a core."""
_OWN_ORIGIN = "http://127.0.0.1"
"""By default Prefect lets every web page use its API: a page in a browser could run code on this machine."""
_LOOPBACK = ("127.0.0.1", "localhost")


def private_environment(home: Path, port: int, inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment of a private server on loopback and of its clients: nothing of Prefect's that was inherited, and
    no proxy before loopback."""
    home, url = home.absolute(), f"http://127.0.0.1:{port}"
    environment = {name: value for name, value in inherited.items() if not name.upper().startswith("PREFECT_")}
    for name in ("no_proxy", "NO_PROXY"):
        hosts = [host for host in environment.get(name, "").split(",") if host.strip()]
        environment[name] = ",".join([*hosts, *(host for host in _LOOPBACK if host not in hosts)])
    return {
        **environment,
        **QUIET,
        **_IN_BATCHES,
        IS_PRIVATE: str(home),
        "PREFECT_HOME": str(home),
        "PREFECT_PROFILES_PATH": str(home / "no-profiles.toml"),
        "PREFECT_API_URL": f"{url}/api",
        "PREFECT_SERVER_UI_API_URL": f"{url}/api",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"{_OWN_ORIGIN}:{port}",
    }


@contextmanager
def without_foreign_files() -> Iterator[None]:
    """Import Prefect inside: its settings are then not those of files in the working directory. Without effect where
    the server is the user's."""
    if IS_PRIVATE not in os.environ:
        yield
        return
    before = Path.cwd()
    os.chdir(os.environ[IS_PRIVATE])
    try:
        yield
    finally:
        os.chdir(before)
