"""The app on loopback, by uvicorn."""

import os
import socket

import uvicorn
from fastapi import FastAPI

from kdrl_core.errors import RunError

HOST = "127.0.0.1"
USUAL_PORT = 8741
"""Where the app listens if nobody says otherwise and nobody else does: an address that is shared stays good."""

_LAST_ANSWERS_S = 1
"""Seconds that answers under way are given at the end."""


def listen(port: int = 0) -> socket.socket:
    """A listening socket on loopback; port 0: the usual one if it is free, else any that is.

    Raises:
        RunError: somebody listens on that port, or nobody may.
    """
    for each in (port,) if port else (USUAL_PORT, 0):
        try:
            return socket.create_server((HOST, each))
        except OSError as error:
            fault = os.strerror(error.errno) if error.errno else str(error)
    raise RunError(f"cannot listen at {HOST}:{port or USUAL_PORT} ({fault}); give another --port, or leave it out")


def url_of(listening: socket.socket) -> str:
    """Where a browser finds the app."""
    return f"http://{HOST}:{listening.getsockname()[1]}/"


def server_of(app: FastAPI) -> uvicorn.Server:
    """The server; `run(sockets=[listen()])` serves until Ctrl-C."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="off",
        timeout_graceful_shutdown=_LAST_ANSWERS_S,
    )
    return uvicorn.Server(config)
