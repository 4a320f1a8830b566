"""The web app over an open store, by uvicorn on loopback. Answers that are not files are JSON, errors included."""

import os
import socket
from importlib import resources

import duckdb
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from kdrl_core.errors import KdrlError, RunError
from kdrl_core.look.rollouts.query import RolloutStore
from kdrl_core.look.ui.api import EVERY_S, api_of
from kdrl_core.look.ui.security import Guard

_STATIC = str(resources.files("kdrl_core.look.ui") / "static")


def create_app(store: RolloutStore, *, look_every_s: float = EVERY_S) -> FastAPI:
    """The app over the runs of `store`, which its caller closes. It only reads. When a page asks, it looks for new
    steps, but not more often than every `look_every_s` seconds."""
    app = FastAPI(title="kdrl ui", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard)
    app.add_exception_handler(KdrlError, _known)
    app.add_exception_handler(duckdb.Error, _database)
    app.add_exception_handler(RequestValidationError, _bad_request)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unknown)
    app.include_router(api_of(store, look_every_s=look_every_s))

    @app.get("/", include_in_schema=False)
    def index() -> FileResponse:
        return FileResponse(f"{_STATIC}/index.html")

    app.mount("/static", StaticFiles(directory=_STATIC))
    return app


def _error(status: int, text: str) -> JSONResponse:
    return JSONResponse({"error": text}, status_code=status)


def _known(_: Request, error: Exception) -> JSONResponse:
    return _error(404 if isinstance(error, RunError) else 400, str(error))


def _database(_: Request, error: Exception) -> JSONResponse:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return _error(503, f"DuckDB: {first}; narrow it down: a run, a stage, some steps, or the order by step")


def _bad_request(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = (f"{each['loc'][-1]}: {each['msg']}" for each in error.errors())
    return _error(400, f"cannot read the request: {'; '.join(found)}")


def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, f"{request.url.path}: {error.detail}")


def _unknown(_: Request, error: Exception) -> JSONResponse:
    return _error(500, f"{type(error).__name__} in kdrl itself; the terminal of kdrl ui has the details")


HOST = "127.0.0.1"
USUAL_PORT = 8741
"""Default port, if it is free: so an address that somebody has noted stays valid."""

_LAST_ANSWERS_S = 1
"""Seconds that unfinished answers get at the end."""


def listen(port: int = 0) -> socket.socket:
    """A listening socket on loopback. Port 0: the default port if it is free, else any free one. Raises RunError if the
    port is taken or not allowed."""
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
