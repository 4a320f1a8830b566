"""A rollout server whose faults are told to it: the API of `kdrl serve` over the transformers engine."""

import json
import threading
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from kdrl_core.engines.transformers_engines import TransformersRolloutEngine
from kdrl_core.engines.weight_digest import model_digest
from kdrl_core.models.loading import load_model, load_tokenizer, stop_token_ids
from kdrl_core.types import RolloutRequest

NAME = "student"


class Replica:
    """`faults` are done to requests one by one: an HTTP status, `drop`, or `restart`, which answers the request with
    the initial weights and forgets what was loaded, as a server does that was started anew in the meantime. The next
    `ignored` loads change nothing, and it says that they did."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.faults: deque[str] = deque()
        self.loads: list[str] = []
        self.ignored = 0
        self.num_sampled = 0
        self.num_tokens = 0
        self.context = 128
        self.met: threading.Barrier | None = None
        """Where it waits for others before it does what it is told."""
        self.is_asleep = False
        self.told: list[str] = []
        self._lock = threading.Lock()
        self._start()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer._send(self, {"data": [{"id": NAME, "max_model_len": outer.context}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer._answer(self, body)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _start(self) -> None:
        self.weights, self.incarnation = "", uuid.uuid4().hex
        model, tokenizer = load_model(self.model), load_tokenizer(self.model)
        self.engine = TransformersRolloutEngine(
            model,
            tokenizer,
            stop_ids=stop_token_ids(model, tokenizer),
            temperature=1.0,
            max_response_tokens=64,
            batch_size=1,
        )

    def _answer(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if handler.path == "/collective_rpc":
            self.told.append(body["method"])
            if self.met is not None:
                self.met.wait()
            if body["method"] != "kdrl_state":
                self.is_asleep = body["method"] == "kdrl_sleep"
            if body["method"] == "kdrl_load":
                self.weights, self.num_tokens = body["args"]
                self.loads.append(self.weights)
                if self.ignored:
                    self.ignored -= 1
                else:
                    self.engine.load_weights(Path(self.weights))
            digest = model_digest(self.engine._model, torch.float32)
            state = {"weights": self.weights, "incarnation": self.incarnation, "digest": digest}
            self._send(handler, {"results": [state]})
            return
        assert not self.is_asleep, "asked for a response while it sleeps"
        fault = self.faults.popleft() if self.faults else ""
        if fault == "drop":
            handler.close_connection = True
            return
        if fault.isdecimal():
            self._send(handler, {"error": "trouble"}, status=int(fault))
            return
        if fault == "restart":
            self._start()
        self.num_sampled += 1
        request = RolloutRequest(prompt_id="", sample=0, prompt_token_ids=body["prompt"], seed=body["seed"])
        (rollout,) = self.engine.generate([request], max_response_tokens=body["max_tokens"])
        choice = {
            "token_ids": rollout.token_ids,
            "logprobs": {"token_logprobs": rollout.logprobs},
            "finish_reason": rollout.finish_reason.value,
        }
        self._send(handler, {"choices": [choice]})

    def _send(self, handler: BaseHTTPRequestHandler, content: Any, *, status: int = 200) -> None:
        data = json.dumps(content).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)


@contextmanager
def replica(model: Path) -> Iterator[Replica]:
    server = Replica(model)
    try:
        yield server
    finally:
        server.close()
