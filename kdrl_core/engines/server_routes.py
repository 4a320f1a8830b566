"""kdrl's additions to vLLM's server: scores and responses as plain bytes, and a key that guards every address.

vLLM loads the class by name (`--middleware kdrl_core.engines.server_routes.KdrlRoutes`). `GET /kdrl` says that it is
there. Numbers are little-endian, tokens int32 and logprobs float32.

`POST /kdrl/score?first=F&k=K&temperature=T`, with the n tokens of prompt and response as its body, answers the logprobs
of the m = n − F tokens from F on, and of the K likeliest there, under softmax(logits / T): [m, 1 + K] logprobs, the
token's own first, then [m, 1 + K] token ids. Without K the ids are left out. The server itself sees to the temperature,
so a server that was started again scores at the right one. At one time it scores at one temperature alone (else 409).

`POST /kdrl/sample?max_tokens=M&temperature=T&seed=S&stop=A,B`, with the tokens of the prompt as its body, samples a
response of m tokens: m logprobs, then m token ids. The header `finish-reason` is `stop` or `length`. A stop token
belongs to the response.
"""

import asyncio
import os
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kdrl_core.engines.server_client import ROUTES
from kdrl_core.engines.vllm_support import request_parameters

_BINARY = "application/octet-stream"


class KdrlRoutes:
    """ASGI middleware of vLLM's server. With VLLM_API_KEY set, it asks for the key at every address. vLLM itself asks
    for it where text is generated, but not where weights are loaded."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._key = os.environ.get("VLLM_API_KEY", "")
        self._temperature = 1.0
        self._num_scoring = 0
        self._setting = asyncio.Lock()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        answer: Callable[[Any, Any, Any], Awaitable[None]] = self._app
        if scope["type"] == "http":
            request = Request(scope, receive)
            if self._key and not _is_allowed(request, self._key):
                answer = JSONResponse({"error": "Unauthorized"}, status_code=401)
            elif (path := scope["path"]) == ROUTES:
                answer = JSONResponse({"kdrl": 1})
            elif path in (f"{ROUTES}/score", f"{ROUTES}/sample") and request.method == "POST":
                tokens = np.frombuffer(await request.body(), "<i4").tolist()
                work = self._score if path.endswith("score") else self._sample
                answer = await _unless_dropped(request, work(request, tokens))
        await answer(scope, receive, send)

    async def _score(self, request: Request, tokens: list[int]) -> Response:
        asked = request.query_params
        first, k, temperature = int(asked["first"]), int(asked["k"]), float(asked["temperature"])
        engine = request.app.state.engine_client
        async with self._setting:
            if temperature != self._temperature:
                if self._num_scoring:
                    return _refused("this server scores at another temperature now", 409)
                await engine.collective_rpc("kdrl_scale_prompt_logprobs", args=(temperature,))
                self._temperature = temperature
            self._num_scoring += 1
        try:
            output = await _result(engine, tokens, max_tokens=1, temperature=0.0, prompt_logprobs=k)
        finally:
            self._num_scoring -= 1
        if isinstance(output, Response):
            return output
        flat, size = output.prompt_logprobs, (len(tokens) - first) * (1 + k)
        start = len(flat.logprobs) - size
        return _binary(flat.logprobs[start:], flat.token_ids[start:] if k else [])

    async def _sample(self, request: Request, tokens: list[int]) -> Response:
        asked = request.query_params
        output = await _result(
            request.app.state.engine_client,
            tokens,
            max_tokens=int(asked["max_tokens"]),
            temperature=float(asked["temperature"]),
            seed=int(asked["seed"]),
            stop_token_ids=[int(token) for token in asked["stop"].split(",") if token],
            ignore_eos=True,  # EOS is among the stop tokens; vLLM would leave it out of the tokens
            logprobs=0,
        )
        if isinstance(output, Response):
            return output
        (response,) = output.outputs
        answer = _binary(response.logprobs.logprobs, response.token_ids)
        answer.headers["finish-reason"] = str(response.finish_reason)
        return answer


async def _result(engine: Any, tokens: list[int], **parameters: Any) -> Any:
    """vLLM's RequestOutput; or an answer of status 400 that says why vLLM does not take the request."""
    output = None
    try:
        sampling = request_parameters(**parameters)
        name = f"kdrl-{secrets.token_hex(8)}"
        async for each in engine.generate({"prompt_token_ids": tokens}, sampling, name):
            output = each
    except ValueError as error:  # of which vLLM's own are
        return _refused(str(error), 400)
    return output


async def _unless_dropped(request: Request, work: Any) -> Any:
    """The result of `work`, which is cancelled, and its request to the engine with it, if the caller hangs up."""
    working = asyncio.ensure_future(work)
    hearing = asyncio.ensure_future(_hang_up(request))
    await asyncio.wait([working, hearing], return_when=asyncio.FIRST_COMPLETED)
    hearing.cancel()
    if working.done():
        return working.result()
    working.cancel()
    return Response(status_code=499)


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _is_allowed(request: Request, key: str) -> bool:
    given = request.headers.get("authorization", "").encode()
    return secrets.compare_digest(given, f"Bearer {key}".encode())


def _binary(logprobs: Any, token_ids: Any) -> Response:
    values: NDArray[np.float32] = np.asarray(logprobs, "<f4")
    ids: NDArray[np.int32] = np.asarray(token_ids, "<i4")
    return Response(values.tobytes() + ids.tobytes(), media_type=_BINARY)


def _refused(why: str, status: int) -> Response:
    return JSONResponse({"error": why[:500]}, status_code=status)
