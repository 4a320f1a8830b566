"""An OpenAI-compatible chat API on loopback over a model directory, with faults that are told to it."""

import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from kdrl_core.engines.transformers_engines import TransformersRolloutEngine
from kdrl_core.models.loading import load_model, load_tokenizer, stop_token_ids
from kdrl_core.types import RolloutRequest

NAME = "org/chatty"


class ChatServer:
    """Answers with what the model says to the rendered message.

    `faults` are done to requests one by one: an HTTP status, `garbage`, `no usage`, a `filter` that ends it, a `short`
    limit of the server's own, an `echo` of the key, a `stray` end of a thought, or `later` than retries go on.

    `style` is `plain`; `reasoning` as of servers that take the thought out of the content; `opened` as of those whose
    template has opened it; `new` as of those that want `max_completion_tokens`; `answer` without thoughts, ending with
    half a character.
    """

    def __init__(self, model: Path, *, temperature: float = 0.0) -> None:
        self.faults: deque[str] = deque()
        self.style = "plain"
        self.context: int | None = 256
        self.owner = "somebody"
        self.seen: list[dict[str, Any]] = []
        self._tokenizer = load_tokenizer(model)
        loaded = load_model(model)
        self._engine = TransformersRolloutEngine(
            loaded,
            self._tokenizer,
            stop_ids=stop_token_ids(loaded, self._tokenizer),
            temperature=temperature,
            max_response_tokens=80,
            batch_size=1,
        )
        self._lock = threading.Lock()
        self._is_closed = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                told = {} if outer.context is None else {"max_model_len": outer.context}
                outer._send(self, {"data": [{"id": NAME, "owned_by": outer.owner, **told}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/chat/completions"
                with outer._lock:
                    outer._answer(self, body)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that gives up hangs up
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        with self._lock:  # no thread may be left in torch when the process ends
            self._is_closed = True

    def _answer(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if self._is_closed:
            return
        self.seen.append(body)
        fault = self.faults.popleft() if self.faults else ""
        if self.style == "new" and "max_tokens" in body:
            told = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
            self._send(handler, {"error": told}, status=400)
            return
        if fault.isdecimal():
            self._send(handler, {"error": "trouble"}, status=int(fault))
            return
        if fault == "garbage":
            self._send(handler, {"choices": [{"message": {"content": ["no text"]}, "finish_reason": "stop"}]})
            return
        variables = body.get("chat_template_kwargs", {})
        ids = self._tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, tokenize=False, **variables
        )
        prompt = self._tokenizer(ids, add_special_tokens=False)["input_ids"]
        request = RolloutRequest(prompt_id="", sample=0, prompt_token_ids=prompt, seed=body["seed"])
        (rollout,) = self._engine.generate(
            [request], max_response_tokens=body.get("max_tokens") or body["max_completion_tokens"]
        )
        message: dict[str, Any] = {"role": "assistant", "content": rollout.text}
        if self.style == "reasoning" and "</think>" in rollout.text:
            thought, _, content = rollout.text.partition("</think>")
            message |= {"reasoning_content": thought.removeprefix("<think>"), "content": content}
        if self.style == "answer":
            message["content"] = rollout.text.rpartition("</think>")[2] + "\ud83d"
        if fault == "echo":
            message["content"] = str(handler.headers["Authorization"])
        if fault == "stray":
            message["content"] = f"</think>{message['content']}"
        if self.style == "opened":
            message["content"] = rollout.text.removeprefix("<think>")
        reason = {"filter": "content_filter", "short": "length"}.get(fault, rollout.finish_reason.value)
        choice = {"message": message, "finish_reason": reason}
        length = 7 if fault == "short" else len(rollout.token_ids)
        usage = {} if fault == "no usage" else {"usage": {"completion_tokens": length}}
        if fault == "later":
            time.sleep(1.5)
            self._send(handler, {"error": "too late"}, status=504)
            return
        self._send(handler, {"choices": [choice], **usage})

    def _send(self, handler: BaseHTTPRequestHandler, content: Any, *, status: int = 200) -> None:
        data = json.dumps(content).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)


@contextmanager
def chat_server(model: Path) -> Iterator[ChatServer]:
    server = ChatServer(model)
    try:
        yield server
    finally:
        server.close()
