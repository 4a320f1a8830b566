"""The web app: `create_app` over an open store. Every answer that is not a file is JSON, errors included."""

from importlib import resources

import duckdb
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from kdrl_core.errors import KdrlError, RunError
from kdrl_core.look.rollouts.query import RolloutStore
from kdrl_core.look.ui.api import api_of
from kdrl_core.look.ui.live import EVERY_S
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
