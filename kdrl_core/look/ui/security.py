"""Checks on every request and headers on every answer: who may ask, and what a page may do.

The app listens on loopback. But a foreign web page can have its name resolve to 127.0.0.1 (DNS rebinding) and then read
the answers, so the Host header must name loopback. No other origin is allowed (no CORS), and requests that a browser
marks as coming from another site are refused before any query. Responses of models are hostile text: the policy forbids
inline scripts and styles, other origins, and turning text into HTML.
"""

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
