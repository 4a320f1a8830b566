"""Bodies of servers: decompressed whole, or refused before they fill the memory."""

import gzip
import json
import os
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kdrl_core.engines.answer_body import most_bytes
from kdrl_core.engines.server_client import ServerClient, TransientError

WORDS = {"data": ["word " * 40_000, os.urandom(90_000).hex(), "é"]}


def raw_deflate(content: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(content) + packer.flush()


@contextmanager
def answering(content: bytes, encoding: str | None) -> Iterator[str]:
    """A server that answers everything with these bytes; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers["Accept-Encoding"])
            self.send_response(200)
            if encoding is not None:
                self.send_header("Content-Encoding", encoding)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with suppress(OSError):  # the client hung up
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    asked: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
    assert asked == ["gzip, deflate"]


def ask(url: str) -> object:
    client = ServerClient(api_key=None, connections=1, timeout_s=30, field="servers", key_field="api_key")
    try:
        return client.answer("server", "GET", url, None)
    finally:
        client.close()


@pytest.mark.parametrize(
    ("pack", "encoding"),
    [
        (lambda content: content, None),
        (lambda content: content, "identity"),
        (gzip.compress, "gzip"),
        (zlib.compress, "deflate"),
        (raw_deflate, "deflate"),
        (lambda content: b"", "gzip"),
    ],
)
def test_bodies_come_whole(pack: Callable[[bytes], bytes], encoding: str | None) -> None:
    content = pack(json.dumps(WORDS).encode())
    with answering(content, encoding) as url:
        assert ask(url) == (WORDS if content else None)


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (gzip.compress(json.dumps(WORDS).encode())[:-900], "gzip"),
        (b"not gzip", "gzip"),
        (b"not deflate", "deflate"),
        (b"[]", "br"),
        (b"[]", "zstd"),
        (gzip.compress(gzip.compress(b"[]")), "gzip, gzip"),
    ],
    ids=["cut off", "not gzip", "not deflate", "br", "zstd", "twice"],
)
def test_what_cannot_be_decoded_is_told(content: bytes, encoding: str) -> None:
    with answering(content, encoding) as url, pytest.raises(TransientError, match="cannot be decoded"):
        ask(url)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_body_that_decodes_to_a_gigabyte_is_refused_early(encoding: str) -> None:
    packer = zlib.compressobj(9, wbits=31 if encoding == "gzip" else 15)
    zeros = bytes(2**24)
    content = b"".join(packer.compress(zeros) for _ in range(64)) + packer.flush()
    assert len(content) < 2**21
    tracemalloc.start()
    try:
        with answering(content, encoding) as url, pytest.raises(TransientError, match="sent an answer of more than 16"):
            ask(url)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**26


def test_the_limit_grows_with_what_is_asked_for() -> None:
    scored = {"prompt": [1] * 32_768, "max_tokens": 1, "prompt_logprobs": 20}
    assert most_bytes(scored) > 32_768 * 21 * 300
    assert most_bytes({"messages": [], "max_completion_tokens": 32_768}) > 32_768 * 400
    assert most_bytes(None) < 2**25
