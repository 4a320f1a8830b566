"""A teacher server on loopback that speaks vLLM's API, scores with a real model, and fails as it is told to.

Its answers have the form of vLLM's (tests/parity/test_parity_served_teacher.py holds both together). Faults are taken
one a request from `faults`, first to last; then it answers.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import torch

from kdrl_core.models.loading import load_model

NAME = "teacher"


class FaultyServer:
    """`url`, the requests it has had, and the faults that it still has to make; "*" as the last goes on for ever."""

    def __init__(self, model_dir: Path, *, key: str | None = None, context: int = 512) -> None:
        self.model = load_model(model_dir)
        self.key, self.context = key, context
        self.faults: deque[str] = deque()
        self.requests = 0
        self.seen_keys: set[str | None] = set()
        self.can_be_told = False
        """As `kdrl serve`'s; plain `vllm serve` cannot."""
        self.has_routes = False
        """As `kdrl serve`'s: it sends bytes."""
        self.temperatures: set[float] = set()
        self.is_asleep = False
        self.told: list[str] = []
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if outer.is_refused(self):
                    return
                if self.path == "/kdrl":
                    outer.send(self, {"kdrl": 1} if outer.has_routes else {}, status=200 if outer.has_routes else 404)
                    return
                outer.send(self, {"object": "list", "data": [{"id": NAME, "max_model_len": outer.context}]})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if outer.is_refused(self):
                    return
                if self.path == "/collective_rpc":
                    outer.tell(self, json.loads(body)["method"])
                elif outer.has_routes and self.path.startswith("/kdrl/score"):
                    outer.score(self, body)
                else:
                    outer.complete(self, json.loads(body))

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that hang up are the point
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def is_refused(self, handler: BaseHTTPRequestHandler) -> bool:
        given = handler.headers.get("Authorization")
        self.seen_keys.add(given)
        if self.key is None or given == f"Bearer {self.key}":
            return False
        self.send(handler, {"error": f"Unauthorized: {given}"}, status=401)  # as servers do that echo the key
        return True

    def tell(self, handler: BaseHTTPRequestHandler, method: str) -> None:
        if not self.can_be_told:
            self.send(handler, {"detail": "Not Found"}, status=404)
            return
        self.told.append(method)
        self.is_asleep = method == "kdrl_sleep"
        self.send(handler, {"results": [{"weights": "", "incarnation": "first"}]})

    def score(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        """Bytes of `server_routes`; faults `short` and `nan` are done to them, others are a status."""
        asked = parse_qs(urlsplit(handler.path).query)
        k, first = int(asked["k"][0]), int(asked["first"][0])
        self.temperatures.add(float(asked["temperature"][0]))
        self.requests += 1
        fault = self.faults.popleft() if self.faults else ""
        positions = self._scored({"prompt": np.frombuffer(body, "<i4").tolist(), "prompt_logprobs": k})
        rows = positions["choices"][0]["prompt_logprobs"][first:]
        own = [next(iter(row)) for row in rows]
        best = [sorted(row, key=lambda each: -row[each]["logprob"])[:k] for row in rows]
        chosen = [[token, *tokens] for token, tokens in zip(own, best, strict=True)]
        values = [[row[token]["logprob"] for token in tokens] for row, tokens in zip(rows, chosen, strict=True)]
        logprobs = np.array(values, "<f4")
        if fault == "nan":
            logprobs[-1, 0] = np.nan
        data = logprobs.tobytes() + (np.array(chosen, "<i4").tobytes() if k else b"")
        if fault.isdecimal():
            self.send(handler, {"error": "trouble"}, status=int(fault))
        else:
            self.send(handler, data[:-4] if fault == "short" else data)

    def complete(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        with self._lock:
            assert not self.is_asleep, "asked for logprobs while it sleeps"
            self.requests += 1
            fault = self.faults[0] if self.faults else ""
            if self.faults and not (len(self.faults) == 1 and fault.endswith("*")):
                self.faults.popleft()
        answer = self._scored(body)
        match fault.rstrip("*"):
            case "":
                self.send(handler, answer)
            case "hang":
                time.sleep(3.0)
                handler.close_connection = True
            case "sleep":
                time.sleep(600.0)
            case "drop":
                handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n{")
                handler.close_connection = True
            case "garbage":
                self.send(handler, b"<html>bad gateway</html>")
            case "empty":
                self.send(handler, {"choices": []})
            case "short":
                answer["choices"][0]["prompt_logprobs"].pop()
                self.send(handler, answer)
            case "null":
                answer["choices"][0]["prompt_logprobs"][-1] = None
                self.send(handler, answer)
            case "best-null" | "best-nan":  # of the likeliest tokens, not of the response's own
                value = None if fault.startswith("best-null") else float("nan")
                for position, token in zip(answer["choices"][0]["prompt_logprobs"], body["prompt"], strict=True):
                    for i, entry in (position or {}).items():
                        entry["logprob"] = entry["logprob"] if i == str(token) else value
                self.send(handler, answer)
            case "trickle":
                handler.close_connection = True
                handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                with suppress(OSError):
                    for _ in range(100):
                        handler.wfile.write(b" ")
                        time.sleep(0.05)
            case "later":
                self.send(handler, {"error": "busy"}, status=503, headers={"Retry-After": "30"})
            case "nan":
                for entry in answer["choices"][0]["prompt_logprobs"][-1].values():
                    entry["logprob"] = float("nan")
                self.send(handler, answer)
            case "echo":  # a server in trouble that tells what it was sent
                self.send(handler, {"error": handler.headers.get("Authorization")}, status=500)
            case status:
                self.send(handler, {"error": "trouble"}, status=int(status), headers={"Retry-After": "0.05"})

    def send(
        self, handler: BaseHTTPRequestHandler, content: Any, *, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)

    @torch.inference_mode()
    def _scored(self, body: dict[str, Any]) -> dict[str, Any]:
        ids, k = body["prompt"], body["prompt_logprobs"]
        with self._lock:
            logprobs = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        positions: list[Any] = [None]
        for before, token in zip(logprobs, ids[1:], strict=False):
            best = before.topk(k).indices.tolist() if k else []
            positions.append({str(i): {"logprob": float(before[i]), "rank": 1} for i in dict.fromkeys([token, *best])})
        return {"model": NAME, "choices": [{"index": 0, "text": "?", "prompt_logprobs": positions}]}


@contextmanager
def faulty_server(model_dir: Path, **options: Any) -> Iterator[FaultyServer]:
    """A server for the time of the context."""
    server = FaultyServer(model_dir, **options)
    try:
        yield server
    finally:
        server.close()
