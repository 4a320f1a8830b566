"""The body of a server's answer, decompressed up to a limit. A few KB of gzip can stand for gigabytes."""

import time
import zlib
from collections.abc import Iterator
from typing import Any

import httpx

ACCEPTED = "gzip, deflate"
"""What kdrl asks for as `Accept-Encoding`: zlib can stop in the middle of a body, which httpx's decoders cannot."""
_BASE_BYTES = 2**24
_BYTES_PER_LOGPROB = 512
"""An entry of vLLM's logprobs takes 80 bytes; one with a long token in escapes takes 300."""
_PIECE = 2**16
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_RAW_DEFLATE = -zlib.MAX_WBITS


class BodyTooLargeError(Exception):
    """An answer is longer than any that was asked for can be."""


def most_bytes(body: dict[str, Any] | None) -> int:
    """The most bytes that the answer to a request may have, from the tokens and logprobs that it asks for."""
    asked = body or {}
    prompt = asked.get("prompt")
    tokens = len(prompt) if isinstance(prompt, list) else 0
    tokens += asked.get("max_tokens") or asked.get("max_completion_tokens") or 0
    each = 1 + max(int(asked.get(name) or 0) for name in ("prompt_logprobs", "logprobs", "top_logprobs"))
    return _BASE_BYTES + _BYTES_PER_LOGPROB * tokens * each


def read_body(response: httpx.Response, *, most: int, deadline: float) -> bytes:
    """The decompressed body of a streamed answer.

    Args:
        most: bytes that it may have.
        deadline: of the whole body, by `time.monotonic`.

    Raises:
        BodyTooLargeError: it has more.
        httpx.DecodingError: it is cut off, damaged, or of an encoding that was not asked for.
        httpx.ReadTimeout: it takes too long.
    """
    content = bytearray()
    for piece in _decoded(response):
        content += piece
        if len(content) > most:
            raise BodyTooLargeError(f"an answer of more than {most:,} bytes")
        if time.monotonic() > deadline:
            raise httpx.ReadTimeout("the body takes too long")
    return bytes(content)


def _decoded(response: httpx.Response) -> Iterator[bytes]:
    """The body in pieces of limited size."""
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    if encoding in ("", "identity"):
        yield from response.iter_raw()
    elif encoding in ("gzip", "x-gzip", "deflate"):
        yield from _inflated(response.iter_raw(), may_be_raw=encoding == "deflate")
    else:
        raise httpx.DecodingError("its encoding was not asked for")


def _inflated(pieces: Iterator[bytes], *, may_be_raw: bool) -> Iterator[bytes]:
    """zlib's or gzip's data decompressed; with `may_be_raw` also deflate without a header, as some servers send."""
    decoder, is_empty = zlib.decompressobj(_GZIP_OR_ZLIB), True
    for raw in pieces:
        rest, found = raw, b""
        while not decoder.eof and (rest or len(found) == _PIECE):  # a full piece: there may be more in the decoder
            try:
                found = decoder.decompress(rest, _PIECE)
            except zlib.error as error:
                if not (is_empty and may_be_raw):
                    raise httpx.DecodingError(str(error)) from None
                decoder, may_be_raw = zlib.decompressobj(_RAW_DEFLATE), False
                continue
            is_empty, rest = False, decoder.unconsumed_tail
            yield found
    if not (decoder.eof or is_empty):
        raise httpx.DecodingError("the body is cut off")
