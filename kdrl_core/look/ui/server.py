"""The app on loopback, by uvicorn."""

import os
import socket

import uvicorn
from fastapi import FastAPI

from kdrl_core.errors import RunError

HOST = "127.0.0.1"
USUAL_PORT = 8741
"""Default port, if it is free: so an address that somebody has noted stays valid."""

_LAST_ANSWERS_S = 1
"""Seconds that unfinished answers get at the end."""


def listen(port: int = 0) -> socket.socket:
    """A listening socket on loopback. Port 0: the default port if it is free, else any free one.

    Raises:
        RunError: the port is taken or not allowed.
    """
    for each in (port,) if port else (USUAL_PORT, 0):
        try:
            return socket.create_server((HOST, each))
        except OSError as error:
            fault = os.strerror(error.errno) if error.errno else str(error)
    raise RunError(f"cannot listen at {HOST}:{port or USUAL_PORT} ({fault}); give another --port, or leave it out")


def url_of(listening: socket.socket) -> str:
    """The app's address for a browser."""
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
