"""The web app over an open store, by uvicorn on loopback. Answers that are not files are JSON, errors included.

A foreign web page can make its name resolve to 127.0.0.1 (DNS rebinding) and then read the answers, so the Host header
must name loopback. No other origin is allowed (no CORS), and requests that a browser marks as coming from another site
are refused before any query. Responses of models are hostile text: the policy forbids inline scripts and styles, other
origins, and turning text into HTML.
"""

import os
import socket
from importlib import resources

import duckdb
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kdrl_core.errors import KdrlError, RunError
from kdrl_core.look.rollouts.query import RolloutStore
from kdrl_core.look.ui.api import EVERY_S, api_of

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)

_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


class Guard:
    """ASGI middleware: refuses foreign hosts, other sites and methods that write; puts the policy on every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # no web sockets here

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = _refusal(scope["method"], Headers(scope=scope))
        await (self._app if refusal is None else refusal)(scope, receive, send_guarded)


def _refusal(method: str, headers: Headers) -> JSONResponse | None:
    if _host(headers.get("host", "")) not in LOOPBACK:
        return JSONResponse({"error": "kdrl ui answers at 127.0.0.1 and localhost only"}, status_code=421)
    if (
        headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        and headers.get("sec-fetch-mode") != "navigate"
    ):
        return JSONResponse({"error": "requests from other sites are refused"}, status_code=403)
    if method not in ("GET", "HEAD"):
        return JSONResponse({"error": "kdrl ui only reads: use GET"}, status_code=405, headers={"allow": "GET, HEAD"})
    return None


def _host(value: str) -> str:
    """The name in a Host header, without its port."""
    name, colon, port = value.rpartition(":")
    return name.lower() if colon and port.isdecimal() else value.lower()


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
"""Default port, if it is free: so a bookmarked address stays valid."""

_LAST_ANSWERS_S = 1
"""Seconds that unfinished answers get at shutdown."""


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
