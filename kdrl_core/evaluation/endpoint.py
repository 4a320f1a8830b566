"""A model behind an OpenAI-compatible API, `/v1/chat/completions`: whatever serves it, and however it is prompted.

Nothing is known there of tokens, weights or the chat template: the question goes as a user's message, the text that
comes back is judged, its length is what the server counts. So its figures are those of the endpoint as a whole.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from kdrl_core.config.recipe import ServersConfig
from kdrl_core.engines.served_answers import TransientError
from kdrl_core.engines.server_pool import Server, ServerPool, served_model
from kdrl_core.evaluation.outcome import Response
from kdrl_core.types import FinishReason, RolloutRequest

_MAX_SEED = 2**63

OnResponses = Callable[[Sequence[Response]], None]


class ChatEndpoint:
    """What answers chat completions; faults that may pass are tried again.

    Args:
        config: how it is reached.
        temperature: of sampling.
        max_context_tokens: of prompt and response, compared with the server's context where it tells that.

    Raises:
        EngineError: it cannot be reached, serves another model, or has too short a context.
        SecretError: no key where the configuration says.
    """

    def __init__(self, config: ServersConfig, *, temperature: float, max_context_tokens: int) -> None:
        self._temperature = temperature
        self._pool = ServerPool(
            served_model(config),
            role="evaluated",
            field="MODEL",
            max_tokens=max_context_tokens - 1,
            options={"model": "--served-as", "api_key": "--api-key"},
        )

    @property
    def model(self) -> str:
        """The name under which it is served."""
        return self._pool.model

    def respond(
        self,
        requests: Sequence[RolloutRequest],
        messages: dict[str, str],
        *,
        max_response_tokens: int,
        think_opened: bool,
        on_finished: OnResponses | None = None,
    ) -> list[Response]:
        """One response per request, in order; `on_finished` hears each once it is there.

        Args:
            requests: their prompt_token_ids are not used.
            messages: what the user says, by `prompt_id`.
            max_response_tokens: longer ones are cut.
            think_opened: the server's template opens `<think>`, so that a text without tags is all thought.

        Raises:
            EngineError: a request is given up.
        """
        told = threading.Lock()

        def one(request: RolloutRequest, server: Server) -> Response:
            body = {
                "model": self._pool.model,
                "messages": [{"role": "user", "content": messages[request.prompt_id]}],
                "max_tokens": max_response_tokens,
                "temperature": self._temperature,
                "top_p": 1.0,
                "seed": request.seed % _MAX_SEED,
            }
            answer = self._pool.answer(server, "POST", "/chat/completions", body)
            text, length, reason = _chat_of(answer, server.url)
            response = Response(
                prompt_id=request.prompt_id,
                sample=request.sample,
                text=with_thought_tags(text, think_opened=think_opened),
                length=length,
                finish_reason=reason,
                seed=request.seed,
            )
            if on_finished is not None:
                with told:
                    on_finished([response])
            return response

        asked = [(f"response {row}", partial(one, request)) for row, request in enumerate(requests)]
        return self._pool.ask_all(asked)

    def close(self) -> None:
        """Let go of the connections."""
        self._pool.close()


def with_thought_tags(text: str, *, think_opened: bool) -> str:
    """The response with the `<think>` that a chat template put into the prompt, whose end the text may show."""
    if "<think>" in text or not (think_opened or "</think>" in text):
        return text
    return f"<think>{text}"


def _chat_of(answer: Any, url: str) -> tuple[str, int, FinishReason]:
    """Text, tokens and finish reason of the only choice; a thought that the server has taken out is put back."""
    try:
        choice = answer["choices"][0]
        message, reason = choice["message"], choice["finish_reason"]
        thought = message.get("reasoning_content") or message.get("reasoning") or ""
        text = message.get("content") or ""
        length = answer["usage"]["completion_tokens"]
    except (KeyError, IndexError, TypeError, AttributeError):
        raise TransientError(f"evaluated server {url} sent an answer without message, finish_reason or usage") from None
    if reason not in ("stop", "length"):
        raise TransientError(f"evaluated server {url} ended a response for {reason!r}")
    if not isinstance(text, str) or not isinstance(thought, str) or not isinstance(length, int):
        raise TransientError(f"evaluated server {url} sent a message that is no text, or tokens that are no number")
    if thought:
        closing = "</think>" if text or reason == "stop" else ""  # cut in the middle of the thought
        text = f"<think>{thought}{closing}{text}"
    return text, length, FinishReason(reason)
